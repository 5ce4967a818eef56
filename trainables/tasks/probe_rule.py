"""Which C of a regularisation path a linear probe takes, by its predictions on validation images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trainables.specs.metrics import ACCURACY, BRIER, NLL, TaskMetrics
from trainables.tasks.base import ProbeRule
from trainables.tasks.classification_metrics import classification_metrics

Doubles = NDArray[np.float64]
Integers = NDArray[np.integer]

RESAMPLES = 50
"""Bootstrap samples for the standard error of a metric that is no mean over images."""
SEED = 0
"""Of the bootstrap samples, which are the same for every C."""


@dataclass(frozen=True)
class PathChoice:
    """What a rule chose on a path of M values of C."""

    index: int
    values: tuple[float, ...]
    """(M,) selection metric on validation, as recorded."""
    losses: tuple[float, ...]
    """(M,) mean negative log-likelihood on validation, weighted as the training loss is."""
    within: tuple[bool, ...]
    """(M,) whether the selection metric is within one standard error of the best."""


class ValidationPath:
    """Scores of the solutions along a path on validation images.

    The standard error is that of the paired difference between two solutions: of its mean over images for accuracy,
    likelihood and Brier score, otherwise over `RESAMPLES` bootstrap samples of the images (Efron and Tibshirani, 1993,
    section 8.3), the same for every solution.

    Args:
        targets: (N,) labels.
        metrics: of the task; its selection metric is compared.
        class_weights: (K,) of the training loss; None = 1 for all.
    """

    def __init__(self, targets: Integers, metrics: TaskMetrics, class_weights: Doubles | None = None) -> None:
        self._targets = targets
        self._metrics = metrics
        self._weights = np.ones(len(targets)) if class_weights is None else class_weights[targets]
        self._per_image = _PER_IMAGE.get(metrics.selection.key)
        generator = np.random.default_rng(SEED)
        self._resamples = generator.integers(0, len(targets), (RESAMPLES, len(targets)))
        self._values: list[float] = []
        self._orders: list[tuple[float, float]] = []
        self._losses: list[Doubles] = []
        """Of each solution, the weighted negative log-likelihood of every image (N,)."""
        self._replicates: list[Doubles] = []
        """Of each solution, the oriented metric per image (N,) or per bootstrap sample (RESAMPLES,)."""

    def add(self, logits: Doubles) -> None:
        """Score the next solution, of a larger C, by its logits (N, K)."""
        metric = self._metrics.selection
        tie_breaker = self._metrics.tie_breaker.key
        losses = per_image_nll(logits, self._targets)
        values = _metric_values(logits, self._targets, {metric.key, tie_breaker})
        self._values.append(values[metric.key])
        self._orders.append(self._metrics.order(values[metric.key], values[tie_breaker]))
        self._losses.append(self._weights * losses)
        if self._per_image is not None:
            replicates = self._per_image(logits, self._targets)
        else:
            resampled = [
                _metric_values(logits[rows], self._targets[rows], {metric.key})[metric.key] for rows in self._resamples
            ]
            replicates = np.array([metric.score(value) for value in resampled])
        self._replicates.append(replicates)

    def choose(self, rule: ProbeRule) -> PathChoice:
        """The solution that a rule takes.

        Ties of the selection metric go to the tie-breaker, all other ties to the smaller C.
        """
        best = self._best()
        within = self._within(best)
        losses = [float(losses.mean()) for losses in self._losses]
        likeliest = int(np.argmin(losses))
        if rule == "argmax":
            index = best
        elif rule == "one_se":
            index = within.index(True)
        elif rule == "nll":
            index = likeliest
        else:
            index = self._as_likely(losses, likeliest).index(True)
        return PathChoice(index, tuple(self._values), tuple(losses), tuple(within))

    def _best(self) -> int:
        best = 0
        for index, order in enumerate(self._orders):
            # Strictly greater: of equal scores the first, with the smaller C, is kept.
            if order > self._orders[best]:
                best = index
        return best

    def _within(self, best: int) -> list[bool]:
        """Whether each solution's selection metric is within one standard error of the best one's."""
        scores = [self._metrics.selection.score(value) for value in self._values]
        # The standard deviation over bootstrap samples is that of the whole metric already.
        images = len(self._targets) if self._per_image is not None else 1
        differences = [self._replicates[best] - replicates for replicates in self._replicates]
        return [
            index == best or scores[best] - score <= _deviation(difference) / math.sqrt(images)
            for index, (score, difference) in enumerate(zip(scores, differences, strict=True))
        ]

    def _as_likely(self, means: Sequence[float], best: int) -> list[bool]:
        """Whether each solution's likelihood is within one standard error of the best one's."""
        differences = [losses - self._losses[best] for losses in self._losses]
        return [
            index == best or mean - means[best] <= _deviation(difference) / math.sqrt(len(difference))
            for index, (mean, difference) in enumerate(zip(means, differences, strict=True))
        ]


def _deviation(values: Doubles) -> float:
    """Sample standard deviation of the finite values.

    NaN, within which nothing is, for fewer than two.
    """
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else math.nan


def per_image_nll(logits: Doubles, targets: Integers) -> Doubles:
    """Negative log-likelihood (N,) of logits (N, K)."""
    # By the largest logit, so that the exponential cannot overflow.
    shifted = logits - logits.max(1, keepdims=True)
    losses: Doubles = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(targets)), targets]
    return losses


def _correct(logits: Doubles, targets: Integers) -> Doubles:
    return np.asarray(logits.argmax(1) == targets, dtype=np.float64)


def _likelihood(logits: Doubles, targets: Integers) -> Doubles:
    return -per_image_nll(logits, targets)


def _negative_brier(logits: Doubles, targets: Integers) -> Doubles:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    residual = shifted / shifted.sum(1, keepdims=True)
    residual[np.arange(len(targets)), targets] -= 1
    scores: Doubles = -np.square(residual).sum(1)
    return scores


_PER_IMAGE: dict[str, Callable[[Doubles, Integers], Doubles]] = {
    ACCURACY.key: _correct,
    NLL.key: _likelihood,
    BRIER.key: _negative_brier,
}
"""Metrics that are means over images → each image's part, oriented so that larger is better."""


def _metric_values(logits: Doubles, targets: Integers, keys: set[str]) -> dict[str, float]:
    """Metrics by key."""
    values = {}
    if ACCURACY.key in keys:
        values[ACCURACY.key] = float(_correct(logits, targets).mean())
    if NLL.key in keys:
        values[NLL.key] = float(per_image_nll(logits, targets).mean())
    others = keys - values.keys()
    if others:
        values |= classification_metrics(torch.from_numpy(logits), torch.from_numpy(np.asarray(targets)), others)
    return values
