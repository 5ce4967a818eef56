"""CKA against the estimator written out in numpy, and its invariances."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainables.diagnostics.cka import block_cka, cka_report, gram, unbiased_hsic
from trainables.models.layer_types import blocks


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_hsic(k: NDArray[np.float64], l: NDArray[np.float64]) -> float:  # noqa: E741
    """HSIC₁ as Nguyen et al. (2021) print it: traces and products with the vector of ones."""
    n = len(k)
    ones = np.ones(len(k))
    k, l = k * (1 - np.eye(n)), l * (1 - np.eye(n))  # noqa: E741
    hsic = np.trace(k @ l) + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return float((hsic - 2 / (n - 2) * (ones @ k @ l @ ones)) / (n * (n - 3)))


def enumerated_hsic(k: NDArray[np.float64], l: NDArray[np.float64]) -> float:  # noqa: E741
    """The U-statistic that HSIC₁ is: the mean over all quadruples of distinct samples (Song et al. 2012)."""
    n = len(k)
    total = 0.0
    count = 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
                        count += 1
    return total / count


def plain_cka(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Activations of batches, before and after → CKA, in numpy and double precision."""
    both = first = second = 0.0
    for x, y in pairs:
        a = x.flatten(1).double().numpy()
        b = y.flatten(1).double().numpy()
        both += plain_hsic(a @ a.T, b @ b.T)
        first += plain_hsic(a @ a.T, a @ a.T)
        second += plain_hsic(b @ b.T, b @ b.T)
    return both / math.sqrt(first * second)


