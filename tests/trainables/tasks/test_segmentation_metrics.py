"""Scores of segmentation: counts over a whole set, on the masks' own pixels, whatever the batches and views."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.classification import MulticlassJaccardIndex

from trainables.data.mask_views import Box, MaskView, MaskViews
from trainables.data.store import IGNORED
from trainables.tasks.segmentation_metrics import (
    SegmentationScores,
    TrainingOverlap,
    confusion_counts,
    confusion_table,
    intersection_and_union,
    iou_table,
    logits_of_region,
    mean_iou,
    mean_of,
)

CLASSES = 5


def filled(*boxes: tuple[int, int, int, int, int]) -> Tensor:
    """(32, 32) uint8, 0 but for boxes of (left, top, right, bottom, value)."""
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    for left, top, right, bottom, value in boxes:
        mask[top:bottom, left:right] = value
    return mask


M08 = [
    (filled((0, 0, 16, 32, 1)), filled((0, 0, 12, 32, 1))),
    (filled((0, 0, 32, 8, 2), (0, 8, 32, 9, IGNORED)), filled((0, 0, 32, 9, 2), (0, 9, 4, 32, 3))),
    (filled((0, 0, 32, 32, IGNORED)), filled((0, 0, 32, 32, 4))),
    (filled(), filled()),
]
"""Truth and prediction of four pictures; one is void altogether, class 3 is only predicted, class 4 only on void."""


def whole(mask: Tensor, sample: int = 0) -> MaskView:
    """A view that shows a picture at its own size."""
    box = Box(0, 0, *mask.shape)
    return MaskView(sample, box, box, mask, True, mask.shape[0])


def one_hot(prediction: Tensor) -> Tensor:
    """Logits (K, H, W) whose largest is the prediction's."""
    return functional.one_hot(prediction.long(), CLASSES).permute(2, 0, 1).float()


def scores_of(pictures: Sequence[tuple[Tensor, Tensor]], batch: int = 4) -> SegmentationScores:
    scores = SegmentationScores(CLASSES)
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        logits = torch.stack([one_hot(prediction) for _, prediction in part])
        scores.update(logits, MaskViews([whole(truth, start + row) for row, (truth, _) in enumerate(part)]))
    return scores


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_m08_counts_are_summed_over_the_set_whatever_the_batches(batch: int) -> None:
    scores = scores_of(M08, batch)
    values = scores.compute()
    assert values["miou"] == pytest.approx(0.664583, abs=1e-6)
    assert values["miou_classes"] == 4
    assert values["pixel_acc"] == 2820 / 3040
    intersection, union = intersection_and_union(scores.confusion())
    assert intersection.tolist() == [2180, 384, 256, 0, 0]
    assert union.tolist() == [2400, 512, 256, 92, 0]


def test_m08_of_parts_of_the_set() -> None:
    assert scores_of(M08[:3]).compute()["miou"] == pytest.approx(0.647529, abs=1e-6)
    alone = scores_of(M08[3:]).compute()
    assert (alone["miou"], alone["miou_classes"]) == (1.0, 1.0)
    void = scores_of(M08[2:3]).compute()
    assert math.isnan(void["miou"])
    assert math.isnan(void["pixel_acc"])
    assert math.isnan(void["nll"])
    assert void["miou_classes"] == 0


def test_m08_statistics_of_each_picture_sum_to_the_set() -> None:
    samples = scores_of(M08, batch=3).per_sample()
    assert samples["intersection"].shape == samples["union"].shape == (4, CLASSES)
    assert samples["union"].dtype == torch.int64
    assert samples["union"][2].tolist() == [0] * CLASSES
    assert mean_of(samples["intersection"].sum(0), samples["union"].sum(0)) == pytest.approx(0.664583, abs=1e-6)


def test_m08_tables_have_no_value_for_an_absent_class() -> None:
    names = ["ground", "a", "b", "c", "d"]
    confusion = scores_of(M08).confusion()
    table = iou_table({"test": confusion}, names).columns
    assert table["iou"] == [2180 / 2400, 384 / 512, 1.0, 0.0, None]
    assert table["pixels"] == [2272.0, 512.0, 256.0, 0.0, 0.0]
    assert table["predicted"] == [2308.0, 384.0, 256.0, 92.0, 0.0]
    cells = confusion_table({"test": confusion}, names).columns
    rows = list(zip(cells["label"], cells["prediction"], cells["pixels"], strict=True))
    assert ("ground", "c", 92.0) in rows
    assert ("a", "ground", 128.0) in rows
    assert sum(count for *_, count in rows) == 3040


def looped_mean_iou(truths: Tensor, predictions: Tensor, classes: int) -> float:
    """By a plain loop."""
    quotients = []
    for k in range(classes):
        both = either = 0
        for truth, prediction in zip(truths.flatten().tolist(), predictions.flatten().tolist(), strict=True):
            if truth == IGNORED:
                continue
            both += truth == k and prediction == k
            either += truth == k or prediction == k
        if either:
            quotients.append(both / either)
    return sum(quotients) / len(quotients)


