"""Class weights, label smoothing and focal loss, trained and solved."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional

from trainables.specs.trial_spec import LossSettings, SharedTrialSettings
from trainables.tasks.base import TargetSpec, TaskSettings
from trainables.tasks.class_weights import balanced_weights
from trainables.tasks.classification import Classification
from trainables.tasks.linear_probe_head import fit_linear_probe

COUNTS = (60, 30, 10)


def task(**loss: Any) -> Classification:
    return Classification(TargetSpec(("a", "b", "c"), COUNTS), TaskSettings(loss=LossSettings(**loss)))


def batch(count: int = 12) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, generator=random), torch.arange(count) % 3


def test_the_default_is_cross_entropy_to_the_last_bit() -> None:
    logits, labels = batch()
    for smoothing in (0.0, 0.2):
        expected = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        assert torch.equal(task().loss(logits, labels, label_smoothing=smoothing), expected)


def test_balanced_weights_are_those_of_scikit_learn_and_of_mean_one() -> None:
    labels = np.repeat(np.arange(3), COUNTS)
    weights = balanced_weights(COUNTS)
    assert weights == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels).tolist())
    assert np.array(weights)[labels].mean() == pytest.approx(1)
    assert balanced_weights([4, 0, 4]) == [1.0, 1.0, 1.0]


def test_a_weighted_loss_is_the_mean_over_samples_of_the_weighted_ones() -> None:
    logits, labels = batch()
    weights = torch.tensor(balanced_weights(COUNTS))
    by_torch = functional.cross_entropy(logits, labels, weight=weights, reduction="sum", label_smoothing=0)
    weighted = task(class_weights="balanced")
    assert float(weighted.loss(logits, labels)) == pytest.approx(float(by_torch) / len(labels), rel=1e-6)
    assert float(weighted.loss(logits, labels, reduction="sum")) == pytest.approx(float(by_torch), rel=1e-6)


def test_micro_batches_add_up_to_the_batch() -> None:
    logits, labels = batch()
    for settings in ({"class_weights": "balanced"}, {"class_weights": "balanced", "focal_gamma": 2.0}):
        made = task(**settings)
        pieces = [made.loss(logits[i : i + 4], labels[i : i + 4]) * 4 / 12 for i in (0, 4, 8)]
        assert float(sum(pieces)) == pytest.approx(float(made.loss(logits, labels)), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_the_focal_loss_is_its_closed_form(gamma: float) -> None:
    logits, labels = batch()
    p = logits.double().softmax(1).gather(1, labels[:, None]).squeeze(1)
    expected = -((1 - p) ** gamma) * p.log()
    made = task(focal_gamma=gamma)
    assert float(made.loss(logits, labels)) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert float(made.loss(logits, labels, reduction="sum")) == pytest.approx(float(expected.sum()), rel=1e-5)


def test_the_focal_loss_has_a_finite_gradient_where_a_prediction_is_sure() -> None:
    for gamma in (0.5, 2.0):
        logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]], requires_grad=True)
        task(focal_gamma=gamma).loss(logits, torch.tensor([0, 0])).backward()
        assert logits.grad is not None
        assert bool(torch.isfinite(logits.grad).all())


def test_the_loss_of_a_closed_form_solution_is_weighted() -> None:
    logits, labels = batch()
    made = task(class_weights="balanced")
    assert made.metrics.loss is not None
    scores = made.accumulator()
    scores.update(logits, labels)
    value = scores.compute([made.metrics.loss.key])[made.metrics.loss.key]
    assert value == pytest.approx(float(made.loss(logits, labels)), rel=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("C", [1e-4, 1e-2, 1.0])
def test_sample_weights_of_the_solver_agree_with_scikit_learn(classes: int, C: float) -> None:
    """Weights change what is optimal: a third class of the images, and random weights between 0.5 and 2."""
    raw, labels = load_digits(return_X_y=True)
    features = (raw - raw.mean()) / raw.std()
    rows = np.concatenate([np.flatnonzero(labels == k)[: (120, 40, 15)[k]] for k in range(classes)])
    features, labels = features[rows], labels[rows]
    weights = np.array(balanced_weights(np.bincount(labels).tolist()))[labels]
    weights = weights * np.random.default_rng(0).uniform(0.5, 2, len(labels))
    model = LogisticRegression(C=C, tol=1e-9, max_iter=20_000).fit(features, labels, sample_weight=weights)
    weight, bias = fit_linear_probe(features, labels, C, weights)
    logits = features @ weight.T + bias
    expected = model.decision_function(features)
    found = logits[:, 1] - logits[:, 0] if classes == 2 else logits - logits.mean(1, keepdims=True)
    if classes > 2:
        expected = expected - expected.mean(1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    unweighted, _ = fit_linear_probe(features, labels, C)
    assert np.abs(unweighted - weight).max() > 0.01 * np.abs(weight).max()


def test_weights_of_one_change_nothing() -> None:
    features, labels = load_digits(return_X_y=True)
    features = features[:200] / 16
    plain = fit_linear_probe(features, labels[:200], 0.1)
    ones = fit_linear_probe(features, labels[:200], 0.1, np.ones(200))
    np.testing.assert_allclose(ones[0], plain[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ones[1], plain[1], rtol=1e-9, atol=1e-12)


def test_bad_sample_weights() -> None:
    with pytest.raises(ValueError) as error:
        fit_linear_probe(np.eye(2), np.array([0, 1]), 1.0, np.array([1.0, 0.0]))
    assert str(error.value) == (
        "Sample weights of a linear probe are one positive number per label, but got (2,) for 2 labels, the smallest 0."
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_weights": "even"}, "class_weights must be 'balanced' or nothing, but got 'even'."),
        ({"label_smoothing": 1.0}, "0 < label_smoothing < 1 must hold, but got 1.0."),
        ({"focal_gamma": math.inf}, "focal_gamma must be a positive number, but got inf."),
        (
            {"focal_gamma": 2.0, "label_smoothing": 0.1},
            "The focal loss is defined for one right class, but label_smoothing spreads the target over all of them, "
            "and got focal_gamma 2.0 and label_smoothing 0.1. Leave one of the two out.",
        ),
    ],
)
def test_bad_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        LossSettings(**fields)
    assert str(error.value) == message


def test_settings_survive_the_config_of_a_trial() -> None:
    import dataclasses
    import json

    from trainables.specs.trial_spec import ModelSpec

    shared = SharedTrialSettings(
        store="s", model=ModelSpec(name="n"), metric="ap", sampling="balanced", loss=LossSettings(focal_gamma=2.0)
    )
    assert SharedTrialSettings.from_dict(json.loads(json.dumps(dataclasses.asdict(shared)))) == shared