class Stack(nn.Module):
    """Blocks in a row on (B, 3, S, S) images, all maps linear."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Pair(3 if i == 0 else width, width) for i in range(2)))

    def forward(self, images: Tensor) -> Any:
        return self.blocks(images).mean((2, 3))


class Pair(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 1), nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


def stack(seed: int = 0) -> Stack:
    model = Stack()
    for number, parameter in enumerate(model.parameters()):
        parameter.data = random(*parameter.shape, seed=100 * seed + number)
    return model.eval()


def batches(count: int = 3, size: int = 12) -> list[Tensor]:
    return [random(size, 3, 4, 4, seed=i) for i in range(count)]


def activations(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, block in blocks(model).items():
            hook = block.register_forward_hook(lambda m, i, out, name=name: outputs.__setitem__(name, out))
            model(images)
            hook.remove()
    return outputs


def test_the_estimator_is_the_u_statistic() -> None:
    x, y = random(6, 3), random(6, 4, seed=1)
    k, l = x.double() @ x.double().T, y.double() @ y.double().T  # noqa: E741
    value = float(unbiased_hsic(k, l))
    assert value == pytest.approx(plain_hsic(k.numpy(), l.numpy()), rel=1e-9)
    assert value == pytest.approx(enumerated_hsic(k.numpy(), l.numpy()), rel=1e-9)


def test_centring_changes_rounding_only() -> None:
    x = random(10, 5) + 100
    y = random(10, 4, seed=1)
    raw = (x.double() @ x.double().T, y.double() @ y.double().T)
    assert float(unbiased_hsic(gram(x), gram(y))) == pytest.approx(float(unbiased_hsic(*raw)), rel=1e-4)


def test_it_agrees_with_plain_numpy() -> None:
    before = stack(0)
    after = stack(1)
    images = batches()
    similarity = block_cka(before, after, images)
    assert list(similarity) == ["blocks.0", "blocks.1"]
    for name, value in similarity.items():
        pairs = [(activations(before, batch)[name], activations(after, batch)[name]) for batch in images]
        assert value == pytest.approx(plain_cka(pairs), rel=1e-5)
        assert value is not None
        assert value < 0.999


def test_equal_networks_have_exactly_one() -> None:
    before = stack()
    assert block_cka(before, copy.deepcopy(before), batches()) == {"blocks.0": 1.0, "blocks.1": 1.0}
    assert block_cka(before, before, batches()) == {"blocks.0": 1.0, "blocks.1": 1.0}


def test_rotations_scales_and_shifts_do_not_count_but_other_maps_do() -> None:
    before = stack()
    rotation = torch.linalg.qr(random(6, 6, seed=5)).Q
    for name, matrix, offset, alike in (
        ("rotated and shifted", rotation, random(6, seed=6), True),
        ("scaled", 3.5 * torch.eye(6), torch.zeros(6), True),
        ("stretched", torch.diag(torch.tensor([30.0, 1, 1, 1, 1, 1])), torch.zeros(6), False),
    ):
        after = copy.deepcopy(before)
        last = after.blocks[1].second
        with torch.no_grad():
            last.weight.copy_(torch.einsum("ij,jkxy->ikxy", matrix, last.weight))
            last.bias.copy_(matrix @ last.bias + offset)
        similarity = block_cka(before, after, batches())["blocks.1"]
        assert similarity is not None
        assert (abs(similarity - 1) < 1e-5) is alike, name


def test_unrelated_activations_have_an_expectation_of_zero() -> None:
    """The plain estimator would give about p / (p + n); the unbiased one does not depend on the batch."""
    ratios = []
    for seed in range(200):
        x, y = gram(random(8, 50, seed=2 * seed)), gram(random(8, 50, seed=2 * seed + 1))
        ratios.append(float(unbiased_hsic(x, y)) / float(unbiased_hsic(x, x) * unbiased_hsic(y, y)) ** 0.5)
    assert abs(float(np.mean(ratios))) < 0.05


def test_the_size_of_the_batches_moves_it_little() -> None:
    before, after = stack(0), stack(0)
    with torch.no_grad():
        after.blocks[0].first.weight += 0.5 * random(6, 3, 1, 1, seed=9)
    images = random(240, 3, 4, 4, seed=3)
    small, large = (block_cka(before, after, images.split(size))["blocks.1"] for size in (16, 240))
    assert small == pytest.approx(large, abs=0.02)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "test_mambaout"])
def test_any_timm_network(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = timm.create_model(name, num_classes=0).eval()
    after = copy.deepcopy(before)
    last = list(blocks(after).values())[-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.add_(0.5 * random(*parameter.shape))
    similarity = block_cka(before, after, [random(5, 3, 64, 64) if name != "test_vit" else random(5, 3, 160, 160)])
    values = list(similarity.values())
    assert list(similarity) == list(blocks(before))
    assert values[:-1] == [1.0] * (len(values) - 1)
    assert values[-1] is not None
    assert values[-1] < 1


def test_activations_that_do_not_vary_have_no_cka() -> None:
    before = stack()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.blocks[1].second.weight.zero_()
    similarity = block_cka(before, after, batches())
    assert similarity == {"blocks.0": 1.0, "blocks.1": None}
    report = cka_report(similarity)
    assert report["cka/mean"] == 1.0
    assert "cka/mean" not in cka_report({"blocks.0": None})
    assert report["cka"].columns == {"block": ["blocks.0", "blocks.1"], "cka": [1.0, None]}  # type: ignore[union-attr]


def test_differences_of_a_last_digit_are_no_activations() -> None:
    digit = torch.finfo(torch.float32).eps
    rows = 1000 * (1 + digit * torch.randint(2, (7, 50), generator=torch.Generator().manual_seed(0)))
    assert rows.unique().numel() == 2
    assert not gram(rows).any()
    assert gram(rows + 0.1 * random(7, 50)).any()


def test_batches_below_four_images_are_left_out() -> None:
    before, after = stack(0), stack(1)
    full = batches(2)
    assert block_cka(before, after, [*full, random(3, 3, 4, 4)]) == block_cka(before, after, full)
    with pytest.raises(ValueError) as error:
        block_cka(before, after, [random(3, 3, 4, 4)])
    assert str(error.value) == "CKA needs a batch of at least 4 images, but got none."


def test_networks_of_two_structures_are_an_error() -> None:
    other = Stack()
    other.blocks.append(Pair(6, 6))
    with pytest.raises(ValueError, match="CKA compares two networks of one structure, but their blocks differ"):
        block_cka(stack(), other, batches())


def test_nothing_is_left_behind() -> None:
    before = stack()
    state = copy.deepcopy(before.state_dict())
    block_cka(before, stack(1), batches())
    assert all(not module._forward_hooks for module in before.modules())
    assert all(torch.equal(value, state[name]) for name, value in before.state_dict().items())
