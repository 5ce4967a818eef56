"""The components of transformer blocks in every family of timm: resolved, or refused with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
from timm.models import list_modules
from torch import nn

from trainables.models.backbone import load_pretrained
from trainables.models.transformer_blocks import (
    COMPONENTS,
    KINDS,
    component_kinds,
    final_norms,
    find_blocks,
    linear_width,
)
from trainables.specs.trial_spec import ModelSpec
from trainables.tasks.classification import new_classifier

RESOLVED = {
    "beit", "cait", "coat", "convit", "davit", "deepseek_vit", "deit", "edgenext", "efficientformer", "eva", "gcvit",
    "gemma4_vit", "hiera", "hieradet_sam2", "maxxvit", "metaformer", "mobilevit", "mvitv2", "naflexvit", "nest", "pit",
    "pvt_v2", "qwen3_vit", "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tnt", "twins",
    "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "vitamin",
    "volo", "xcit",
}  # fmt: skip
"""Modules of timm whose first network has the components; every other one must be refused, also those of later
versions of timm unless they are resolved."""
START = "The components ln1, mha, ln2, fc1 and fc2 need transformer blocks of LayerNorm, attention, LayerNorm and two"


@cache
def on_meta(name: str) -> nn.Module:
    """A network without weights."""
    with torch.device("meta"):
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    return network


def paths(name: str) -> dict[str, list[str]]:
    """Component → paths of its modules within the first block."""
    block = find_blocks(on_meta(name))[0]
    inside = {id(module): path for path, module in block.module.named_modules()}
    return {kind: [inside[id(module)] for module in block.component(kind)] for kind in COMPONENTS}


DOZEN = {
    "beit", "cait", "convnext", "davit", "deit", "eva", "mvitv2", "resnet", "swin_transformer", "vision_transformer",
    "volo", "xcit",
}  # fmt: skip
"""Families of each kind, resolved and refused, for the fast tests."""


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in DOZEN else pytest.mark.sweep) for name in list_modules()]
)
def test_every_family_of_timm_is_resolved_or_refused_with_a_reason(family: str) -> None:
    networks = timm.list_models(module=family)
    if not networks:
        pytest.skip("a module without networks of its own")
    network = on_meta(networks[0])
    if family not in RESOLVED:
        with pytest.raises(ValueError) as error:
            find_blocks(network)
        assert str(error.value).startswith(f"{START} linear layers, but in {networks[0]} ")
        return
    blocks = find_blocks(network)
    assert blocks
    for block in blocks:
        for kind in COMPONENTS:
            assert block.component(kind)
        widths = {linear_width(part) for part in block.fc1}
        assert None not in widths
        assert linear_width(block.fc2) is not None
    kinds = component_kinds(network)
    assert list(kinds) == [name for name, _ in network.named_parameters()]
    assert set(kinds.values()) <= set(KINDS) - {"head"}
    for kind in ("mha", "fc1", "fc2", "embed"):
        assert kind in kinds.values()


@pytest.mark.parametrize(
    ("name", "count", "attention", "fc1", "final"),
    [
        ("vit_base_patch16_224", 12, "attn", ["mlp.fc1"], ["norm"]),
        ("vit_small_patch14_reg4_dinov2", 12, "attn", ["mlp.fc1"], ["norm"]),
        ("vit_giant_patch14_dinov2", 40, "attn", ["mlp.fc1"], ["norm"]),
        ("vit_base_patch16_siglip_224", 12, "attn", ["mlp.fc1"], ["norm"]),
        ("vit_base_patch16_clip_quickgelu_224", 12, "attn", ["mlp.fc1"], ["norm"]),
        ("vit_base_patch16_rpn_224", 12, "attn", ["mlp.fc1"], ["fc_norm"]),
        ("vit_small_patch16_18x2_224", 36, "attns.0.attn", ["ffns.0.mlp.fc1"], ["norm"]),
        ("aimv2_1b_patch14_224", 24, "attn", ["mlp.fc1_g", "mlp.fc1_x"], ["norm"]),
        ("deit_tiny_distilled_patch16_224", 12, "attn", ["mlp.fc1"], ["norm"]),
        ("deit3_small_patch16_224", 12, "attn", ["mlp.fc1"], ["norm"]),
        ("beitv2_base_patch16_224", 12, "attn", ["mlp.fc1"], ["fc_norm"]),
        ("eva02_base_patch14_224", 12, "attn", ["mlp.fc1_g", "mlp.fc1_x"], ["fc_norm"]),
        ("eva02_tiny_patch14_224", 12, "attn", ["mlp.fc1"], ["fc_norm"]),
        ("vit_small_patch16_dinov3", 12, "attn", ["mlp.fc1"], ["norm"]),
        ("cait_xxs24_224", 26, "attn", ["mlp.fc1"], ["norm"]),
        ("xcit_nano_12_p16_224", 14, "attn", ["mlp.fc1"], ["norm"]),
        ("swin_tiny_patch4_window7_224", 12, "attn", ["mlp.fc1"], ["norm"]),
        ("swinv2_tiny_window8_256", 12, "attn", ["mlp.fc1"], ["norm"]),
        ("hiera_tiny_224", 12, "attn", ["mlp.fc1"], ["head.norm"]),
        ("vitamin_small_224", 14, "attn", ["mlp.w0", "mlp.w1"], ["fc_norm"]),
        ("pit_ti_224", 12, "attn", ["mlp.fc1"], ["norm"]),
        ("twins_svt_small", 18, "attn", ["mlp.fc1"], ["norm"]),
        ("maxvit_nano_rw_256", 14, "attn", ["mlp.fc1"], ["norm"]),
        ("coatnet_nano_rw_224", 9, "attn", ["mlp.fc1"], ["norm"]),
        ("coat_lite_tiny", 8, "factoratt_crpe", ["mlp.fc1"], ["norm4"]),
        ("edgenext_xx_small", 3, "xca", ["mlp.fc1"], ["head.norm"]),
        ("caformer_s18", 12, "token_mixer", ["mlp.fc1"], ["head.norm"]),
        ("mobilevitv2_050", 9, "attn", ["mlp.fc1"], ["stages.4.1.norm"]),
        ("gemma4_vit_167m", 16, "attn", ["mlp.gate_proj", "mlp.up_proj"], []),
    ],
)
def test_components_of_well_known_networks(
    name: str, count: int, attention: str, fc1: list[str], final: list[str]
) -> None:
    network = on_meta(name)
    assert len(find_blocks(network)) == count
    names = paths(name)
    assert (names["mha"], names["fc1"]) == ([attention], fc1)
    assert list(final_norms(network)) == final


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("vit_base_patch16_224", ("norm1", "norm2")),
        ("swinv2_tiny_window8_256", ("norm1", "norm2")),
        ("vit_base_patch16_rpn_224", ("norm1", "norm2")),
        ("xcit_nano_12_p16_224", ("norm1", "norm2")),
        ("gemma4_vit_167m", ("norm1", "norm3")),
        ("edgenext_xx_small", ("norm_xca", "norm")),
        ("coatnet_nano_rw_224", ("norm1.norm", "norm2")),
        ("vit_small_patch16_18x2_224", ("attns.0.norm", "ffns.0.norm")),
        ("tnt_s_patch16_224", ("norm_in", "norm_mlp_in")),
    ],
)
def test_norms_before_their_part_and_after_it(name: str, norms: tuple[str, str]) -> None:
    names = paths(name)
    assert (names["ln1"], names["ln2"]) == ([norms[0]], [norms[1]])


def test_parallel_parts_of_one_block_are_blocks_of_their_own() -> None:
    names = [block.name for block in find_blocks(on_meta("vit_small_patch16_18x2_224"))]
    assert names[:3] == ["blocks.0[0]", "blocks.0[1]", "blocks.1[0]"]
    outer = find_blocks(on_meta("tnt_s_patch16_224"))[1]
    assert outer.mha is outer.module.get_submodule("attn_out")
    assert outer.ln1 is outer.module.get_submodule("norm_out")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("convnext_atto", "it has no block of attention and feed-forward"),
        ("resnet18", "it has no block of attention and feed-forward"),
        (
            "vit_base_patch16_xp_224",
            "at blocks.0 (ParallelScalingBlock) one projection serves both attention and feed-forward",
        ),
        (
            "coatnet_bn_0_rw_224",
            "at stages.2.blocks.0.attn (Attention2d) the attention has no LayerNorm of its own beside it (but "
            "BatchNorm)",
        ),
        (
            "tiny_vit_5m_224",
            "at stages.1.blocks.0.attn (Attention) the attention has no LayerNorm of its own beside it (but BatchNorm)",
        ),
        (
            "levit_128",
            "at stages.0.blocks.0.attn (Attention) attentions and feed-forward parts of two linear layers do not pair "
            "up (1 and 0)",
        ),
        (
            "crossvit_9_240",
            "at blocks.0.fusion.0.attn (CrossAttention) attentions and feed-forward parts of two linear layers do not "
            "pair up (1 and 0)",
        ),
        (
            "coat_mini",
            "at parallel_blocks.0.factoratt_crpe2 (FactorAttnConvRelPosEnc) attentions and feed-forward parts of two "
            "linear layers do not pair up (3 and 1)",
        ),
        (
            "botnet26t_256",
            "at stages.2.1.self_attn (BottleneckAttn) attentions and feed-forward parts of two linear layers do not "
            "pair up (1 and 0)",
        ),
    ],
)
def test_networks_without_these_components_are_refused(name: str, why: str) -> None:
    with pytest.raises(ValueError) as error:
        component_kinds(on_meta(name))
    assert str(error.value) == (
        f"{START} linear layers, but in {name} {why}. Choose another strategy, or a network such as a ViT, DeiT or "
        "Swin."
    )


def test_every_parameter_of_a_classifier_has_its_kind(network: Callable[[str], str]) -> None:
    backbone = load_pretrained(ModelSpec(name=network("vit")))
    model = new_classifier(backbone, 4, "cpu", seed=0)
    kinds = component_kinds(model)
    expected = {
        r"head\..*": "head",
        r"backbone\.(cls_token|pos_embed|reg_token|patch_embed\..*)": "embed",
        r"backbone\.blocks\.\d+\.norm1\..*": "ln1",
        r"backbone\.blocks\.\d+\.attn\..*": "mha",
        r"backbone\.blocks\.\d+\.norm2\..*": "ln2",
        r"backbone\.blocks\.\d+\.mlp\.fc1\..*": "fc1",
        r"backbone\.blocks\.\d+\.mlp\.fc2\..*": "fc2",
        r"backbone\.(norm|fc_norm)\..*": "final_norm",
    }
    for name, kind in kinds.items():
        matching = [owner for pattern, owner in expected.items() if re.fullmatch(pattern, name)]
        assert matching == [kind], name
    assert set(kinds.values()) == set(expected.values())


def test_what_belongs_to_no_component_is_other_or_embed() -> None:
    kinds = component_kinds(on_meta("deit3_small_patch16_224"))
    assert {name.rpartition(".")[0] for name, kind in kinds.items() if kind == "other"} == {
        f"blocks.{i}.{scale}" for i in range(12) for scale in ("ls1", "ls2")
    }
    pooled = component_kinds(on_meta("vit_base_patch16_siglip_224"))
    assert {kind for name, kind in pooled.items() if name.startswith("attn_pool.")} == {"other"}
    swin = component_kinds(on_meta("swin_tiny_patch4_window7_224"))
    assert {kind for name, kind in swin.items() if ".downsample." in name} == {"other"}
    assert swin["layers.0.blocks.0.attn.relative_position_bias_table"] == "mha"


def test_adapters_around_a_component_belong_to_it() -> None:
    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.lora_a = nn.Linear(192, 2)
            self.lora_b = nn.Linear(2, 768)

    with torch.device("meta"):
        network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
        network.blocks[3].mlp.fc1 = Adapter(network.blocks[3].mlp.fc1)
    kinds = component_kinds(network)
    assert kinds["blocks.3.mlp.fc1.base_layer.weight"] == kinds["blocks.3.mlp.fc1.lora_b.weight"] == "fc1"
    assert linear_width(network.blocks[3].mlp.fc1) == (192, 768)


def test_attention_in_windows_is_a_method_of_its_block() -> None:
    block = find_blocks(on_meta("swin_tiny_patch4_window7_224"))[1]
    assert block.attention() == (block.module, "_attn")
    plain = find_blocks(on_meta("vit_base_patch16_224"))[0]
    assert plain.attention() == (plain.mha, "forward")
