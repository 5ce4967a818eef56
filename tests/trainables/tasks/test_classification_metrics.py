"""Accuracy, likelihood and calibration against plain implementations and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn import metrics as sklearn_metrics
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional import classification as torchmetrics

from trainables.specs.metrics import CLASSIFICATION
from trainables.tasks.classification_metrics import (
    TEMPERATURES,
    classification_metrics,
    fitted_temperature,
    log_odds,
)


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


FINAL = [metric.key for metric in CLASSIFICATION.final]


def predictions(count: int = 300, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that know something, and labels of classes of different size."""
    random = torch.Generator().manual_seed(seed)
    shares = torch.arange(1, classes + 1, dtype=torch.float64)
    labels = torch.multinomial(shares, count, replacement=True, generator=random)
    logits = 2 * torch.randn(count, classes, generator=random) + 2 * functional.one_hot(labels, classes)
    return logits, labels


def test_log_odds_are_those_of_the_probabilities() -> None:
    logits, _ = predictions()
    p = logits.double().softmax(1)
    assert torch.allclose(log_odds(logits.double()), p.log() - (1 - p).log(), rtol=1e-9, atol=1e-9)


def one_hot(labels: Tensor, classes: int) -> np.ndarray:
    return functional.one_hot(labels, classes).numpy()


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_those_of_the_tested_weights_agree_with_scikit_learn(classes: int) -> None:
    logits, labels = predictions(classes=classes)
    probabilities = logits.double().softmax(1).numpy()
    targets = one_hot(labels, classes)
    expected = {
        "balanced_acc": sklearn_metrics.balanced_accuracy_score(labels, logits.argmax(1)),
        "macro_f1": sklearn_metrics.f1_score(labels, logits.argmax(1), average="macro"),
        "auroc": sklearn_metrics.roc_auc_score(targets, probabilities, average="macro"),
        "ap": sklearn_metrics.average_precision_score(targets, probabilities, average="macro"),
        "brier": np.square(probabilities - targets).sum(1).mean(),
    }
    if classes > 5:
        expected["top5"] = sklearn_metrics.top_k_accuracy_score(labels, probabilities, k=5)
    assert classification_metrics(logits, labels, FINAL) == pytest.approx(expected, rel=1e-6)


