"""The strategies' conformance suite on pictures with masks, with tiny encoders and all four decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from tests.conformance import StrategyConformance
from tests.support.mask_store import rectangles
from trainables.engine.trial import Trial

DENSE = ("miou", "miou_classes", "pixel_acc", "nll")


class SegmentationConformance(StrategyConformance):
    """What differs from classification."""

    task = "segmentation"
    settings: ClassVar[Mapping[str, Any]] = {"batch_size": 4, "image_size": 32, "diagnostics": ("shift", "distortion")}
    data = f"{rectangles.__module__}:{rectangles.__name__}"
    every_unit = frozenset(
        {
            *("train/loss", "train/miou", "train/pixel_acc", "val/miou", "val/nll", "lr/backbone", "lr/head"),
            *("cost/unit_seconds", "cost/images_per_second", "cost/cpu_use", "finished", "unit"),
        }
    )
    at_the_end = frozenset(
        {
            *(f"{split}/{key}" for split in ("test", "ood/dark") for key in DENSE),
            *("ood/mean/miou", "ood/worst/miou", "best/val/miou", "best/epoch", "change/total", "change/head"),
        }
    )
    epochs = 2

    # One of the classes below is enough for what a process of its own takes.
    test_a_fresh_process_gives_the_same_result = None  # type: ignore[assignment]

    def pretrained(self, run: Trial) -> nn.Module:
        """Dilated, as the decoder demands."""
        return run.task.build_model(run.data.backbone, seed=0).backbone

    def pretrained_features(self, run: Trial, images: Tensor) -> list[Tensor]:
        """The maps of an untouched model."""
        model = run.task.build_model(run.data.backbone, seed=0).eval()
        maps: list[Tensor] = model.features(images)
        return maps


class TestFull(SegmentationConformance):
    strategy = "full"
    test_a_fresh_process_gives_the_same_result = StrategyConformance.test_a_fresh_process_gives_the_same_result
    learning: ClassVar[Mapping[str, Any]] = {"lr_backbone": 0.01}


class TestUNet(SegmentationConformance):
    strategy = "full"
    networks = ("cnn",)
    settings: ClassVar[Mapping[str, Any]] = {**SegmentationConformance.settings, "decoder": "unet"}
    learning: ClassVar[Mapping[str, Any]] = {"lr_backbone": 0.01}


class TestFeaturePyramid(SegmentationConformance):
    strategy = "linear_probe"
    networks = ("cnn",)
    settings: ClassVar[Mapping[str, Any]] = {**SegmentationConformance.settings, "decoder": "fpn"}
    learning: ClassVar[Mapping[str, Any]] = {"lr_head": 0.003}


class TestLinearProbe(SegmentationConformance):
    strategy = "linear_probe"


class TestLpFt(SegmentationConformance):
    strategy = "lp_ft"


class TestDaft(SegmentationConformance):
    strategy = "daft"
    networks = ("cnn",)
    hparams: ClassVar[Mapping[str, Any]] = {"lr_head": 0.05}
    reports = frozenset({"bn_conversion/*"})


class TestLayerNorm(SegmentationConformance):
    strategy = "layernorm"
    networks = ("vit",)
    hparams: ClassVar[Mapping[str, Any]] = {"lr_head": 0.05}
    reports = frozenset({"layernorm/*"})


class TestLoRA(SegmentationConformance):
    strategy = "lora"
    networks = ("vit",)
    hparams: ClassVar[Mapping[str, Any]] = {"lr_head": 0.05}
    reports = frozenset({"lora/maps"})


class TestBitFit(SegmentationConformance):
    strategy = "bitfit"
    networks = ("vit",)
    hparams: ClassVar[Mapping[str, Any]] = {"lr_head": 0.05}


class TestComponents(SegmentationConformance):
    strategy = "components"
    networks = ("vit",)
    hparams: ClassVar[Mapping[str, Any]] = {"kinds": "fc1", "lr_head": 0.05}
    reports = frozenset({"components/*"})
