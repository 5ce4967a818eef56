"""Metrics of segmentation, from integer counts of labelled pixels over a whole split."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from trainables.data.mask_views import MaskView, MaskViews
from trainables.data.store import IGNORED
from trainables.specs.measurements import Curve
from trainables.specs.metrics import MEAN_IOU, MEAN_IOU_CLASSES, PIXEL_ACCURACY, PIXEL_NLL
from trainables.tasks.classification_tables import confusion_rows

Columns = dict[str, list[float | str | None]]


def mean_iou(confusion: Tensor) -> float:
    """Mean intersection over union of the classes that truth or prediction have; NaN where there are none.

    Args:
        confusion: (K, K) counts of labelled pixels, truth by prediction.

    Example:
        >>> mean_iou(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
        0.775
    """
    return mean_of(*intersection_and_union(confusion))


def mean_of(intersection: Tensor, union: Tensor) -> float:
    """Mean of the quotients (K,) of the classes whose union is not empty; NaN where all are."""
    present = union > 0
    if not bool(present.any()):
        return math.nan
    return float((intersection[present].double() / union[present].double()).mean())


def intersection_and_union(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Of each class (K,) int64."""
    intersection = confusion.diagonal()
    return intersection, confusion.sum(0) + confusion.sum(1) - intersection


def confusion_counts(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (K, K) int64 of pixels, truth by prediction; ignored ones are left out.

    Args:
        predicted: classes, of any shape.
        labels: of the same shape, any integer type.
        classes: K.
    """
    flat = labels.flatten()
    # One cell more for ignored pixels: to select the others would make the host wait for a GPU.
    cells = torch.where(flat == IGNORED, classes * classes, flat.long() * classes + predicted.flatten())
    counts = torch.zeros(classes * classes + 1, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(0, cells, torch.ones_like(cells))
    return counts[:-1].reshape(classes, classes)


def values_of(confusion: Tensor) -> dict[str, float]:
    """Metrics of a confusion matrix, by key; NaN where no pixel is labelled."""
    _, union = intersection_and_union(confusion)
    pixels = int(confusion.sum())
    return {
        MEAN_IOU.key: mean_iou(confusion),
        MEAN_IOU_CLASSES.key: float((union > 0).sum()),
        PIXEL_ACCURACY.key: int(confusion.diagonal().sum()) / pixels if pixels else math.nan,
    }


class TrainingOverlap:
    """Confusion of training batches.

    At the resolution of the logits, with the label of the pixel at each one's centre: logits scaled once more for the
    metric alone would cost as much as the loss.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        labels = functional.interpolate(targets[:, None].float(), size=outputs.shape[-2:], mode="nearest-exact")
        counts = confusion_counts(outputs.detach().argmax(1), labels[:, 0].to(torch.uint8), self._classes)
        self._confusion = self._confusion.to(counts.device) + counts

    def merge(self, other: TrainingOverlap) -> None:
        self._confusion = self._confusion.to(other._confusion.device) + other._confusion

    def compute(self) -> dict[str, float]:
        values = values_of(self._confusion.cpu())
        return {metric.key: values[metric.key] for metric in (MEAN_IOU, PIXEL_ACCURACY)}

    def state(self) -> dict[str, Tensor]:
        return {"confusion": self._confusion}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        self._confusion = state["confusion"].to(device, copy=True)


class Stitching:
    """Logits of whole pictures, from those of their views.

    Logits of overlapping views are averaged. Views of a picture come one after another.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        """Logits (K, H, W) of the picture under way, summed over its views."""
        self._views: Tensor | None = None
        """(H, W), number of views that show each of its pixels."""

    @property
    def under_way(self) -> bool:
        """Whether the last view of a picture is outstanding."""
        return self._sum is not None

    def pictures(self, outputs: Tensor, targets: MaskViews) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (K, H, W) float32 and mask (H, W) of every picture that views of a batch complete, in their order.

        Args:
            outputs: logits (B, K, h, w) of the whole views.
            targets: what they show.
        """
        for row in range(len(targets)):
            view = targets[row]
            logits = logits_of_region(outputs[row].float(), view)
            if view.completes and self._sum is None and tuple(view.mask.shape) == tuple(logits.shape[1:]):
                yield logits, view.mask
                continue
            self._add(logits, view)
            if view.completes:
                yield self._mean(), view.mask

    def _add(self, logits: Tensor, view: MaskView) -> None:
        if self._sum is None or self._views is None:
            self._sum = logits.new_zeros(len(logits), *view.mask.shape)
            self._views = logits.new_zeros(view.mask.shape)
        self._sum[:, view.region.rows, view.region.columns] += logits
        self._views[view.region.rows, view.region.columns] += 1

    def _mean(self) -> Tensor:
        assert self._sum is not None
        assert self._views is not None
        mean = self._sum / self._views
        self._sum = None
        self._views = None
        return mean


class SegmentationScores:
    """Confusion and likelihood of a split, on the masks' own pixels.

    Logits of overlapping views of a picture are averaged before the class is chosen, see `Stitching`.

    Args:
        classes: K.
        keeps_masks: whether `per_sample` has the predicted masks, too.
    """

    def __init__(self, classes: int, keeps_masks: bool = False) -> None:
        self._classes = classes
        self._masks: list[bytes] | None = [] if keeps_masks else None
        """Predicted classes of each picture, as PNG."""
        self._confusion: Tensor | int = 0
        self._nll: Tensor | float = 0.0
        """Summed over labelled pixels, float64."""
        self._overlaps: list[Tensor] = []
        """(2, K) int64 of each picture: intersection and union."""
        self._stitching = Stitching()

    def update(self, outputs: Tensor, targets: MaskViews) -> None:
        """Take in views.

        Args:
            outputs: logits (B, K, h, w) of the whole views.
            targets: what they show.
        """
        for logits, mask in self._stitching.pictures(outputs, targets):
            self._count(logits, mask)

    def compute(self, keys: Collection[str] | None = None, calibration: Any = None) -> dict[str, float]:
        confusion = self.confusion()
        pixels = int(confusion.sum())
        values = {**values_of(confusion), PIXEL_NLL.key: float(self._nll) / pixels if pixels else math.nan}
        return values if keys is None else {key: values[key] for key in keys}

    def per_sample(self) -> dict[str, Tensor | list[bytes]]:
        """Intersection and union (N, K) int64 of every picture's labelled pixels.

        With the predicted mask of each as PNG, `prediction`, where they are kept.
        """
        self._check()
        overlaps = torch.stack(self._overlaps).cpu()
        counts: dict[str, Tensor | list[bytes]] = {"intersection": overlaps[:, 0], "union": overlaps[:, 1]}
        return counts if self._masks is None else {**counts, "prediction": self._masks}

    def confusion(self) -> Tensor:
        """Counts (K, K) int64 on the CPU, truth by prediction."""
        self._check()
        assert isinstance(self._confusion, Tensor)
        return self._confusion.cpu()

    def _check(self) -> None:
        if not self._overlaps:
            raise ValueError("Metrics need at least one sample, but got none.")
        if self._stitching.under_way:
            raise ValueError("The last view of a picture completes it, but one is incomplete.")

    def _count(self, logits: Tensor, mask: Tensor) -> None:
        """Count a whole picture: logits (K, H, W), mask (H, W)."""
        predicted = logits.argmax(0)
        counts = confusion_counts(predicted, mask, self._classes)
        if self._masks is not None:
            self._masks.append(encoded_mask(predicted.to(torch.uint8).cpu().numpy()))
        self._confusion = self._confusion + counts
        self._overlaps.append(torch.stack(intersection_and_union(counts)))
        losses = functional.cross_entropy(logits[None], mask[None].long(), ignore_index=IGNORED, reduction="none")
        self._nll = self._nll + losses.double().sum()


def encoded_mask(mask: NDArray[np.uint8]) -> bytes:
    """A mask (H, W) as PNG."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def logits_of_region(logits: Tensor, view: MaskView) -> Tensor:
    """Logits (K, h, w) of a view → (K, H, W) of the part of the picture that it shows, bilinearly.

    In one step from the logits' grid to the picture's, pixel centres on pixel centres (`align_corners=False`), whatever
    the decoder's stride and the picture's scale.
    """
    rows = _positions(view.shown.top, view.shown.height, view.region.height, view.side, logits.shape[1])
    columns = _positions(view.shown.left, view.shown.width, view.region.width, view.side, logits.shape[2])
    return _interpolated(_interpolated(logits, rows, 1), columns, 2)


def _positions(start: int, length: int, count: int, side: int, size: int) -> list[float]:
    """Places, on the grid of `size` logits, of `count` picture pixels that `length` pixels of the view from `start`
    show."""
    places = ((start + (number + 0.5) * length / count) * size / side - 0.5 for number in range(count))
    return [min(max(place, 0.0), size - 1.0) for place in places]


def _interpolated(values: Tensor, places: Sequence[float], dim: int) -> Tensor:
    """Values at fractional places along a dimension."""
    last = values.shape[dim] - 1
    lower = [min(int(place), last) for place in places]
    indices = torch.tensor([lower, [min(index + 1, last) for index in lower]], device=values.device)
    weights = values.new_tensor([place - index for place, index in zip(places, lower, strict=True)])
    shape = [1, 1, 1]
    shape[dim] = len(places)
    below = values.index_select(dim, indices[0])
    above = values.index_select(dim, indices[1])
    return torch.lerp(below, above, weights.reshape(shape))


def iou_table(splits: Mapping[str, Tensor], classes: Sequence[str]) -> Curve:
    """Intersection over union of every class on every split.

    It is missing where neither truth nor prediction has the class.

    Args:
        splits: split → confusion (K, K).
        classes: names.
    """
    columns: Columns = {name: [] for name in ("class", "split", "pixels", "predicted", "iou")}
    for split, confusion in splits.items():
        intersection, union = intersection_and_union(confusion)
        rows = zip(classes, confusion.sum(1), confusion.sum(0), intersection, union, strict=True)
        for name, truth, predicted, shared, either in rows:
            columns["class"].append(name)
            columns["split"].append(split)
            columns["pixels"].append(float(truth))
            columns["predicted"].append(float(predicted))
            columns["iou"].append(float(shared) / float(either) if either else None)
    return Curve(columns, "Intersection over union of each class, in labelled pixels.")


def confusion_table(splits: Mapping[str, Tensor], classes: Sequence[str]) -> Curve:
    """Confusion matrices as rows (label, prediction, pixels), see `confusion_rows`.

    Args:
        splits: split → confusion (K, K).
        classes: names.
    """
    return confusion_rows(splits, classes, "pixels", "Labelled pixels")
