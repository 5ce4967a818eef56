"""Plasticity against plain loops over images, blocks, windows and heads, and against closed forms."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tests.trainables.diagnostics.plain_plasticity import plain_plasticity
from trainables.diagnostics.plasticity import PlasticityReport, measure_pairs, measure_plasticity
from trainables.models.transformer_blocks import COMPONENTS, find_blocks
from trainables.specs.measurements import Curve

PATCHES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
STAGES = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
PLAIN: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {**PATCHES, "reg_tokens": 2, "init_values": 0.5},
    "deit_tiny_distilled_patch16_224": PATCHES,
    "swin_tiny_patch4_window7_224": STAGES,
}
"""Networks of the plain reference: class and register tokens and LayerScale; two class tokens; windows, shifted
in every second block, and stages of another width."""
OTHERS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": PATCHES,
    "vit_relpos_small_patch16_224": PATCHES,
    "vit_small_patch16_18x2_224": PATCHES,
    "vit_base_patch16_rpn_224": PATCHES,
    "eva02_base_patch14_224": {**PATCHES, "patch_size": 16},
    "cait_xxs24_224": PATCHES,
    "xcit_nano_12_p16_224": {**PATCHES, "patch_size": 16},
    "naflexvit_base_patch16_gap": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "swinv2_tiny_window8_256": STAGES,
    "swinv2_cr_tiny_224": STAGES,
    "hiera_tiny_224": {"img_size": (64, 64), "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "mobilevit_xxs": {},
    "tnt_s_patch16_224": {
        **{"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads_outer": 2, "inner_dim": 8, "num_heads_inner": 2},
    },
}
"""Networks of every other way of handing tokens to the components."""
SIDES = {"hiera_tiny_224": 64, "mobilevit_xxs": 64}


def network(name: str) -> nn.Module:
    """A small network with random weights of a size that matters."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **{**PLAIN, **OTHERS}[name])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval()


def pair(count: int, side: int = 32) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, count, 3, side, side, generator=torch.Generator().manual_seed(1))
    return x, 0.5 * y + 0.2


