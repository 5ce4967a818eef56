"""Per-sample values: their mean is the recorded metric, and each is the metric's derivative by a sample's weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from orchestrator.results.sample_values import (
    PIXEL_FUNCTIONS,
    SAMPLE_FUNCTIONS,
    Integers,
    PixelCounts,
    SplitOutputs,
    log_odds,
)
from trainables.tasks.classification_metrics import classification_metrics
from trainables.tasks.classification_metrics import log_odds as log_odds_of_the_task

TEMPERATURE = 1.7
STEP = 1e-6


def outputs(classes: int, samples: int = 200, scale: float = 1.5, seed: int = 0) -> SplitOutputs:
    """Predictions of a classifier that is right more often than not; some scores are equal."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(classes, size=samples)
    logits = generator.normal(size=(samples, classes)) + scale * np.eye(classes)[targets]
    return SplitOutputs(np.round(logits, 1).astype(np.float32), targets, TEMPERATURE)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("key", SAMPLE_FUNCTIONS)
@pytest.mark.parametrize("scale", [1.5, 30.0])
def test_the_mean_is_the_metric_of_the_trial(classes: int, key: str, scale: float) -> None:
    split = outputs(classes, scale=scale)
    expected = classification_metrics(
        torch.tensor(split.logits), torch.tensor(split.targets), [key], temperature=TEMPERATURE
    )
    values = SAMPLE_FUNCTIONS[key].values(split)
    if values is None:
        assert expected == {}
    else:
        assert values.mean() == pytest.approx(expected[key], abs=1e-6)


def weighted_macro_f1(split: SplitOutputs, weights: np.ndarray) -> float:
    predicted = split.logits.argmax(1)
    return float(sklearn_metrics.f1_score(split.targets, predicted, average="macro", sample_weight=weights))


def weighted_auroc(split: SplitOutputs, weights: np.ndarray) -> float:
    return _mean_over_classes(sklearn_metrics.roc_auc_score, split, weights)


def weighted_average_precision(split: SplitOutputs, weights: np.ndarray) -> float:
    return _mean_over_classes(sklearn_metrics.average_precision_score, split, weights)


def _mean_over_classes(measure, split: SplitOutputs, weights: np.ndarray) -> float:  # type: ignore[no-untyped-def]
    odds = log_odds(split.logits.astype(np.float64))
    classes = np.unique(split.targets)
    return float(np.mean([measure(split.targets == k, odds[:, k], sample_weight=weights) for k in classes]))


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize(
    ("key", "metric"),
    [("macro_f1", weighted_macro_f1), ("auroc", weighted_auroc), ("ap", weighted_average_precision)],
)
def test_a_value_is_the_derivative_by_the_weight_of_the_sample(classes: int, key: str, metric) -> None:  # type: ignore[no-untyped-def]
    split = outputs(classes, samples=60)
    values = SAMPLE_FUNCTIONS[key].values(split)
    assert values is not None
    ones = np.ones(60)
    theta = metric(split, ones)
    for sample in range(0, 60, 7):
        moved = ones.copy()
        moved[sample] += STEP
        slope = (metric(split, moved) - theta) / STEP
        assert values[sample] == pytest.approx(theta + 60 * slope, abs=1e-3)


def test_the_variance_of_auroc_is_delongs() -> None:
    """Var = S10/m + S01/n (DeLong et al., 1988, eq. 5), by all pairs."""
    split = outputs(2, samples=120)
    odds = log_odds(split.logits.astype(np.float64))[:, 1]
    positive = split.targets == 1
    higher = odds[positive][:, None] - odds[~positive][None]
    wins = (higher > 0) + 0.5 * (higher == 0)
    parts = (wins.mean(1), wins.mean(0))
    expected = sum(part.var() / len(part) for part in parts)
    values = SAMPLE_FUNCTIONS["auroc"].values(split)
    assert values is not None
    assert values.var() / 120 == pytest.approx(expected)


def test_the_variance_is_that_of_the_bootstrap() -> None:
    split = outputs(3, samples=400)
    generator = np.random.default_rng(1)
    draws = generator.integers(400, size=(400, 400))
    for key in ("macro_f1", "auroc", "ap"):
        function = SAMPLE_FUNCTIONS[key].values
        resampled = [_mean(function(SplitOutputs(split.logits[draw], split.targets[draw]))) for draw in draws]
        values = function(split)
        assert values is not None
        assert np.std(resampled) == pytest.approx(values.std() / 20, rel=0.15)


