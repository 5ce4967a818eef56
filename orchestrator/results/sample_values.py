"""Per-sample values of a split whose mean is a metric of the split.

Accuracy is a mean over samples; macro-F1, AUROC, average precision and the calibration error are not. Of those, the
value of sample i is the metric plus its influence, y[i] = θ + n·∂θ/∂w[i], where w[i] = 1 is the weight of the sample in
the metric: the infinitesimal jackknife (Jaeckel, 1972; Efron, 1982, "The Jackknife, the Bootstrap and Other Resampling
Plans", chapter 6). The metrics do not change when all weights are scaled, so that the influences add up to 0 and the
mean of y is θ itself. The variance of that mean is the one to which the bootstrap over samples converges; of AUROC it
is that of DeLong, DeLong and Clarke-Pearson (1988), of macro-F1 the delta method's.

Definitions are those of `trainables.tasks.classification_metrics` and, of what is counted in pixels, of
`trainables.tasks.segmentation_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from trainables.specs.metrics import (
    AUROC,
    AVERAGE_PRECISION,
    BRIER,
    ECE,
    ECE_SCALED,
    MACRO_F1,
    MEAN_IOU,
    PIXEL_ACCURACY,
    TOP5,
)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

Ends = Literal["share", "bounded", "symmetric"]
"""Interval of a metric: of a mean of values of 0 or 1, of another metric in [0, 1], or symmetric."""

BINS = 15
"""Bins of confidence of the recorded calibration error, and of reliability diagrams."""
TOP_K = 5


@dataclass(frozen=True)
class SplitOutputs:
    """Predictions of one run on one split."""

    logits: NDArray[Any]
    """(n, K)"""
    targets: Integers
    """(n,)"""
    temperature: float | None = None
    """Of the run; None = none was fitted."""


@dataclass(frozen=True)
class SampleFunction:
    """How the values of one metric are computed from predictions."""

    values: Callable[[SplitOutputs], Floats | None]
    """(n,) whose mean is the metric; None where the metric does not apply."""
    every_class: bool = False
    """Whether the metric is a mean over classes, so that each of them needs two samples."""
    mean: bool = False
    """Whether the metric is a plain mean over samples."""
    ends: Ends = "bounded"


def macro_f1(outputs: SplitOutputs) -> Floats:
    """F1 of a class is 2·TP / E, with E its images and its predictions."""
    classes = outputs.logits.shape[1]
    predicted = outputs.logits.argmax(1)
    targets = outputs.targets
    right = predicted == targets
    either = np.bincount(targets, minlength=classes) + np.bincount(predicted, minlength=classes)
    hits = np.bincount(targets[right], minlength=classes)
    present = either > 0
    scores = np.divide(2.0 * hits, either, out=np.zeros(classes), where=present)
    slope = np.divide(1.0, either, out=np.zeros(classes), where=present)
    # Of the class of the label and of the predicted one; where both are one class, it counts twice in E.
    change = 2.0 * right * slope[targets] - (scores * slope)[targets] - (scores * slope)[predicted]
    return np.asarray(scores[present].mean() + len(targets) / present.sum() * change)


def auroc(outputs: SplitOutputs) -> Floats | None:
    """Placement values of each class against the others (DeLong et al., 1988, eq. 4), mean over the classes."""
    return _one_against_rest(outputs, _auroc_of_class)


def average_precision(outputs: SplitOutputs) -> Floats | None:
    """Average precision of each class against the others, mean over the classes."""
    return _one_against_rest(outputs, _average_precision_of_class)


def calibration_error(outputs: SplitOutputs) -> Floats | None:
    """Confidence less correctness, with the sign that its bin's sum has."""
    return _calibration(outputs, outputs.logits.astype(np.float32))


def scaled_calibration_error(outputs: SplitOutputs) -> Floats | None:
    """The same with logits divided by the run's temperature, which counts as fixed."""
    if outputs.temperature is None:
        return None
    return _calibration(outputs, (outputs.logits.astype(np.float64) / outputs.temperature).astype(np.float32))


def brier_score(outputs: SplitOutputs) -> Floats:
    """Squared distance of the probabilities from the label's."""
    logits = outputs.logits.astype(np.float64)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    errors = shares / shares.sum(1, keepdims=True)
    errors[np.arange(len(errors)), outputs.targets] -= 1
    return np.asarray(np.square(errors).sum(1))


def top_k(outputs: SplitOutputs) -> Floats | None:
    """Whether fewer than five classes have a higher logit than the label; None for five or fewer classes."""
    if outputs.logits.shape[1] <= TOP_K:
        return None
    own = np.take_along_axis(outputs.logits, outputs.targets[:, None], axis=1)
    return np.asarray((outputs.logits > own).sum(1) < TOP_K, np.float64)


SAMPLE_FUNCTIONS = {
    MACRO_F1.key: SampleFunction(macro_f1, every_class=True),
    AUROC.key: SampleFunction(auroc, every_class=True),
    AVERAGE_PRECISION.key: SampleFunction(average_precision, every_class=True),
    ECE.key: SampleFunction(calibration_error),
    ECE_SCALED.key: SampleFunction(scaled_calibration_error),
    BRIER.key: SampleFunction(brier_score, mean=True, ends="symmetric"),
    TOP5.key: SampleFunction(top_k, mean=True, ends="share"),
}
"""Metric key → its values; of metrics that are no statistic of a sample which a trial keeps."""


