"""The part of `luthier export` that differs for segmentation: comparison with the record, and what a folder holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.export.errors import ExportError
from orchestrator.export.segmentation_export import TunedSegmenter
from orchestrator.results.kept_model import preprocessing_of, views_of
from orchestrator.wording import counted
from trainables.data.masked_pictures import PictureViews
from trainables.data.store import IGNORED
from trainables.specs.metrics import MEAN_IOU_CLASSES, TEST
from trainables.specs.trial_spec import ModelSpec
from trainables.tasks.segmentation import DenseModel, reading_of
from trainables.tasks.segmentation_metrics import SegmentationScores, intersection_and_union, mean_iou

if TYPE_CHECKING:
    from orchestrator.export.card import CardFacts
    from orchestrator.record.records import TrialRecord
    from trainables.data.mask_views import MaskViews
    from trainables.data.store import Store
    from trainables.models.backbone import Backbone
    from trainables.specs.metrics import TaskMetrics
    from trainables.storage.kept_weights import KeptWeights

BATCH = 16
"""Views per forward pass."""
RECORD_TOLERANCE = 0.01
"""Permitted difference from the recorded mean IoU: trials on a GPU compute in bfloat16, this comparison in float32. On
the CPU there is none."""


def tuned_segmenter(
    network: DenseModel,
    kept: KeptWeights,
    pretrained: Backbone,
    store: Store,
    facts: CardFacts,
    proof: Sequence[str],
) -> TunedSegmenter:
    """A trial's network with all that an exported folder says about it."""
    side = pretrained.data_config.image_size
    return TunedSegmenter(
        network=network,
        spec=ModelSpec(**kept.meta["model"]),
        reading=reading_of(pretrained.module, side, kept.meta.get("decoder")),
        preprocessing=preprocessing_of(kept),
        evaluation=views_of(kept),
        classes=list(kept.meta["classes"]),
        training_values=training_values(store),
        facts=facts,
        pictures=len(store.labels(TEST)),
        views=lambda: (images for images, _ in _test_views(kept, store)),
        proof=proof,
    )


@torch.no_grad()
def compare_with_recorded_masks(
    network: DenseModel, kept: KeptWeights, store: Store, record: TrialRecord, metrics: TaskMetrics
) -> str:
    """Compare the network's mean IoU on the test split with the record.

    Returns the comparison in a sentence.

    Raises:
        ExportError: they differ.
    """
    scores = SegmentationScores(len(store.classes))
    for images, views in _test_views(kept, store):
        scores.update(network(images), views)
    confusion = scores.confusion()
    value = mean_iou(confusion)
    _, union = intersection_and_union(confusion)
    classes = counted(int((union > 0).sum()), "class", "classes")
    pictures = counted(len(store.labels(TEST)), "test picture")
    recorded = record.metric(metrics.test)
    if recorded is None:
        return f"The tested network has a mean IoU of {value:.6f} of {classes} on {pictures}; the record has none."
    if not abs(value - recorded) <= RECORD_TOLERANCE:
        raise ExportError(
            f"A trial's weights must give the recorded {metrics.test} of {recorded:.6f}, but theirs is {value:.6f}. "
            "Nothing was written."
        )
    return (
        f"The tested network has a mean IoU of {value:.6f} of {classes} on {pictures}; the record's {metrics.test} is "
        f"{recorded:.6f}."
    )


def training_values(store: Store) -> list[list[int | str]]:
    """Of each class, the values that it had in the masks: integers, or colours as `#rrggbb`."""
    values: list[list[int | str]] = [[] for _ in store.classes]
    translation: dict[str, Any] = store.manifest.get("translation") or {}
    for raw, index in translation.get("integers", ()):
        if index != IGNORED:
            values[index].append(int(raw))
    for raw, index in translation.get("colours", ()):
        if index != IGNORED:
            values[index].append(f"#{int(raw):06x}")
    return values


def classes_behind(record: TrialRecord, split: str) -> str:
    """The number of classes that a recorded mean IoU is over, as the end of a sentence; empty = not on record."""
    count = record.metric(MEAN_IOU_CLASSES.on(split))
    return "" if count is None else f" of {counted(round(count), 'class', 'classes')}"


def training_pixels(store: Store, splits: Sequence[str]) -> dict[str, int]:
    """Class → labelled pixels in splits."""
    totals = np.zeros(len(store.classes), np.int64)
    for split in splits:
        for counts in store.pixels.get(split, {}).values():
            totals += np.asarray(counts["classes"], np.int64)
    return dict(zip(store.classes, totals.tolist(), strict=True))


def _test_views(kept: KeptWeights, store: Store) -> Iterator[tuple[Tensor, MaskViews]]:
    """Views of the test pictures as the trial's evaluation had them."""
    views = PictureViews(preprocessing_of(kept), views_of(kept), torch.device("cpu"))
    # `torch.tensor` copies: the store's memory is read-only.
    pairs = zip(map(torch.tensor, store.pictures(TEST)), map(torch.tensor, store.masks(TEST)), strict=True)
    return views.batches(pairs, BATCH)
