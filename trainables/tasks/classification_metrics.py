"""Measures of one split's predictions.

Accuracies, likelihood, ranking and calibration, and the same class by class. torchmetrics computes what it defines in
the same way. Macro means are taken here, over the classes that the images have: a domain may lack classes, which
torchmetrics would count as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainables.specs.metrics import (
    ACCURACY,
    AUROC,
    AVERAGE_PRECISION,
    BALANCED_ACCURACY,
    BRIER,
    CLASSIFICATION,
    ECE,
    ECE_SCALED,
    MACRO_F1,
    NLL,
    TOP5,
)

ECE_BINS = 15
TOP_K = 5
TEMPERATURES = (0.01, 100.0)
"""Range of the fitted temperature. Where every validation image is classified right, the likelihood grows without end
as the temperature falls."""
NEWTON_STEPS = 100


def classification_metrics(
    logits: Tensor, labels: Tensor, keys: Collection[str] | None = None, temperature: float | None = None
) -> dict[str, float]:
    """Metrics of N predictions, as the table in `trainables.specs.metrics` defines them.

    Args:
        logits: (N, K) float.
        labels: (N,) int64.
        keys: of the metrics; None = those that are reported at every evaluation. Those that do not apply are left out:
            `top5` for five or fewer classes, `ece_scaled` without a temperature.
        temperature: of `ece_scaled`.

    Returns:
        Values by key; not a number where logits are not finite, except for those of the top classes alone.

    Raises:
        ValueError: no samples, or lengths that differ.
    """
    if len(labels) == 0 or len(logits) != len(labels):
        raise ValueError(
            f"Metrics need one row of logits per label and at least one, but got {len(logits)} rows and "
            f"{len(labels)} labels."
        )
    measured = [metric.key for metric in CLASSIFICATION.reported] if keys is None else keys
    values = {key: _MEASURES[key](logits, labels) for key in measured if key in _MEASURES}
    if TOP5.key in values and logits.shape[1] <= TOP_K:
        del values[TOP5.key]
    if ECE_SCALED.key in measured and temperature is not None:
        values[ECE_SCALED.key] = calibration_error(logits.double() / temperature, labels)
    return values


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose top class is their label."""
    # In float64, in which equal counts give equal numbers: ties are decided by another metric.
    return float((logits.argmax(1) == labels).double().mean())


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy in nats."""
    # In float64: float32 cannot tell the likelihoods of confident predictions from 1.
    return float(functional.cross_entropy(logits.double(), labels))


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error of the top class.

    Over 15 equal bins of confidence (Guo et al., 2017, eq. 3).
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    if not bool(torch.isfinite(logits).all()):
        return math.nan
    probabilities = logits.float().softmax(1)
    return float(multiclass_calibration_error(probabilities, labels, logits.shape[1], n_bins=ECE_BINS, norm="l1"))


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """Mean over images of Σ_k (p_k − y_k)² (Brier, 1950)."""
    probabilities = logits.double().softmax(1)
    return float((probabilities - functional.one_hot(labels, logits.shape[1])).square().sum(1).mean())


def top_k_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose label is among the five top classes."""
    top = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices
    return float((top == labels[:, None]).any(1).double().mean())


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Mean recall over the classes that are labels."""
    counts = class_counts(logits, labels)
    present = counts["images"] > 0
    return float((counts["right"][present] / counts["images"][present]).mean())


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """Mean F1 over the classes that are labels or predictions."""
    counts = class_counts(logits, labels)
    either = counts["images"] + counts["predicted"]
    seen = either > 0
    return float((2 * counts["right"][seen] / either[seen]).mean())


def auroc(logits: Tensor, labels: Tensor) -> float:
    """One-vs-rest area under the ROC curve.

    Mean over the classes that are labels; NaN where one class is all.
    """
    from torchmetrics.functional.classification import binary_auroc

    return _one_against_rest(
        lambda scores, hits: float(binary_auroc(scores, hits, validate_args=False)), logits, labels
    )


def average_precision(logits: Tensor, labels: Tensor) -> float:
    """One-vs-rest average precision, mean over the classes that are labels."""
    from torchmetrics.functional.classification import binary_average_precision

    return _one_against_rest(
        lambda scores, hits: float(binary_average_precision(scores, hits, validate_args=False)), logits, labels
    )


def _one_against_rest(measure: Callable[[Tensor, Tensor], float], logits: Tensor, labels: Tensor) -> float:
    """Mean of a binary measure over the classes that are labels."""
    if not bool(torch.isfinite(logits).all()):
        return math.nan
    present = torch.bincount(labels).nonzero().squeeze(1).tolist()
    if len(present) < 2:
        return math.nan
    # Only the order counts. Ranks lie in [0, 1]; torchmetrics takes scores outside of it for logits and squashes them.
    scores = log_odds(logits.double())
    values = [measure(_ranks(scores[:, label]), (labels == label).long()) for label in present]
    return math.fsum(values) / len(values)


def log_odds(logits: Tensor) -> Tensor:
    """log p_k − log(1 − p_k) of every class (N, K).

    Exact where a probability is near 1 and would round to it.
    """
    top = logits.argmax(1, keepdim=True)
    highest = logits.gather(1, top)
    shares = (logits - highest).exp()
    # Of all classes but k. For the top class the difference would cancel, so its rest is summed without it.
    rest = shares.sum(1, keepdim=True) - shares
    without_top = logits.scatter(1, top, -math.inf).logsumexp(1, keepdim=True)
    return (logits - highest - rest.log()).scatter(1, top, highest - without_top)


def _ranks(scores: Tensor) -> Tensor:
    """Dense ranks (N,) float64 in [0, 1]; equal scores share one."""
    distinct, rank = np.unique(scores.numpy(), return_inverse=True)
    return torch.from_numpy(rank).double() / max(1, len(distinct) - 1)


_MEASURES: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    ACCURACY.key: accuracy,
    NLL.key: negative_log_likelihood,
    ECE.key: calibration_error,
    BALANCED_ACCURACY.key: balanced_accuracy,
    MACRO_F1.key: macro_f1,
    AUROC.key: auroc,
    AVERAGE_PRECISION.key: average_precision,
    BRIER.key: brier_score,
    TOP5.key: top_k_accuracy,
}


def class_counts(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Counts (K,) float64 of each class.

    `images` that have it, images `predicted` to have it, and `right` ones.
    """
    confusion = confusion_matrix(logits, labels).double()
    return {"images": confusion.sum(1), "predicted": confusion.sum(0), "right": confusion.diagonal()}


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts (K, K) int64 of images by label (rows) and top class (columns)."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    matrix: Tensor = multiclass_confusion_matrix(logits.argmax(1), labels, logits.shape[1], validate_args=False)
    return matrix


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """Temperature T that minimises the mean cross-entropy of logits / T.

    Guo et al. (2017), section 4.2. The cross-entropy is convex in 1/T. Newton's method on its derivative, kept inside a
    bracket that every step narrows, in float64: no learning rate, no random number. NaN where logits are not finite.

    Args:
        logits: (N, K) of validation images.
        labels: (N,) int64.
    """
    if not bool(torch.isfinite(logits).all()):
        return math.nan
    scores = logits.double()
    own = scores.gather(1, labels[:, None]).squeeze(1)
    low = 1 / TEMPERATURES[1]
    high = 1 / TEMPERATURES[0]
    inverse = 1.0
    for _ in range(NEWTON_STEPS):
        probabilities = (scores * inverse).softmax(1)
        mean = (probabilities * scores).sum(1)
        slope = float((mean - own).mean())
        curvature = float(((probabilities * scores.square()).sum(1) - mean.square()).mean())
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else math.nan
        # Outside of the bracket, or not a number: halve the bracket, on the logarithmic scale.
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following - inverse) <= 1e-12 * inverse:
            break
        inverse = following
    return 1 / inverse