@pytest.mark.parametrize(("present", "predicted"), [(6, 6), (4, 4), (3, 5), (5, 2)])
def test_it_is_that_of_a_loop_and_of_torchmetrics(present: int, predicted: int) -> None:
    """Of six classes; where both have four, two are absent from both."""
    generator = torch.Generator().manual_seed(present)
    truths = torch.randint(0, present, (3, 20, 20), generator=generator).to(torch.uint8)
    truths[torch.rand(truths.shape, generator=generator) < 0.2] = IGNORED
    predictions = torch.randint(0, predicted, truths.shape, generator=generator)
    ours = mean_iou(confusion_counts(predictions, truths, 6))
    assert ours == pytest.approx(looped_mean_iou(truths, predictions, 6), abs=1e-12)
    theirs = MulticlassJaccardIndex(6, average="macro", ignore_index=IGNORED)(predictions, truths.long())
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_a_constant_prediction_by_hand() -> None:
    truth = filled((0, 0, 8, 32, 1))
    constant = torch.zeros_like(truth)
    assert mean_iou(confusion_counts(constant, truth, CLASSES)) == (768 / 1024 + 0) / 2


def test_likelihood_is_per_labelled_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 32, 32, generator=generator)
    masks = [M08[1][0], M08[2][0]]  # the second is void
    scores = SegmentationScores(CLASSES)
    scores.update(logits, MaskViews([whole(mask, row) for row, mask in enumerate(masks)]))
    expected = functional.cross_entropy(logits[:1].double(), masks[0][None].long(), ignore_index=IGNORED)
    assert scores.compute(["nll"]) == {"nll": pytest.approx(float(expected), rel=1e-5)}


@pytest.mark.parametrize("side", [8, 11, 32])
def test_logits_of_a_whole_view_are_scaled_as_by_interpolate(side: int) -> None:
    logits = torch.randn(3, side, side, generator=torch.Generator().manual_seed(1))
    view = MaskView(0, Box(0, 0, 32, 32), Box(0, 0, 45, 50), torch.zeros(45, 50, dtype=torch.uint8), True, 32)
    scaled = logits_of_region(logits, view)
    expected = functional.interpolate(logits[None], size=(45, 50), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(scaled, expected, atol=1e-5)


def test_padding_of_a_view_is_left_out() -> None:
    """A gradient over the view: the part that shows the picture keeps its values, whatever the logits' stride."""
    rows = torch.arange(16, dtype=torch.float32) * 4 + 1.5  # of stride 4, at the pixels' centres
    logits = rows.expand(1, 16, 16).transpose(1, 2).contiguous()
    view = MaskView(0, Box(0, 0, 40, 24), Box(0, 0, 40, 24), torch.zeros(40, 24, dtype=torch.uint8), True, 64)
    shown = logits_of_region(logits, view)
    assert shown.shape == (1, 40, 24)
    # Beyond the outermost centres there is nothing to interpolate between.
    assert torch.allclose(shown[0, 2:, 0], torch.arange(2.0, 40.0))
    assert torch.equal(shown[0, :, 0], shown[0, :, 23])


def test_overlapping_views_are_averaged() -> None:
    mask = torch.zeros(4, 6, dtype=torch.uint8)
    mask[:, 3:] = 1
    first = MaskView(0, Box(0, 0, 4, 4), Box(0, 0, 4, 4), mask, False, 4)
    second = MaskView(0, Box(0, 0, 4, 4), Box(0, 2, 4, 4), mask, True, 4)
    # In columns 2 and 3, which both show, the first says 0 by 1 and the second says 1 by 3: the mean says 1.
    logits = torch.zeros(2, 2, 4, 4)
    logits[0, 0] = 1
    logits[1, 1] = 3
    together = SegmentationScores(2)
    together.update(logits, MaskViews([first, second]))
    assert together.confusion().tolist() == [[8, 4], [0, 12]]
    mean = torch.zeros(2, 4, 6)
    mean[0, :, :2], mean[0, :, 2:4] = 1, 0.5
    mean[1, :, 2:4], mean[1, :, 4:] = 1.5, 3
    expected = functional.cross_entropy(mean[None], mask[None].long())
    assert together.compute(["nll"])["nll"] == pytest.approx(float(expected), rel=1e-6)
    apart = SegmentationScores(2)
    apart.update(logits[:1], MaskViews([first]))
    apart.update(logits[1:], MaskViews([second]))
    assert apart.compute() == together.compute()


def test_a_set_that_ends_within_a_picture_is_an_error() -> None:
    scores = scores_of(M08[:1])
    mask = M08[0][0]
    view = MaskView(1, Box(0, 0, 32, 16), Box(0, 0, 32, 16), mask, False, 32)
    scores.update(torch.zeros(1, CLASSES, 8, 8), MaskViews([view]))
    with pytest.raises(ValueError, match="The last view of a picture completes it, but one is incomplete"):
        scores.compute()


def test_no_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample, but got none"):
        SegmentationScores(CLASSES).compute()


def test_training_counts_labels_at_the_centres_of_the_logits() -> None:
    targets = torch.zeros(1, 12, 12, dtype=torch.uint8)
    targets[:, :, 4:8] = 1
    targets[:, :4] = IGNORED
    logits = torch.zeros(1, 2, 3, 3)
    logits[:, 1, :, 1:] = 1
    overlap = TrainingOverlap(2)
    overlap.update(logits, targets)
    assert overlap.compute() == {"miou": 0.5, "pixel_acc": pytest.approx(4 / 6)}
    again = TrainingOverlap(2)
    again.load_state(overlap.state(), torch.device("cpu"))
    again.merge(overlap)
    assert again.compute() == overlap.compute()
