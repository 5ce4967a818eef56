"""The linear probe against scikit-learn, its choice of C, and its solution on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

import trainables.tasks.linear_probe_head
from tests.conformance import StrategyConformance
from trainables.linear_probe import LinearProbe, best_linear_probe, fit_linear_probe, regularisation_path
from trainables.models.task_model import TaskModel
from trainables.specs.measurements import Curve
from trainables.specs.trial_spec import LossSettings, ModelSpec, SharedTrialSettings, TrialSpec
from trainables.tasks.class_weights import balanced_weights
from trainables.tasks.linear_probe_head import take_probe
from trainables.tasks.logistic_path import logistic_path


class TestConformance(StrategyConformance):
    strategy = "linear_probe"
    reports = frozenset(["linear_probe/*"])


def digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """scikit-learn's handwritten digits, standardised by one scalar mean and deviation."""
    features, labels = load_digits(return_X_y=True)
    return (features - features.mean()) / features.std(), labels.astype(np.int64)


def objective(features: Any, labels: Any, weight: Any, bias: Any, C: float) -> float:
    """C · Σ cross-entropy + ½‖W‖², for two classes in scikit-learn's form of one vector of log-odds."""
    logits = features @ weight.T + bias
    logits = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    penalty = np.square(weight[1] - weight[0]).sum() if len(weight) == 2 else np.square(weight).sum()
    return float(C * losses.sum() + 0.5 * penalty)


def reference(features: Any, labels: Any, C: float, steps: int = 10_000) -> tuple[Any, Any]:
    """scikit-learn's solution, iterated to the end, with a row for each class."""
    model = LogisticRegression(C=C, tol=1e-7, max_iter=steps).fit(features, labels)
    weight, bias = model.coef_, model.intercept_
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("C", [1e-7, 1e-4, 1e-2, 1.0, 100.0])
def test_it_agrees_with_scikit_learn(classes: int, C: float) -> None:
    features, labels = digits()
    chosen = labels < classes
    train, test = np.flatnonzero(chosen)[:600], np.flatnonzero(chosen)[600:1200]
    weight, bias = fit_linear_probe(features[train], labels[train], C)
    assert (weight.shape, bias.shape) == ((classes, 64), (classes,))
    expected = reference(features[train], labels[train], C)
    ours = objective(features[train], labels[train], weight, bias, C)
    # An optimum: no worse than scikit-learn's, and as good to far below the tolerance of the task.
    assert ours == pytest.approx(objective(features[train], labels[train], *expected, C), rel=1e-5)
    right = (features[test] @ weight.T + bias).argmax(1) == labels[test]
    expected_right = (features[test] @ expected[0].T + expected[1]).argmax(1) == labels[test]
    assert abs(int(right.sum()) - int(expected_right.sum())) <= 1


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_features_far_from_zero_and_badly_scaled_are_solved_too() -> None:
    features, labels = digits()
    scaled = features[:500, 10:40] * np.logspace(-3, 2, 30) + 50
    weight, bias = fit_linear_probe(scaled, labels[:500], 0.1)
    expected = objective(scaled, labels[:500], *reference(scaled, labels[:500], 0.1, steps=1000), 0.1)
    # Here scikit-learn stops before its optimum.
    assert objective(scaled, labels[:500], weight, bias, 0.1) <= expected * (1 + 1e-6)


def test_with_almost_no_freedom_the_probe_learns_only_how_frequent_classes_are() -> None:
    features, labels = digits()
    keep = np.concatenate([np.flatnonzero(labels == 0)[:150], np.flatnonzero(labels == 1)[:50]])
    weight, bias = fit_linear_probe(features[keep], labels[keep], 1e-12)
    assert np.abs(weight).max() < 1e-8
    assert bias[0] - bias[1] == pytest.approx(np.log(3), rel=1e-6)


def test_a_path_gives_the_solutions_of_single_fits() -> None:
    features, labels = digits()
    path = regularisation_path(5)
    for C, (weight, bias) in zip(path, logistic_path(features[:400], labels[:400], path), strict=True):
        single = fit_linear_probe(features[:400], labels[:400], C)
        value = objective(features[:400], labels[:400], weight, bias, C)
        assert value == pytest.approx(objective(features[:400], labels[:400], *single, C), rel=1e-5)