def _mean(values: np.ndarray | None) -> float:
    assert values is not None
    return float(values.mean())


@pytest.mark.parametrize("key", ["auroc", "ap"])
def test_a_single_class_has_no_ranking(key: str) -> None:
    targets: Integers = np.zeros(10, np.int64)
    assert SAMPLE_FUNCTIONS[key].values(SplitOutputs(np.zeros((10, 2), np.float32), targets)) is None


@pytest.mark.parametrize("key", ["auroc", "ap", "ece"])
def test_logits_that_are_not_finite_have_no_values(key: str) -> None:
    logits = np.zeros((4, 2), np.float32)
    logits[0, 0] = np.nan
    assert SAMPLE_FUNCTIONS[key].values(SplitOutputs(logits, np.array([0, 1, 0, 1]))) is None


def test_log_odds_are_those_of_the_task() -> None:
    logits = np.random.default_rng(0).normal(scale=40, size=(50, 5))
    assert log_odds(logits) == pytest.approx(log_odds_of_the_task(torch.tensor(logits)).numpy(), rel=1e-12)


def pixel_counts(pictures: int = 40, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, PixelCounts]:
    """Confusion matrices of pictures (n, K, K), and their counts; the last class is nowhere."""
    generator = np.random.default_rng(seed)
    confusions = generator.integers(0, 30, (pictures, classes + 1, classes + 1)) + 40 * np.eye(classes + 1, dtype=int)
    confusions[:, -1] = 0
    confusions[:, :, -1] = 0
    right = np.diagonal(confusions, axis1=1, axis2=2)
    return confusions, PixelCounts(right, confusions.sum(1) + confusions.sum(2) - right)


def weighted_pixel_metric(key: str, confusions: np.ndarray, weights: np.ndarray) -> float:
    total = np.einsum("n,nij->ij", weights, confusions)
    right = np.diag(total)
    if key == "pixel_acc":
        return float(right.sum() / total.sum())
    union = total.sum(0) + total.sum(1) - right
    return float((right[:-1] / union[:-1]).mean())


@pytest.mark.parametrize("key", PIXEL_FUNCTIONS)
def test_pixel_metrics_have_their_mean_and_their_derivatives(key: str) -> None:
    confusions, counts = pixel_counts()
    values = PIXEL_FUNCTIONS[key](counts)
    assert values is not None
    ones = np.ones(len(confusions))
    theta = weighted_pixel_metric(key, confusions, ones)
    assert values.mean() == pytest.approx(theta, abs=1e-12)
    for picture in range(0, len(ones), 5):
        moved = ones.copy()
        moved[picture] += STEP
        slope = (weighted_pixel_metric(key, confusions, moved) - theta) / STEP
        assert values[picture] == pytest.approx(theta + len(ones) * slope, abs=1e-3)


def test_the_variance_of_mean_iou_is_that_of_the_bootstrap() -> None:
    confusions, counts = pixel_counts(pictures=200)
    values = PIXEL_FUNCTIONS["miou"](counts)
    assert values is not None
    generator = np.random.default_rng(1)
    resampled = [
        weighted_pixel_metric("miou", confusions, generator.multinomial(200, np.full(200, 1 / 200)))
        for _ in range(4000)
    ]
    assert values.std(ddof=1) / np.sqrt(200) == pytest.approx(np.std(resampled), rel=0.05)


def test_a_class_in_a_single_picture_leaves_mean_iou_without_values() -> None:
    _, counts = pixel_counts(pictures=5)
    union = counts.union.copy()
    union[2, -1] = 1
    assert PIXEL_FUNCTIONS["miou"](PixelCounts(counts.intersection, union)) is None
    union[3, -1] = 1
    assert PIXEL_FUNCTIONS["miou"](PixelCounts(counts.intersection, union)) is not None


def test_pictures_without_labelled_pixels_have_no_values() -> None:
    nothing = np.zeros((3, 4), np.int64)
    assert all(function(PixelCounts(nothing, nothing)) is None for function in PIXEL_FUNCTIONS.values())
