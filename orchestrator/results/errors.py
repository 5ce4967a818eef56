"""Errors of a classifier on one split: results per class, confused classes, confident errors, calibration.

Pure functions on arrays. `top_classes` makes the arrays of a table of kept predictions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from orchestrator.results.predictions import output_matrix
from orchestrator.results.sample_values import BINS

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

CHUNK = 8192
"""Rows whose probabilities are computed at once, so that they need little memory for many classes."""


@dataclass(frozen=True)
class TopClasses:
    """Top class of each of the n samples of one split."""

    names: Sequence[str]
    targets: Integers
    """(n,) labels."""
    predicted: Integers
    """(n,) classes of the highest logit, the first of equals."""
    confidence: Floats
    """(n,) probability of the predicted class; NaN where logits are not finite."""
    scaled: Floats | None = None
    """(n,) the same after temperature scaling; None without a temperature."""

    @property
    def right(self) -> NDArray[np.bool_]:
        """(n,) whether the predicted class is the label."""
        return np.equal(self.predicted, self.targets)


@dataclass(frozen=True)
class ClassCounts:
    """Samples per class; arrays (K,)."""

    images: Integers
    """Whose label the class is."""
    predicted: Integers
    """That are predicted to be of it."""
    right: Integers
    """That are both."""

    @property
    def recall(self) -> Floats:
        """(K,); NaN for classes without a sample."""
        return _ratio(self.right, self.images)

    @property
    def precision(self) -> Floats:
        """(K,); NaN for classes that are never predicted."""
        return _ratio(self.right, self.predicted)

    @property
    def f1(self) -> Floats:
        """(K,); NaN for classes that have neither a sample nor a prediction."""
        return _ratio(2 * self.right, self.images + self.predicted)


@dataclass(frozen=True)
class ConfusedPair:
    """Samples of one class that are predicted to be of another one."""

    label: int
    predicted: int
    images: int
    share: float
    """Of the samples with that label."""


@dataclass(frozen=True)
class Reliability:
    """Accuracy by bins of confidence: 15 equal ones, closed below; arrays over the bins that have a sample."""

    count: Integers
    confidence: Floats
    """Mean confidence of the bin's samples."""
    accuracy: Floats

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al., 2017, eq. 3); NaN without samples."""
        if len(self.count) == 0:
            return math.nan
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.count))


def class_names(table: pa.Table) -> list[str] | None:
    """Names of the classes, from the metadata of kept predictions; None where they have none."""
    text = (table.schema.metadata or {}).get(b"classes")
    return None if text is None else [str(name) for name in json.loads(text)]


def split_names(table: pa.Table) -> list[str]:
    """Splits of kept predictions, in their order."""
    return [str(name) for name in pc.unique(table.column("split")).to_pylist()]


def top_classes(table: pa.Table, split: str, temperature: float | None = None) -> TopClasses:
    """Top classes of one split of kept predictions (`orchestrator.results.predictions.read_predictions`).

    Args:
        temperature: by which logits are divided for `TopClasses.scaled`.
    """
    rows = table.filter(pc.equal(table.column("split"), split))
    targets = np.asarray(rows.column("target"), np.int64)
    logits = output_matrix(rows)
    predicted = np.zeros(len(targets), np.int64)
    confidence = np.zeros(len(targets))
    scaled = None if temperature is None else np.zeros(len(targets))
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        predicted[part] = logits[part].argmax(1)
        confidence[part] = _top_probability(logits[part], 1.0)
        if scaled is not None and temperature is not None:
            scaled[part] = _top_probability(logits[part], temperature)
    return TopClasses(rows.column("name").to_pylist(), targets, predicted, confidence, scaled)


def class_counts(top: TopClasses, classes: int) -> ClassCounts:
    """Counts of each of the classes."""
    labels, predicted, right = (
        np.bincount(values, minlength=classes) for values in (top.targets, top.predicted, top.targets[top.right])
    )
    return ClassCounts(labels, predicted, right)


def confusion_matrix(targets: Integers, predicted: Integers, classes: int) -> Integers:
    """(K, K) counts of samples by label (rows) and predicted class (columns).

    Example:
        >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    cells = np.bincount(classes * targets + predicted, minlength=classes**2)
    return cells.reshape(classes, classes)


def confused_pairs(top: TopClasses, most: int) -> list[ConfusedPair]:
    """The pairs of label and wrong class with the most samples, at most `most`; of equals the lower label first."""
    wrong = ~top.right
    pairs, counts = np.unique(np.stack([top.targets[wrong], top.predicted[wrong]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    images = np.bincount(top.targets, minlength=1)
    return [
        ConfusedPair(label, predicted, count, count / int(images[label]))
        for (label, predicted), count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]


def confident_errors(top: TopClasses, most: int) -> Integers:
    """Positions of the wrong predictions with the highest confidence, at most `most`; of equals the first."""
    wrong = np.flatnonzero(~top.right & np.isfinite(top.confidence))
    return wrong[np.argsort(-top.confidence[wrong], kind="stable")][:most]


def reliability(confidence: Floats, right: NDArray[np.bool_]) -> Reliability:
    """Reliability diagram of n predictions; those whose confidence is not finite are left out.

    Args:
        confidence: (n,) probability of the predicted class.
        right: (n,).
    """
    finite = np.isfinite(confidence)
    edges = np.linspace(0, 1, BINS + 1)
    bins = np.minimum(np.digitize(confidence[finite], edges) - 1, BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    present = count > 0
    sums = [np.bincount(bins, values[finite], BINS)[present] for values in (confidence, right)]
    count = count[present]
    return Reliability(count, sums[0] / count, sums[1] / count)


def extremes_by_class(values: Floats, labels: Integers, most: int, largest: bool) -> Integers:
    """Positions of the smallest or largest values, at most `most`, from as many classes as possible.

    With no more classes than `most`, equally many of each class (to one), as in Ha et al. (2024), Fig. 6 to 9, which
    have the extreme image of each of ten classes; with more, one of each of the classes with the most extreme images.
    The most extreme comes first; of equal values the first. Values that are not finite are left out.

    Example:
        >>> values = np.array([0.1, 0.2, 0.3, 0.9])
        >>> extremes_by_class(values, np.array([0, 0, 0, 1]), most=2, largest=False).tolist()
        [0, 3]
    """
    keys = -values if largest else values
    order = np.flatnonzero(np.isfinite(keys))
    order = order[np.argsort(keys[order], kind="stable")]
    turns: list[list[int]] = []
    seen: dict[int, int] = {}
    for position in order.tolist():
        turn = seen.get(int(labels[position]), 0)
        seen[int(labels[position])] = turn + 1
        if turn == len(turns):
            turns.append([])
        turns[turn].append(position)
    chosen = np.asarray([position for turn in turns for position in turn][:most], np.int64)
    return chosen[np.argsort(keys[chosen], kind="stable")]


def _ratio(part: Integers, whole: Integers) -> Floats:
    ratio: Floats = np.divide(part, whole, out=np.full(len(whole), math.nan), where=whole > 0)
    return ratio


def _top_probability(logits: NDArray[Any], temperature: float) -> Floats:
    """(n,) softmax probability of the highest of (n, K) logits, in float64; NaN where a logit is not finite."""
    scores = logits.astype(np.float64) / temperature
    finite = np.isfinite(scores).all(1)
    top = np.full(len(scores), math.nan)
    rows = scores[finite]
    top[finite] = 1 / np.exp(rows - rows.max(1, keepdims=True)).sum(1)
    return top
