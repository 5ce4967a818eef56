"""Semantic segmentation: one class per pixel, a decoder on an encoder's feature maps, cross-entropy.

Pixels of the value `IGNORED` count nowhere. Strategies tune the encoder as they tune a classifier's backbone; the
decoder is the task's head, starts from random weights and trains with all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.data.store import IGNORED
from trainables.models.dense_features import (
    OUTPUT_STRIDE,
    Dilation,
    FeatureMap,
    MapReader,
    feature_maps,
    is_pyramid,
    planned_dilation,
    structure_of,
    unused_parameters,
)
from trainables.models.task_model import TaskModel
from trainables.specs.metrics import IOU_TABLE, PIXEL_CONFUSION_TABLE, SEGMENTATION, TaskMetrics
from trainables.specs.trial_spec import DECODERS
from trainables.tasks.base import MetricAccumulator, Task
from trainables.tasks.classification import focal_factor
from trainables.tasks.decoders import DeepLabV3Plus, DenseHead, FeaturePyramid, LinearHead, UNet
from trainables.tasks.segmentation_metrics import SegmentationScores, TrainingOverlap, confusion_table, iou_table

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.backbone import Backbone
    from trainables.specs.measurements import Curve

PYRAMID = (4, 8, 16, 32)
"""Strides of the maps that a feature pyramid joins."""


class Segmentation(Task):
    """Outputs are logits (B, K, h, w); targets are masks (B, S, S) uint8, or `MaskViews` in an evaluation."""

    metrics: TaskMetrics = SEGMENTATION
    label_smoothing: ClassVar[bool] = True
    focal: ClassVar[bool] = True
    dice: ClassVar[bool] = True
    trains_probe: ClassVar[bool] = True
    decoders: ClassVar[tuple[str, ...]] = DECODERS

    def build_model(self, backbone: Backbone, seed: int) -> TaskModel:
        """A copy of the backbone under a decoder.

        The study's, or the default of the encoder: a linear head for plain transformers, DeepLabv3+ where the last
        stage can be dilated, else a feature pyramid.

        Raises:
            ValueError: the encoder does not have the maps that the decoder reads.
        """
        reading = _reading(backbone, self.settings.decoder)
        return dense_model(copy.deepcopy(backbone.module).eval(), reading, len(self.targets.classes), seed)

    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        *,
        label_smoothing: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """Cross-entropy in float32, mean or sum over the labelled pixels of the batch; focal and with dice if asked.

        Logits are scaled to the masks. A batch without a labelled pixel has loss 0 and gradient 0. The mean is over
        pixels, so that a picture counts by what is labelled of it.
        """
        logits = scaled(outputs.float(), targets.shape[-2:])
        labels = targets.long()
        weight = self.loss_weight(targets)
        total = self._total(logits, labels, label_smoothing)
        if self.settings.loss.dice is not None:
            # Weighted as a mean over pixels is, so that `sum` is the sum of terms of which `mean` is the mean.
            total = total + weight * self.settings.loss.dice * dice_loss(logits, labels)
        return total if reduction == "sum" else total / weight.clamp(min=1)

    def loss_weight(self, targets: Tensor) -> Tensor:
        """Labelled pixels."""
        return (targets != IGNORED).sum()

    def training_metrics(self) -> TrainingOverlap:
        """Confusion of the training batches, at the decoder's own resolution."""
        return TrainingOverlap(len(self.targets.classes))

    def accumulator(self) -> SegmentationScores:
        """Confusion and likelihood on the masks' own pixels."""
        return SegmentationScores(len(self.targets.classes))

    def recording_accumulator(self) -> SegmentationScores:
        """The same, with the predicted mask of every picture."""
        return SegmentationScores(len(self.targets.classes), keeps_masks=True)

    def tables(self, splits: Mapping[str, MetricAccumulator]) -> Mapping[str, Curve]:
        """Intersection over union of every class, and the confusion matrix."""
        confusions: dict[str, Tensor] = {}
        for split, scores in splits.items():
            assert isinstance(scores, SegmentationScores)
            confusions[split] = scores.confusion()
        return {
            IOU_TABLE: iou_table(confusions, self.targets.classes),
            PIXEL_CONFUSION_TABLE: confusion_table(confusions, self.targets.classes),
        }

    @torch.no_grad()
    def zero_head(self, model: TaskModel) -> None:
        """Set the classifier to zero, in place: a decoder of zeros would have no gradient."""
        for parameter in model.head.classifier.parameters():
            parameter.zero_()

    def feature_scale(self, data: TrialData) -> float:
        """1: rates of the decoder are absolute, as it has no pooled feature that they could be relative to."""
        return 1.0

    def _total(self, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        gamma = self.settings.loss.focal_gamma
        options: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": label_smoothing}
        if gamma is None:
            return functional.cross_entropy(logits, labels, reduction="sum", **options)
        losses = functional.cross_entropy(logits, labels, reduction="none", **options)
        return (focal_factor(losses, gamma) * losses).sum()


class DenseModel(TaskModel):
    """Encoder and decoder. Features are its maps, from fine to coarse, after an empty tensor of the image's size.

    Args:
        backbone: of timm.
        head: the decoder.
        reader: of the maps.
        unused: names of the backbone's parameters that no map depends on.
    """

    pooled: ClassVar[bool] = False

    def __init__(self, backbone: nn.Module, head: DenseHead, reader: MapReader, unused: Sequence[str]) -> None:
        super().__init__(backbone, head)
        self._reader = reader
        self._unused = frozenset(unused)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) → an empty tensor (B, 0, H, W) and maps (B, C, h, w)."""
        return [images[:, :0], *self._reader(self.backbone, images)]

    def outputs(self, features: Sequence[Tensor], targets: Tensor | None = None) -> Tensor:
        """Features → logits (B, K, h, w)."""
        logits: Tensor = self.head(features)
        return logits

    @property
    def unused(self) -> frozenset[str]:
        return frozenset(f"backbone.{name}" for name in self._unused)


@dataclass(frozen=True)
class Reading:
    """How a decoder reads an encoder."""

    decoder: str
    maps: tuple[FeatureMap, ...]
    """From fine to coarse."""
    dilation: Dilation
    unused: tuple[str, ...]
    """Names of the encoder's parameters that no map depends on."""

    @property
    def reader(self) -> MapReader:
        # A plain transformer's tokens are meant to be normed; the maps of a pyramid's stages never are but the last.
        return MapReader(tuple(one.index for one in self.maps), norm=self.decoder == "linear")

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.decoder,
            "maps": [asdict(one) for one in self.maps],
            "dilation": {"strided": list(self.dilation.strided), "dilated": list(self.dilation.dilated)},
            "unused": list(self.unused),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Reading:
        """The reverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: the values are none of its.
        """
        if values["name"] not in DECODERS:
            raise ValueError(f"a decoder {values['name']!r}")
        maps = tuple(
            FeatureMap(*(int(one[name]) for name in ("index", "stride", "channels"))) for one in values["maps"]
        )
        dilation = values["dilation"]
        strided, dilated = (tuple(map(str, dilation[name])) for name in ("strided", "dilated"))
        return cls(values["name"], maps, Dilation(strided, dilated), tuple(map(str, values["unused"])))