def test_they_agree_with_torchmetrics_where_no_class_is_missing() -> None:
    logits, labels = predictions()
    found = classification_metrics(logits, labels, FINAL, temperature=1.0)
    probabilities = logits.softmax(1)
    expected = {
        "balanced_acc": torchmetrics.multiclass_accuracy(probabilities, labels, 7, average="macro"),
        "macro_f1": torchmetrics.multiclass_f1_score(probabilities, labels, 7, average="macro"),
        "auroc": torchmetrics.multiclass_auroc(probabilities, labels, 7, average="macro"),
        "ap": torchmetrics.multiclass_average_precision(probabilities, labels, 7, average="macro"),
        "top5": torchmetrics.multiclass_accuracy(probabilities, labels, 7, top_k=5, average="micro"),
        "ece_scaled": torchmetrics.multiclass_calibration_error(probabilities, labels, 7, n_bins=15),
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(float(value), rel=1e-5)


def test_means_over_classes_are_over_those_that_the_images_have() -> None:
    """Class 1 is predicted but has no image, class 4 is neither: only F1 knows a false class 1."""
    logits = torch.full((6, 5), -5.0)
    logits[torch.arange(6), torch.tensor([0, 0, 1, 2, 2, 3])] = 5.0
    labels = torch.tensor([0, 0, 0, 2, 2, 2])
    found = classification_metrics(logits, labels, FINAL)
    assert found["balanced_acc"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found["macro_f1"] == pytest.approx((0.8 + 0 + 0.8 + 0) / 4)
    targets = one_hot(labels, 5)[:, [0, 2]]
    probabilities = logits.double().softmax(1).numpy()[:, [0, 2]]
    assert found["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(targets, probabilities), rel=1e-6)
    assert found["ap"] == pytest.approx(sklearn_metrics.average_precision_score(targets, probabilities), rel=1e-6)


def test_a_constant_classifier_on_95_to_5() -> None:
    labels = (torch.arange(100) % 20 == 19).long()
    found = classification_metrics(torch.tensor([[3.0, -3.0]]).repeat(100, 1), labels, ["acc", *FINAL])
    assert found["acc"] == pytest.approx(0.95)
    assert found["balanced_acc"] == pytest.approx(0.5)
    assert found["macro_f1"] == pytest.approx((2 * 0.95 / 1.95 + 0) / 2)
    assert found["auroc"] == pytest.approx(0.5)
    assert found["ap"] == pytest.approx(0.5)  # (0.95 + 0.05) / 2
    p = 1 / (1 + math.exp(-6))
    assert found["brier"] == pytest.approx(0.95 * 2 * (1 - p) ** 2 + 0.05 * 2 * p**2)
    assert "top5" not in found


def test_sure_predictions_keep_their_order_where_probabilities_would_round_to_one() -> None:
    margins = torch.tensor([30.0, 40.0, 50.0, 60.0])
    logits = torch.stack([-margins / 2, margins / 2], 1)
    labels = torch.tensor([0, 0, 1, 1])
    assert float(logits.softmax(1)[:, 1].unique().numel()) == 1
    assert classification_metrics(logits, labels, ["auroc", "ap"]) == {"auroc": 1.0, "ap": 1.0}


def test_one_class_alone_has_no_ranking_and_a_balanced_accuracy() -> None:
    logits, _ = predictions(count=20)
    found = classification_metrics(logits, torch.full((20,), 3), FINAL)
    assert math.isnan(found["auroc"])
    assert math.isnan(found["ap"])
    assert found["balanced_acc"] == pytest.approx(float((logits.argmax(1) == 3).double().mean()))


def test_what_is_not_finite_is_not_a_number() -> None:
    found = classification_metrics(torch.full((4, 7), math.nan), torch.tensor([0, 1, 2, 3]), FINAL, temperature=1.0)
    assert all(math.isnan(found[key]) for key in ("auroc", "ap", "brier", "ece_scaled"))
    assert math.isnan(fitted_temperature(torch.full((4, 7), math.nan), torch.tensor([0, 1, 2, 3])))


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_the_temperature_minimises_the_likelihood_on_validation(scale: float) -> None:
    logits, labels = predictions()
    logits = (logits * scale).double()
    expected = minimize_scalar(
        lambda log_t: float(functional.cross_entropy(logits / math.exp(log_t), labels)),
        bounds=(math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1])),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert fitted_temperature(logits, labels) == pytest.approx(math.exp(expected.x), rel=1e-5)


def test_a_fitted_temperature_undoes_a_scale_and_calibrates() -> None:
    logits, labels = predictions(count=2000)
    once = fitted_temperature(logits, labels)
    assert fitted_temperature(logits * 8, labels) == pytest.approx(8 * once, rel=1e-5)
    assert fitted_temperature(logits / once, labels) == pytest.approx(1, rel=1e-5)
    spoiled = classification_metrics(logits * 8, labels, ["ece", "ece_scaled"], temperature=8 * once)
    assert spoiled["ece_scaled"] == pytest.approx(plain(logits / once, labels)["ece"], abs=1e-5)
    assert spoiled["ece_scaled"] < 0.3 * spoiled["ece"]


def test_a_temperature_stays_in_its_range_where_the_likelihood_has_no_end() -> None:
    right = torch.eye(3).repeat(5, 1)
    labels = torch.arange(3).repeat(5)
    sure = fitted_temperature(right, labels)
    assert TEMPERATURES[0] <= sure < 0.03
    assert float(functional.cross_entropy(right.double() / sure, labels)) < 1e-15
    assert fitted_temperature(-right, labels) == pytest.approx(TEMPERATURES[1], rel=1e-3)
    assert TEMPERATURES[0] <= fitted_temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) <= TEMPERATURES[1]