def count_passes(monkeypatch: pytest.MonkeyPatch, solve: Callable[[], object]) -> int:
    """Passes over the features that a solver makes: each has one softmax."""
    passes = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal passes
            passes += 1
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("softmax", "log_softmax"):
            patch.setattr(torch, name, counted(getattr(torch, name)))
        solve()
    return passes


@pytest.mark.parametrize("deviations", [(1.0, 1.0), (1.0, 1e-3)], ids=["well conditioned", "ill conditioned"])
def test_a_path_takes_fewer_passes_than_scikit_learn_and_ends_lower(
    deviations: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 400)
    centres = generator.normal(size=(5, 24)) / 4
    features = (generator.normal(size=(400, 24)) + centres[labels]) * np.geomspace(*deviations, 24)
    features /= features.std()
    path = regularisation_path(100)
    ours: list[Any] = []
    passes = count_passes(monkeypatch, lambda: ours.extend(logistic_path(features, labels, path)))
    model = LogisticRegression(warm_start=True, max_iter=10_000)
    iterations = 0
    for C, (weight, bias) in zip(path, ours, strict=True):
        model.set_params(C=C).fit(features, labels)
        iterations += 1 + int(model.n_iter_[0])
        reached = objective(features, labels, model.coef_, model.intercept_, C)
        assert objective(features, labels, weight, bias, C) <= reached * (1 + 1e-5)
    assert passes < iterations


def test_more_channels_than_images_are_solved_in_the_span_of_the_images() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(40) % 4
    features = generator.normal(size=(40, 120)) + np.eye(4, 120)[labels] * 3
    weight, bias = fit_linear_probe(features, labels, 10.0)
    expected = reference(features, labels, 10.0)
    assert objective(features, labels, weight, bias, 10.0) <= objective(features, labels, *expected, 10.0) * (1 + 1e-6)
    np.testing.assert_allclose(weight, expected[0], atol=2e-3)


def test_the_reference_path() -> None:
    path = regularisation_path(100)
    assert len(path) == 100
    assert [path[0], path[-1]] == pytest.approx([1e-7, 1e2])
    assert np.diff(np.log10(path)) == pytest.approx(np.full(99, 9 / 99))


