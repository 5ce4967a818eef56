"""Kinds, stages and blocks of timm's families, by walking their modules."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from torch import nn

from trainables.models.layer_types import KINDS, blocks, fine_kinds, layer_kinds, stages, statistics


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, num_classes=0)
    return model


def test_every_parameter_of_a_vision_transformer() -> None:
    kinds = layer_kinds(build("vit_tiny_patch16_224"))
    assert Counter(kinds.values()) == {"embed": 4, "norm": 12 * 4 + 2, "attention": 12 * 4, "mlp": 12 * 4}
    assert {name for name, kind in kinds.items() if kind == "embed"} == {
        *("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"),
    }
    assert kinds["blocks.3.attn.proj.bias"] == "attention"
    assert kinds["blocks.3.mlp.fc2.weight"] == "mlp"


@pytest.mark.parametrize(
    ("network", "tensor", "kind"),
    [
        ("resnet18", "layer2.0.downsample.0.weight", "conv"),
        ("resnet18", "layer2.0.downsample.1.bias", "norm"),
        ("seresnet50", "layer1.0.se.fc1.weight", "conv"),
        ("nfnet_f0", "stages.0.0.attn_last.fc1.weight", "conv"),  # a gate over channels, called attention
        ("nfnet_f0", "stages.0.0.conv1.weight", "conv"),
        ("convnext_tiny", "stages.0.blocks.0.gamma", "scale"),
        ("convnext_tiny", "stages.0.blocks.0.mlp.fc1.weight", "mlp"),
        ("convnext_tiny", "stages.0.blocks.0.conv_dw.weight", "conv"),
        ("beit_base_patch16_224", "blocks.0.gamma_1", "scale"),
        ("cait_xxs24_224", "blocks.0.gamma_1", "scale"),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn.relative_position_bias_table", "attention"),
        ("swinv2_tiny_window8_256", "layers.0.blocks.0.attn.cpb_mlp.0.weight", "attention"),
        ("swin_tiny_patch4_window7_224", "layers.1.downsample.reduction.weight", "linear"),
        ("maxvit_tiny_tf_224", "stages.0.blocks.0.attn_block.mlp.fc1.weight", "mlp"),  # an MLP in an attention block
        ("maxvit_tiny_tf_224", "stages.0.blocks.0.attn_block.attn.qkv.weight", "attention"),
        ("mixer_s16_224", "blocks.0.mlp_tokens.fc1.weight", "mlp"),
        ("resmlp_12_224", "blocks.0.norm1.alpha", "norm"),
        ("resmlp_12_224", "blocks.0.linear_tokens.weight", "linear"),
        ("deit_tiny_distilled_patch16_224", "dist_token", "embed"),
        ("vit_base_patch16_siglip_224", "attn_pool.q.weight", "attention"),
        ("eva02_tiny_patch14_224", "blocks.0.mlp.fc1.weight", "mlp"),
    ],
)
def test_kinds_of_other_families(network: str, tensor: str, kind: str) -> None:
    assert layer_kinds(build(network))[tensor] == kind


@pytest.mark.parametrize(
    ("network", "finer"),
    [
        ("vit_tiny_patch16_224", {"ln1", "mha", "ln2", "fc1", "fc2", "final_norm", "embed"}),
        ("swin_tiny_patch4_window7_224", {"ln1", "mha", "ln2", "fc1", "fc2", "final_norm", "embed", "linear", "norm"}),
        ("resnet18", {"conv", "norm"}),
        ("levit_128s", {"conv", "norm", "attention", "mlp"}),  # attention, but no LayerNorm
    ],
)
def test_components_where_they_are_defined(network: str, finer: set[str]) -> None:
    model = build(network)
    assert set(fine_kinds(model).values()) == finer
    coarse = {"ln1": "norm", "ln2": "norm", "final_norm": "norm", "mha": "attention", "fc1": "mlp", "fc2": "mlp"}
    assert {name: coarse.get(kind, kind) for name, kind in fine_kinds(model).items()} == layer_kinds(model)


@pytest.mark.parametrize(
    ("network", "names", "count"),
    [
        ("vit_tiny_patch16_224", ["blocks.0", "blocks.11"], 12),
        ("resnet50", ["layer1.0", "layer4.2"], 16),
        ("swin_tiny_patch4_window7_224", ["layers.0.blocks.0", "layers.3.blocks.1"], 12),
        ("convnext_tiny", ["stages.0.blocks.0", "stages.3.blocks.2"], 18),
        ("efficientnet_b0", ["blocks.0.0", "blocks.6.0"], 16),
        ("regnety_002", ["s1.b1", "s4.b7"], 13),
        ("densenet121", ["features.denseblock1", "features.denseblock4"], 4),
        ("twins_svt_small", ["blocks.0.0", "blocks.3.3"], 18),
        ("inception_v3", ["Mixed_5b", "Mixed_7c"], 11),
        ("vgg11", ["features.0", "pre_logits.fc2"], 10),
    ],
)
def test_blocks(network: str, names: list[str], count: int) -> None:
    prefixes = list(blocks(build(network)))
    assert [prefixes[0], prefixes[-1], len(prefixes)] == [*names, count]


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("resnet50", ["stem", "layer1", "layer2", "layer3", "layer4"]),
        ("vit_tiny_patch16_224", ["stem", *(f"blocks.{i}" for i in range(12)), "norm"]),
        ("swin_tiny_patch4_window7_224", ["stem", *(f"layers.{i}" for i in range(4)), "norm"]),
        ("convnext_tiny", ["stem", *(f"stages.{i}" for i in range(4)), "head"]),
        ("efficientnet_b0", ["stem", *(f"blocks.{i}" for i in range(7)), "conv_head", "bn2"]),
        ("vgg11", ["features", "pre_logits"]),
    ],
)
def test_stages(network: str, expected: list[str]) -> None:
    model = build(network)
    groups = stages(model)
    assert list(dict.fromkeys(groups.values())) == expected
    assert groups.keys() == {*dict(model.named_parameters()), *dict(model.named_buffers())}


def test_statistics_are_those_of_batch_norm() -> None:
    names = statistics(build("resnet18"))
    assert Counter(names.values()) == {"bn_mean": 20, "bn_var": 20}
    assert names["layer1.0.bn1.running_var"] == "bn_var"
    assert statistics(build("vit_tiny_patch16_224")) == {}
    assert statistics(nn.BatchNorm1d(3, track_running_stats=False)) == {}


def test_a_bare_layer_has_a_kind_and_a_stage() -> None:
    for layer, kind in ((nn.LayerNorm(3), "norm"), (nn.Linear(2, 2), "linear"), (nn.Conv1d(1, 1, 1), "conv")):
        assert set(layer_kinds(layer).values()) == {kind}
        assert set(stages(layer).values()) == {"stem"}
    assert {"norm", "linear", "conv"} < set(KINDS)