class Toy(nn.Module):
    """Blocks on tokens that are the image itself: (B, 3, 4, 4) → 3 tokens of 16 channels."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim, num_heads=2, mlp_ratio=2.0) for _ in range(2)])

    def forward(self, images: Tensor) -> Tensor:
        t = images.flatten(2)
        for block in self.blocks:
            t = block(t)
        return t


def toy() -> Toy:
    torch.manual_seed(0)
    toy = Toy()
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return toy


@pytest.mark.parametrize("probe", ["embedding", "in_situ"])
@pytest.mark.parametrize("name", PLAIN)
def test_it_equals_plain_loops(name: str, probe: Any) -> None:
    model = network(name)
    x, y = pair(3)
    measured = measure_plasticity(model, x, y, probe, batch_size=2)
    expected = plain_plasticity(model, x, y, probe)
    assert set(expected) == set(COMPONENTS) == set(measured.mean)
    assert len(measured.blocks) == len(expected["mha"]) == (4 if "swin" in name else 2)
    for kind, rates in expected.items():
        assert measured.per_block[kind] == pytest.approx([float(np.mean(row)) for row in rates], rel=1e-4), kind
        assert measured.mean[kind] == pytest.approx(float(np.mean(rates)), rel=1e-4)
        for name_of, q in (("q05", 0.05), ("q25", 0.25), ("q50", 0.5), ("q75", 0.75), ("q95", 0.95)):
            assert measured.distribution[kind][name_of] == pytest.approx(float(np.quantile(rates, q)), rel=1e-4)
    assert measured.rank == sorted(COMPONENTS, key=lambda kind: -float(np.mean(expected[kind])))
    assert (measured.probe, measured.pairs) == (probe, 3)


@pytest.mark.parametrize("probe", ["embedding", "in_situ"])
@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_it_does_not_depend_on_the_batch_size(name: str, probe: Any) -> None:
    model = network(name)
    x, y = pair(5, SIDES.get(name, 32))
    single, *others = (measure_plasticity(model, x, y, probe, batch_size=size) for size in (1, 2, 64))
    assert len(single.blocks) == len(find_blocks(model))
    for other in others:
        assert other.rank == single.rank
        for kind in COMPONENTS:
            assert other.per_block[kind] == pytest.approx(single.per_block[kind], rel=1e-5)


def test_a_linear_map_lies_between_its_extreme_singular_values() -> None:
    model = toy()
    x, y = pair(8, side=4)
    for probe in ("embedding", "in_situ"):
        measured = measure_plasticity(model, x, y, probe)
        for i, block in enumerate(model.blocks):
            values = torch.linalg.svdvals(block.mlp.fc1.weight.detach())
            assert float(values[-1]) < measured.per_block["fc1"][i] < float(values[0])
    # The padding of the embedding probe leaves FC2 its first d columns.
    measured = measure_plasticity(model, x, y, "embedding")
    for i, block in enumerate(model.blocks):
        values = torch.linalg.svdvals(block.mlp.fc2.weight.detach()[:, :16])
        assert float(values[-1]) < measured.per_block["fc2"][i] < float(values[0])


def test_a_multiple_of_an_orthogonal_map_has_exactly_this_multiple() -> None:
    model = toy()
    x, y = pair(4, side=4)
    orthogonal = torch.linalg.qr(torch.randn(32, 16, generator=torch.Generator().manual_seed(2)))[0]
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight.copy_(3 * orthogonal)
            block.mlp.fc2.weight.copy_(torch.cat([0.5 * torch.eye(16), 100 * torch.ones(16, 16)], dim=1))
    measured = measure_plasticity(model, x, y)
    assert measured.per_block["fc1"] == pytest.approx([3, 3], rel=1e-5)
    assert measured.per_block["fc2"] == pytest.approx([0.5, 0.5], rel=1e-5), "padded with zeros, behind"


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_layer_norm_of_tokens_of_one_spread_is_at_most_its_inverse(sigma: float) -> None:
    model = toy()
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.ones_(norm.weight)
    x, y = (t.flatten(2) for t in pair(16, side=4))
    x, y = ((t - t.mean(-1, keepdim=True)) / t.std(-1, keepdim=True, correction=0) * sigma for t in (x, y))
    measured = measure_plasticity(model, x.unflatten(2, (4, 4)), y.unflatten(2, (4, 4)))
    for kind in ("ln1", "ln2"):
        assert measured.mean[kind] <= 1 / sigma
        assert measured.mean[kind] == pytest.approx(1 / sigma, rel=1e-4)


@pytest.mark.parametrize("probe", ["embedding", "in_situ"])
@pytest.mark.parametrize("kind", COMPONENTS)
def test_scaling_a_components_weights_scales_its_plasticity(kind: str, probe: Any) -> None:
    model = toy()
    x, y = pair(4, side=4)
    before = measure_plasticity(model, x, y, probe)
    block = model.blocks[1]
    outer = {"ln1": block.norm1, "mha": block.attn.proj, "ln2": block.norm2, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
    with torch.no_grad():
        for parameter in outer[kind].parameters():
            parameter.mul_(2.5)
    after = measure_plasticity(model, x, y, probe)
    assert after.per_block[kind][1] == pytest.approx(2.5 * before.per_block[kind][1], rel=1e-5)
    assert after.per_block[kind][0] == before.per_block[kind][0]


def test_a_gated_unit_counts_both_maps_of_fc1() -> None:
    model = network("eva02_base_patch14_224")
    x, y = pair(3)
    block = find_blocks(model)[0]
    with torch.no_grad():
        for part in block.fc1:
            part.weight.copy_(2 * torch.linalg.qr(torch.randn(part.weight.shape))[0])
    measured = measure_plasticity(model, x, y)
    assert measured.per_block["fc1"][0] == pytest.approx(math.hypot(2, 2), rel=1e-5)


def test_the_network_is_left_as_it_was_and_measured_in_eval_mode() -> None:
    model = network("swin_tiny_patch4_window7_224")
    x, y = pair(2)
    expected = measure_plasticity(model, x, y)
    model.train()
    model.norm.eval()
    model.layers[0].blocks[1].drop_path1.drop_prob = 0.9
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    assert measure_plasticity(model, x, y) == expected
    with pytest.raises(AssertionError, match="Input height"):
        measure_plasticity(model, x[:, :, :5, :5], y[:, :, :5, :5])
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_is_measured_in_full_precision_whatever_surrounds_it() -> None:
    model = network("vit_tiny_patch16_224")
    x, y = pair(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = measure_plasticity(model, x, y)
    assert measured == measure_plasticity(model, x, y)


@pytest.mark.parametrize("probe", ["embedding", "in_situ"])
def test_memory_does_not_grow_with_the_number_of_pairs(probe: Any) -> None:
    model = network("vit_tiny_patch16_224")
    x, y = pair(4)
    live: list[int] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(12):
            gc.collect()
            # By type: `isinstance` would ask torch's deprecated objects, which warn, for their class.
            live.append(sum(t.nbytes for t in gc.get_objects() if issubclass(type(t), Tensor)))
            yield x, y

    assert measure_pairs(model, batches(), probe).pairs == 48
    assert len(set(live[1:])) == 1


def test_the_report_is_a_curve_metrics_and_plain_json_values() -> None:
    model = toy()
    x, y = pair(3, side=4)
    measured = measure_plasticity(model, x, y)
    assert measured.metrics() == {f"plasticity/{kind}": measured.mean[kind] for kind in COMPONENTS}
    assert measured.curve().columns == {"block": ["blocks.0", "blocks.1"], **measured.per_block}
    spread = measured.distribution_curve().columns
    assert list(spread) == ["component", "q05", "q25", "q50", "q75", "q95"]
    assert spread["component"] == measured.rank
    assert spread["q50"] == [measured.distribution[kind]["q50"] for kind in measured.rank]
    record = measured.record()
    assert {name for name, value in record.items() if isinstance(value, Curve)} == {
        "plasticity",
        "plasticity_distribution",
    }
    assert PlasticityReport(**measured.to_dict()) == measured


def test_pairs_of_equal_images_do_not_count() -> None:
    model = toy()
    x, y = pair(4, side=4)
    expected = measure_plasticity(model, x[:3], y[:3])
    y[3] = x[3]
    measured = measure_plasticity(model, x, y)
    assert measured.mean == pytest.approx(expected.mean, rel=1e-6)
    with pytest.raises(ValueError) as error:
        measure_plasticity(model, x, x)
    assert str(error.value) == (
        "Plasticity needs pairs of different images, but source and target images give the same tokens in every pair. "
        "Take them from different samples."
    )


def refusal(model: nn.Module, x: Tensor, y: Tensor, **arguments: Any) -> str:
    with pytest.raises(ValueError) as error:
        measure_plasticity(model, x, y, **arguments)
    return str(error.value)


def test_what_cannot_be_measured_is_refused() -> None:
    x, y = pair(2, side=4)
    assert refusal(toy(), x, y[:1]) == (
        "Plasticity is measured on pairs, so it needs as many source as target images and at least one of each, but "
        "got 2 and 1."
    )
    assert refusal(toy(), x, y, probe="inside") == "probe must be one of 'embedding', 'in_situ', but got 'inside'."
    assert refusal(toy(), x, y, batch_size=0) == "batch_size must be at least 1, but got 0."
    with pytest.raises(ValueError, match=r"^Plasticity needs at least one pair of images, but got none\.$"):
        measure_pairs(toy(), iter(()))
    assert refusal(timm.create_model("test_resnet"), x, y).startswith("The components ln1, mha, ln2, fc1 and fc2 need")


def test_attention_that_is_no_function_of_an_images_tokens_is_refused() -> None:
    davit = {"embed_dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
    model = timm.create_model("davit_tiny", num_classes=0, **davit)
    x, y = pair(2, side=64)
    assert refusal(model, x, y) == (
        "Plasticity is that of functions of an image's tokens, but mha of stages.0.blocks.0.0 is none: tokens (4, 256, "
        "8) enter the block, which makes them (36, 49, 8) for it. Use probe='in_situ'."
    )
    assert refusal(model, x, y, probe="in_situ") == (
        "Plasticity is that of functions of an image's tokens, but mha of stages.0.blocks.0.0 is none: its windows are "
        "filled up, from 256 tokens an image to 441, and what comes of the filling is thrown away. Use images of a "
        "size that whole windows cover, or another network."
    )
    model = timm.create_model("davit_tiny", num_classes=0, window_size=2, **davit)
    assert len(measure_plasticity(model, x, y, "in_situ").blocks) == 8
    model = timm.create_model("gcvit_xxtiny", num_classes=0, img_size=64, window_size=(2, 2, 2, 2))
    for probe in ("embedding", "in_situ"):
        assert refusal(model, *pair(2, side=64), probe=probe) == (
            "Plasticity is that of functions of an image's tokens, but mha of stages.0.blocks.0 is none: it also reads "
            "queries that are computed from the image. Use another network."
        )