@pytest.mark.parametrize(
    ("features", "labels", "C", "message"),
    [
        (np.eye(2), [0, 1], 0.0, "C must be positive, but got 0.0."),
        (np.eye(2) * np.nan, [0, 1], 1.0, "Features of a linear probe must be finite, but some are NaN or infinite."),
        (np.eye(2), [0, 2], 1.0, "A linear probe needs at least two classes, numbered from 0 without a gap, but the "
                                 "labels hold 0, 2."),
        (np.eye(2), [0, 0], 1.0, "A linear probe needs at least two classes, numbered from 0 without a gap, but the "
                                 "labels hold 0."),
        (np.eye(3), [0, 1], 1.0, "A linear probe needs one row of features per label, but got features of shape (3, 3) "
                                 "and 2 labels."),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted(features: Any, labels: list[int], C: float, message: str) -> None:
    with pytest.raises(ValueError) as error:
        fit_linear_probe(features, np.array(labels), C)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"C": -1.0}, "C must be positive, but got -1.0."),
        ({"num_C": 1}, "num_C must be at least 2, but got 1."),
        ({"rule": "best"}, "rule must be one of 'nll_one_se', 'nll', 'one_se', 'argmax', but got 'best'."),
    ],
)
def test_bad_knobs(hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        LinearProbe.from_hparams(hparams)
    assert str(error.value) == message


def spec(**shared: Any) -> TrialSpec:
    settings = SharedTrialSettings(store="memory", model=ModelSpec(name="none"), **shared)
    return TrialSpec(shared=settings, strategy="linear_probe")


@dataclass
class Data:
    """The part of TrialData that the probe uses."""

    train: tuple[NDArray[Any], NDArray[Any]]
    val: tuple[NDArray[Any], NDArray[Any]]
    solution_folder: Path
    num_classes: int = 10
    device: str = "cpu"
    has_validation: bool = True
    spec: TrialSpec = field(default_factory=lambda: spec())

    def features(self, split: str) -> NDArray[Any]:
        array: NDArray[Any] = getattr(self, split)[0]
        return array

    def labels(self, split: str) -> NDArray[Any]:
        array: NDArray[Any] = getattr(self, split)[1]
        return array


@pytest.fixture
def data(tmp_path: Path) -> Any:
    raw, labels = load_digits(return_X_y=True)
    raw = raw.astype(np.float32)
    return Data((raw[:300], labels[:300]), (raw[300:700], labels[300:700]), tmp_path / "solutions")


def test_the_best_c_on_validation_is_chosen_and_the_standardisation_is_folded_in(data: Any) -> None:
    features, labels = data.train
    mean = features.mean(dtype=np.float64)
    scale = features.std(dtype=np.float64)
    validation, targets = data.val
    scores = {}
    for C in (path := regularisation_path(10)):
        model = LogisticRegression(C=C, tol=1e-7, max_iter=10_000).fit((features - mean) / scale, labels)
        inputs = (validation - mean) / scale
        nll = -np.log(model.predict_proba(inputs)[np.arange(len(targets)), targets]).mean()
        scores[C] = (model.score(inputs, targets), -nll, model)
    best = max(scores, key=lambda C: scores[C][:2])
    probe = best_linear_probe(data, path, "argmax")
    assert best == probe.C
    assert probe.validation == pytest.approx(scores[best][0], abs=1 / len(targets))
    expected = scores[best][2].decision_function((validation - mean) / scale)
    logits = validation @ probe.weight.T + probe.bias
    np.testing.assert_allclose(logits, expected, atol=2e-3 * np.abs(expected).max())


def test_c_is_not_the_argmax_of_a_flat_curve(data: Any) -> None:
    """On few validation images the largest accuracy is that of a C that happens to classify one more."""
    raw, labels = load_digits(return_X_y=True)
    chosen: dict[str, list[float]] = {"argmax": [], "nll_one_se": []}
    for start in range(300, 1500, 200):
        data.val = (raw[start : start + 60].astype(np.float32), labels[start : start + 60])
        for number, rule in enumerate(chosen):
            data.solution_folder = data.solution_folder.with_name(f"{start}-{number}")
            probe = best_linear_probe(data, regularisation_path(30), rule)  # type: ignore[arg-type]
            chosen[rule].append(math.log10(probe.C))
    assert np.std(chosen["nll_one_se"]) < np.std(chosen["argmax"])
    default = best_linear_probe(data, regularisation_path(30))
    assert math.log10(default.C) == chosen["nll_one_se"][-1]


def test_what_was_chosen_is_recorded_with_the_curve(data: Any) -> None:
    path = regularisation_path(10)
    probe = best_linear_probe(data, path)
    model = TaskModel(nn.Identity(), nn.Linear(64, 10))
    report = dict(take_probe(model, probe))
    curve = report.pop("linear_probe")
    assert isinstance(curve, Curve)
    assert curve.columns["C"] == tuple(path)
    index = path.index(probe.C)
    assert curve.columns["val/acc"][index] == probe.validation
    accuracies = np.array(curve.columns["val/acc"])
    within = np.flatnonzero(curve.columns["within_one_se"])
    # The best is among them, and all of them are nearly as accurate.
    assert accuracies.argmax() in within
    assert accuracies[within].min() > accuracies.max() - 0.02
    assert report == {
        "linear_probe/C": probe.C,
        "linear_probe/val_acc": probe.validation,
        "linear_probe/C_low": path[within[0]],
        "linear_probe/C_high": path[within[-1]],
        "linear_probe/within_se": len(within),
        "linear_probe/path": 10,
    }


def test_a_given_c_has_no_curve(data: Any) -> None:
    probe = best_linear_probe(data, [0.01])
    model = TaskModel(nn.Identity(), nn.Linear(64, 10))
    assert take_probe(model, probe) == {"linear_probe/C": 0.01, "linear_probe/val_acc": probe.validation}


def test_the_solution_is_computed_once_and_read_by_any_later_process(
    data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = regularisation_path(4)
    first = best_linear_probe(data, path)

    def never(*arguments: Any) -> Any:
        raise AssertionError("solved again")

    monkeypatch.setattr(trainables.tasks.linear_probe_head, "logistic_path", never)
    second = best_linear_probe(data, path)
    assert (first.C, first.validation) == (second.C, second.validation)
    np.testing.assert_array_equal(first.weight, second.weight)
    np.testing.assert_array_equal(first.bias, second.bias)
    assert first.curve == second.curve is not None
    with pytest.raises(AssertionError, match="solved again"):
        best_linear_probe(data, path, "argmax")
    with pytest.raises(AssertionError, match="solved again"):
        best_linear_probe(data, [*path[:-1], path[-1] * (1 + 1e-9)])


def test_a_damaged_solution_is_computed_again(data: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = regularisation_path(4)
    first = best_linear_probe(data, path)
    (file,) = data.solution_folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    second = best_linear_probe(data, path)
    np.testing.assert_array_equal(first.weight, second.weight)
    assert f"The stored linear probe {file} is damaged" in caplog.text


def test_a_class_without_training_images_is_as_good_as_never_predicted(data: Any) -> None:
    features, labels = data.train
    data.train = (features[labels != 3], labels[labels != 3])
    probe = best_linear_probe(data, [1e-3, 1e-2])
    logits = np.asarray(data.train[0], np.float64) @ probe.weight.T.astype(np.float64) + probe.bias
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    assert share[:, 3].max() == pytest.approx(1e-6, rel=1e-2)
    assert not probe.weight[3].any()
    assert probe.validation > 0.7


def test_features_that_are_all_alike_are_an_error(data: Any) -> None:
    data.train = (np.ones_like(data.train[0]), data.train[1])
    with pytest.raises(ValueError) as error:
        best_linear_probe(data, [1.0])
    assert str(error.value) == (
        "A linear probe needs features that differ and images of two classes, but the training split has 10 class(es) "
        "and features of standard deviation 0."
    )


def rare_digits(data: Any, **shared: Any) -> Any:
    """Threes among eights, a twentieth of the images, with noise that only strong regularisation ignores."""
    raw, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    common, rare = np.flatnonzero(labels == 8), np.flatnonzero(labels == 3)
    splits = []
    for start in (0, 80):
        rows = np.concatenate([common[start : start + 76], rare[start : start + 4]])
        features = raw[rows] + generator.normal(0, 6, (80, 64))
        splits.append((features.astype(np.float32), (labels[rows] == 3).astype(np.int64)))
    return Data(splits[0], splits[1], data.solution_folder, 2, spec=spec(**shared))


@pytest.mark.parametrize("metric", ["balanced_acc", "macro_f1", "auroc", "ap", "nll", "brier"])
def test_the_metric_of_the_study_chooses_c(data: Any, metric: str) -> None:
    path = regularisation_path(10)
    chosen = best_linear_probe(rare_digits(data, metric=metric), path, "argmax")
    values = {}
    for C in path:
        alone = best_linear_probe(rare_digits(data, metric=metric), [C])
        values[C] = alone.validation
    best = min(values.values()) if metric in ("nll", "brier") else max(values.values())
    assert chosen.validation == pytest.approx(best, rel=1e-3)
    assert chosen.metric == metric
    assert len(set(values.values())) > 1


def test_solutions_of_other_metrics_and_weights_are_kept_apart(data: Any) -> None:
    path = regularisation_path(4)
    settings: list[dict[str, Any]] = [{}, {"metric": "balanced_acc"}, {"loss": LossSettings(class_weights="balanced")}]
    for shared in settings:
        best_linear_probe(rare_digits(data, **shared), path)
    assert len(list(data.solution_folder.glob("*.safetensors"))) == len(settings)


def test_class_weights_are_sample_weights_of_the_standardised_problem(data: Any) -> None:
    weighted = rare_digits(data, loss=LossSettings(class_weights="balanced"))
    features, labels = weighted.train
    features = features.astype(np.float64)
    probe = best_linear_probe(weighted, [0.01])
    weights = np.array(balanced_weights(np.bincount(labels).tolist()))[labels]
    standard = (features - features.mean()) / features.std()
    model = LogisticRegression(C=0.01, tol=1e-9, max_iter=10_000).fit(standard, labels, sample_weight=weights)
    logits = features @ probe.weight.T + probe.bias
    expected = model.decision_function(standard)
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], expected, atol=2e-3 * np.abs(expected).max())