@dataclass(frozen=True)
class PixelCounts:
    """Counts of labelled pixels in the n pictures of a split, by class."""

    intersection: Integers
    """(n, K) pixels whose label and prediction are the class."""
    union: Integers
    """(n, K) pixels whose label or prediction is the class."""


def mean_iou(counts: PixelCounts) -> Floats | None:
    """IoU of a class is I / U, summed over the pictures.

    None where a class of the mean is in a single picture: nothing shows how much that varies.
    """
    pictures = (counts.union > 0).sum(0)
    present = pictures > 0
    if not present.any() or pictures[present].min() < 2:
        return None
    union = counts.union[:, present].astype(np.float64)
    scores = counts.intersection[:, present].sum(0) / union.sum(0)
    change = (counts.intersection[:, present] - scores * union) / union.sum(0)
    return np.asarray(scores.mean() + len(union) * change.mean(1))


def pixel_accuracy(counts: PixelCounts) -> Floats | None:
    """Right pixels over labelled ones, summed over the pictures; None without labelled pixels."""
    right = counts.intersection.sum(1)
    # A wrong pixel is in the union of two classes, a right one in that of one.
    labelled = (counts.union.sum(1) + right) / 2
    if labelled.sum() == 0:
        return None
    share = right.sum() / labelled.sum()
    return np.asarray(share + len(right) * (right - share * labelled) / labelled.sum())


PIXEL_FUNCTIONS: dict[str, Callable[[PixelCounts], Floats | None]] = {
    MEAN_IOU.key: mean_iou,
    PIXEL_ACCURACY.key: pixel_accuracy,
}
"""Metric key → its values, by picture."""


def _one_against_rest(outputs: SplitOutputs, of_class: Callable[[Floats, NDArray[np.bool_]], Floats]) -> Floats | None:
    """Mean of a binary metric's values over the classes that are labels; None for a single class."""
    present = np.unique(outputs.targets)
    if len(present) < 2 or not np.isfinite(outputs.logits).all():
        return None
    scores = log_odds(outputs.logits.astype(np.float64))
    total = np.zeros(len(outputs.targets))
    for label in present:
        total += of_class(scores[:, label], outputs.targets == label)
    return total / len(present)


def _auroc_of_class(scores: Floats, positive: NDArray[np.bool_]) -> Floats:
    positives = int(positive.sum())
    negatives = len(positive) - positives
    ranks = rankdata(scores)
    # Number of images of the other kind with a lower score; of equal scores one half.
    placement = np.empty(len(scores))
    placement[positive] = (ranks[positive] - rankdata(scores[positive])) / negatives
    placement[~positive] = 1 - (ranks[~positive] - rankdata(scores[~positive])) / positives
    area = placement[positive].mean()
    size = np.where(positive, positives, negatives)
    return np.asarray(area + len(scores) * (placement - area) / size)


def _average_precision_of_class(scores: Floats, positive: NDArray[np.bool_]) -> Floats:
    """AP is the mean over positive images of the precision P at their score.

    The weight of image j changes the class's own term by P[j] − AP, and the precision at every score up to its own.
    """
    positives = int(positive.sum())
    # Thresholds are the distinct scores, ascending.
    _, at, count = np.unique(scores, return_inverse=True, return_counts=True)
    hits = np.bincount(at, weights=positive, minlength=len(count))
    above = np.cumsum(count[::-1])[::-1]
    precision = np.cumsum(hits[::-1])[::-1] / above
    average = float((hits * precision).sum() / positives)
    # Sums over the positive images of a score up to that of the image.
    gained = np.cumsum(hits / above)[at]
    lost = np.cumsum(hits * precision / above)[at]
    change = np.where(positive, precision[at] - average + gained, 0.0) - lost
    return np.asarray(average + len(scores) / positives * change)


def log_odds(logits: Floats) -> Floats:
    """log p_k − log(1 − p_k) of every class (n, K), exact where a probability would round to 1."""
    rows = np.arange(len(logits))
    top = logits.argmax(1)
    highest = logits[rows, top]
    shares = np.exp(logits - highest[:, None])
    rest = shares.sum(1, keepdims=True) - shares
    others = shares.copy()
    others[rows, top] = 0.0
    with np.errstate(divide="ignore"):
        odds = logits - highest[:, None] - np.log(rest)
        # For the top class the difference would cancel, so that its rest is summed without it. Other logits may be so
        # far below it that their shares are 0: they are scaled by the second highest.
        without_top = logits.copy()
        without_top[rows, top] = -np.inf
        second = without_top.max(1)
        rest_of_top = second + np.log(np.exp(without_top - second[:, None]).sum(1))
    odds[rows, top] = highest - rest_of_top
    return np.asarray(odds)


def _calibration(outputs: SplitOutputs, logits: NDArray[np.float32]) -> Floats | None:
    """(n,) signed gaps of the top class over equal bins, closed below, with a bin of its own for a confidence of 1.

    Confidences are float32, as those of the recorded error: near 1 they round to it, into another bin.
    """
    if not np.isfinite(logits).all():
        return None
    shares = np.exp(logits - logits.max(1, keepdims=True))
    confidence = 1 / shares.sum(1, dtype=np.float32)
    gap = confidence.astype(np.float64) - (logits.argmax(1) == outputs.targets)
    bins = np.digitize(confidence, np.linspace(0, 1, BINS + 1, dtype=np.float32)) - 1
    sign = np.sign(np.bincount(bins, weights=gap, minlength=BINS + 1))
    return np.asarray(sign[bins] * gap)