def dense_model(network: nn.Module, reading: Reading, classes: int, seed: int) -> DenseModel:
    """An encoder under an untrained decoder, on the encoder's device.

    Args:
        network: of timm; it is dilated in place.
        reading: of its maps.
        classes: K.
        seed: of the decoder.

    Raises:
        ValueError: a layer of the encoder cannot be dilated.
    """
    reading.dilation.apply(network)
    head = new_head(reading.decoder, reading.maps, classes, seed).to(next(network.parameters()).device)
    if _is_channels_last(network):
        head = head.to(memory_format=torch.channels_last)
    return DenseModel(network, head, reading.reader, reading.unused)


_readings: dict[tuple[str, int, str | None], Reading] = {}


def _reading(backbone: Backbone, decoder: str | None) -> Reading:
    """`reading_of` a backbone, once per process."""
    side = backbone.data_config.image_size
    key = (backbone.digest, side, decoder)
    if key not in _readings:
        _readings[key] = reading_of(backbone.module, side, decoder)
    return _readings[key]


def reading_of(network: nn.Module, side: int, decoder: str | None = None) -> Reading:
    """How a decoder reads an encoder, from the encoder's structure alone.

    Args:
        network: of timm; it is left as it is.
        side: of the images, in pixels.
        decoder: one of `DECODERS`; None = a linear head for plain transformers, DeepLabv3+ where the last stage can be
            dilated, else a feature pyramid.

    Raises:
        ValueError: the encoder does not have the maps that the decoder reads.
    """
    structure = structure_of(network)
    maps = feature_maps(structure, side)
    if decoder is None:
        decoder = "deeplabv3plus" if is_pyramid(maps) else "linear"
        try:
            return reading_of(network, side, decoder)
        except ValueError:
            if decoder == "linear":
                raise
            return reading_of(network, side, "fpn")
    chosen = tuple(chosen_maps(decoder, maps))
    dilation = Dilation((), ())
    if decoder == "deeplabv3plus" and chosen[-1].stride > OUTPUT_STRIDE:
        dilation = planned_dilation(structure, [one.index for one in chosen])
    reading = Reading(decoder, chosen, dilation, ())
    return replace(reading, unused=tuple(unused_parameters(structure, reading.reader, side)))


