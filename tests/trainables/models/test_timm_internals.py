"""timm's conventions are as they were read: `trainables/models/timm_internals.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from trainables.models import timm_internals
from trainables.models.batch_norm import BATCH_NORMS
from trainables.models.layer_types import CONVOLUTIONS, INSTANCE_NORMS

READ_IN = "1.0.31"


def changed(what: str) -> str:
    return (
        f"timm {timm.__version__} is not as timm {READ_IN} was: {what}. Read the new code, change "
        "trainables/models/timm_internals.py and this test together, and follow docs/upgrading.md."
    )


def create(name: str) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    return module


def classes() -> Iterator[type[nn.Module]]:
    for name, module in list(sys.modules.items()):
        if name.startswith("timm."):
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__.startswith("timm."):
                    yield value


def test_layers_of_timm_derive_from_torchs_public_classes() -> None:
    """The sets that private base classes of torch give, for every network of timm."""
    names = set(classes())
    assert len(names) > 500, "timm's classes were not found"
    public = {_BatchNorm: BATCH_NORMS, _NormBase: (*BATCH_NORMS, *INSTANCE_NORMS), _ConvNd: CONVOLUTIONS}
    for private, classes_of_torch in public.items():
        differing = [c.__qualname__ for c in names if issubclass(c, private) != issubclass(c, classes_of_torch)]
        assert differing == [], changed(f"{private.__name__} has subclasses that {classes_of_torch} miss")


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("test_vit", "Attention"),
        ("swin_tiny_patch4_window7_224", "WindowAttention"),
        ("xcit_nano_12_p16_224", "XCA"),
        ("convit_tiny", "GPSA"),
    ],
)
def test_attention_has_the_class_names_that_are_looked_for(name: str, attention: str) -> None:
    kinds = {type(module).__name__ for module in create(name).modules() if timm_internals.is_attention(module)}
    assert attention in kinds, changed(f"attention of {name} is no {attention} but one of {sorted(kinds)}")


def test_pooling_by_attention_is_no_attention() -> None:
    network = create("vit_base_patch16_siglip_224")
    pools = [module for module in network.modules() if timm_internals.is_attention_pooling(module)]
    assert pools, changed("the pooling of SigLIP has another class name")
    assert not any(timm_internals.is_attention(pool) for pool in pools)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("swin_tiny_patch4_window7_224", "_attn"),
        ("swinv2_cr_tiny_ns_224", "_shifted_window_attn"),
        ("maxvit_nano_rw_256", "_partition_attn"),
        ("hiera_tiny_224", None),
        ("test_vit", None),
    ],
)
def test_blocks_with_windows_have_the_methods_that_are_looked_for(name: str, method: str | None) -> None:
    methods = {timm_internals.windowed_attention(module) for module in create(name).modules()} - {None}
    assert methods == ({method} if method else set()), changed(f"windows of {name} are cut in {methods}")


def test_a_parallel_block_is_fused() -> None:
    fused = [type(m).__name__ for m in create("vit_base_patch16_xp_224").modules() if timm_internals.is_fused_block(m)]
    assert set(fused) == {"ParallelScalingBlock"}, changed("ParallelScalingBlock has other attributes")
    assert not any(timm_internals.is_fused_block(module) for module in create("test_vit").modules())


def test_architectures_filter_published_checkpoints() -> None:
    assert (
        timm_internals.checkpoint_filter(create("test_vit")) is timm.models.vision_transformer.checkpoint_filter_fn
    ), changed("the filter of ViT has another name")
    assert timm_internals.checkpoint_filter(nn.Linear(1, 1)) is None


def test_missing_keys_are_recorded_where_timm_loads_a_checkpoint(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", pretrained=False, num_classes=10)
    state = source.state_dict()
    del state["norm.weight"]
    torch.save(state, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    with timm_internals.recorded_missing_keys() as missing:
        timm.create_model("test_vit", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    assert missing == ["norm.weight"], changed("checkpoints are loaded by another way")
    load_state_dict = nn.Module.load_state_dict
    with timm_internals.recorded_missing_keys() as missing:
        nn.Linear(1, 1).load_state_dict({"weight": torch.ones(1, 1)}, strict=False)
    assert missing == ["bias"]
    assert nn.Module.load_state_dict is load_state_dict
