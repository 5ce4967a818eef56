"""Accuracy, likelihood and calibration against plain implementations and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainables.tasks.classification_metrics import classification_metrics


def plain(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, float]:
    """The definitions, one sample after the other (ECE: Guo et al. 2017, eq. 3)."""
    correct, nll = [], []
    confidence: list[float] = []
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        probability = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        correct.append(float(row.argmax() == label))
        confidence.append(float(probability.max()))
        nll.append(-math.log(probability[label]))
    error = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if b / bins < c <= (b + 1) / bins]
        if inside:
            gap = np.mean([correct[i] for i in inside]) - np.mean([confidence[i] for i in inside])
            error += len(inside) / len(confidence) * abs(float(gap))
    return {"acc": float(np.mean(correct)), "nll": float(np.mean(nll)), "ece": error}


@pytest.mark.parametrize(("count", "classes", "scale"), [(1, 2, 1.0), (50, 3, 5.0), (400, 10, 2.0), (400, 10, 0.01)])
def test_they_agree_with_the_definitions(count: int, classes: int, scale: float) -> None:
    random = torch.Generator().manual_seed(count)
    logits = torch.randn(count, classes, generator=random) * scale
    labels = torch.randint(classes, (count,), generator=random)
    assert classification_metrics(logits, labels) == pytest.approx(plain(logits, labels), rel=1e-5, abs=1e-6)


def test_a_predictor_whose_accuracy_equals_its_confidence_is_calibrated() -> None:
    logits = torch.tensor([[math.log(0.7), math.log(0.3)]]).repeat(10, 1)
    labels = torch.tensor([0] * 7 + [1] * 3)
    metrics = classification_metrics(logits, labels)
    assert metrics["acc"] == pytest.approx(0.7)
    assert metrics["nll"] == pytest.approx(-0.7 * math.log(0.7) - 0.3 * math.log(0.3), rel=1e-6)
    assert metrics["ece"] == pytest.approx(0, abs=1e-6)


def test_d18_a_class_without_images_leaves_numbers_over_those_that_are_there() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, generator=random)
    labels = torch.tensor([0, 3]).repeat(20)
    metrics = classification_metrics(logits, labels)
    assert metrics == pytest.approx(plain(logits, labels), rel=1e-5, abs=1e-6)
    assert all(math.isfinite(value) for value in metrics.values())


def test_one_that_is_sure_and_always_wrong() -> None:
    metrics = classification_metrics(torch.tensor([[50.0, -50.0]]).repeat(4, 1), torch.ones(4, dtype=torch.int64))
    assert metrics == pytest.approx({"acc": 0.0, "nll": 100.0, "ece": 1.0})


def test_low_precision_and_not_a_number() -> None:
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 3
    half = classification_metrics(logits.bfloat16(), labels)
    assert half == pytest.approx(classification_metrics(logits.bfloat16().float(), labels), rel=1e-6)
    metrics = classification_metrics(torch.full((2, 3), math.nan), torch.tensor([0, 1]))
    assert math.isnan(metrics["nll"])
    assert math.isnan(metrics["ece"])


def test_nothing_to_measure() -> None:
    for logits, labels, counts in (
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "0 rows and 0 labels"),
        (torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64), "2 rows and 1 labels"),
    ):
        with pytest.raises(ValueError) as error:
            classification_metrics(logits, labels)
        assert str(error.value) == f"Metrics need one row of logits per label and at least one, but got {counts}."