def chosen_maps(decoder: str, maps: Sequence[FeatureMap]) -> list[FeatureMap]:
    """The maps that a decoder reads, from fine to coarse.

    Raises:
        ValueError: the encoder has no such maps.
    """
    if decoder == "linear":
        return [maps[-1]]
    by_stride = {one.stride: one for one in maps if one.stride > 1}
    strides = sorted(by_stride)
    if not is_pyramid(maps):
        raise ValueError(
            f"The decoder {decoder} needs an encoder with maps of several strides, but all of this one have stride "
            f"{maps[-1].stride}, as plain transformers do. Choose model.decoder: linear."
        )
    needed = {"deeplabv3plus": (4, strides[-1]), "fpn": PYRAMID}.get(decoder, tuple(strides))
    missing = [stride for stride in needed if stride not in by_stride]
    if missing or strides[-1] > PYRAMID[-1]:
        raise ValueError(
            f"The decoder {decoder} reads maps of the strides {', '.join(map(str, needed))}, up to {PYRAMID[-1]}, but "
            f"this encoder has {', '.join(map(str, strides))}. Choose another model.decoder or encoder."
        )
    return [by_stride[stride] for stride in needed]


def new_head(decoder: str, maps: Sequence[FeatureMap], classes: int, seed: int) -> DenseHead:
    """An untrained decoder on the CPU, drawn from `seed` alone; global generators are left as they were."""
    builders: dict[str, Callable[[], DenseHead]] = {
        "deeplabv3plus": lambda: DeepLabV3Plus(maps, classes),
        "unet": lambda: UNet(maps, classes),
        "fpn": lambda: FeaturePyramid(maps, classes),
        "linear": lambda: LinearHead(maps[-1].channels, classes),
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return builders[decoder]()


def scaled(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, K, h, w) bilinearly to (B, K, *size)."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 − the mean soft Dice coefficient (Milletari et al., 2016) over the classes that the batch's pixels have.

    Of a batch without labelled pixels 0, with gradient 0. Over the batch as a whole: where memory forces micro-batches,
    over each of them.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64.
    """
    labelled = (labels != IGNORED).unsqueeze(1)
    classes = logits.shape[1]
    truth = functional.one_hot(labels.masked_fill(labels == IGNORED, 0), classes).movedim(-1, 1) * labelled
    probability = logits.softmax(1) * labelled
    pixels = truth.sum((0, 2, 3))
    overlap = (probability * truth).sum((0, 2, 3))
    coefficients = 2 * overlap / (probability.sum((0, 2, 3)) + pixels).clamp(min=1)
    present = pixels > 0
    return ((1 - coefficients) * present).sum() / present.sum().clamp(min=1)


def _is_channels_last(network: nn.Module) -> bool:
    """Whether weights of convolutions lie channel by channel within a pixel."""
    kernels = [p for p in network.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[-1] > 1]
    return bool(kernels) and all(
        k.is_contiguous(memory_format=torch.channels_last) and not k.is_contiguous() for k in kernels
    )


TASK = Segmentation
