"""Linear probe: L2-regularised logistic regression on frozen features, C chosen on validation data."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from trainables.specs.measurements import Curve
from trainables.specs.metrics import (
    ACCURACY,
    PROBE_C,
    PROBE_C_HIGH,
    PROBE_C_LOW,
    PROBE_PATH,
    PROBE_VAL,
    PROBE_WITHIN_SE,
    VAL,
    task_metrics,
)
from trainables.storage.atomic_files import atomic_file
from trainables.storage.checkpoint_format import save_tensors
from trainables.storage.compute_once import compute_once
from trainables.tasks.base import PROBE_RULE, ProbeRule
from trainables.tasks.class_weights import balanced_weights
from trainables.tasks.logistic_path import logistic_path
from trainables.tasks.probe_rule import ValidationPath

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel
    from trainables.specs.measurements import Report


log = logging.getLogger("luthier")

Doubles = NDArray[np.float64]
LOWEST_C = -7
HIGHEST_C = 2
"""Ends of the regularisation path, as powers of ten."""
ABSENT = 1e-6
"""Upper bound on the probability of a class without training images, on any training image."""
SINGLE_FIT = 1e-10
"""Tolerance of `fit_linear_probe`, see `logistic_path`."""
CURVE = "linear_probe"
"""Name of the recorded curve."""
LOSS_COLUMN = "loss"
"""Its column of the negative log-likelihood, which class weights may make another number than `val/nll`."""
FORMAT = 3
"""Version of the solutions on disk; increase when they would be computed differently."""


@dataclass(frozen=True)
class Probe:
    """Solution of one C, for unscaled features."""

    weight: NDArray[np.float32]
    """(K, D)"""
    bias: NDArray[np.float32]
    """(K,)"""
    C: float
    validation: float
    """Selection metric on ID validation, as recorded; NaN = not measured."""
    metric: str = ACCURACY.key
    """Key of the selection metric."""
    curve: ProbeCurve | None = None
    """What C was chosen on; None = it was given."""


@dataclass(frozen=True)
class ProbeCurve:
    """ID validation along a path of M values of C."""

    path: tuple[float, ...]
    values: tuple[float, ...]
    """Selection metric, as recorded."""
    losses: tuple[float, ...]
    """Negative log-likelihood, weighted as the training loss is."""
    within: tuple[bool, ...]
    """Whether the selection metric is within one standard error of the best, see `ValidationPath`."""

    @property
    def flat(self) -> list[float]:
        """Values of C within one standard error of the best, ascending."""
        return [C for C, within in zip(self.path, self.within, strict=True) if within]


def regularisation_path(count: int) -> list[float]:
    """Log-spaced values of C from 1e-7 to 1e2."""
    return [float(c) for c in np.logspace(LOWEST_C, HIGHEST_C, count)]


def fit_linear_probe(
    features: NDArray[Any], labels: NDArray[Any], C: float, sample_weight: NDArray[Any] | None = None
) -> tuple[Doubles, Doubles]:
    """Minimise C · Σᵢ sᵢ · cross-entropyᵢ + ½‖W‖² (scikit-learn's C; unpenalised bias).

    Args:
        features: (N, D), used without scaling.
        labels: (N,) integers 0 … K−1, each class present.
        C: inverse regularisation strength, positive.
        sample_weight: (N,) positive weights s; None = 1 for all.

    Returns:
        weight (K, D) and bias (K,), float64. Two classes have a row each, of opposite sign; their difference is
        scikit-learn's single row.

    Raises:
        ValueError: C or a weight is not positive, a feature is not finite, the lengths differ, or a class is missing.
    """
    features = np.asarray(features)
    labels = np.asarray(labels)
    if not C > 0:
        raise ValueError(f"C must be positive, but got {C!r}.")
    _check_features(features, labels)
    present = np.unique(labels)
    classes = int(labels.max()) + 1
    if len(present) != classes or classes < 2:
        raise ValueError(
            f"A linear probe needs at least two classes, numbered from 0 without a gap, but the labels hold "
            f"{', '.join(map(str, present[:10]))}."
        )
    if sample_weight is not None:
        sample_weight = np.asarray(sample_weight, dtype=np.float64)
        if sample_weight.shape != labels.shape or not (sample_weight > 0).all() or not np.isfinite(sample_weight).all():
            raise ValueError(
                f"Sample weights of a linear probe are one positive number per label, but got {sample_weight.shape} "
                f"for {len(labels)} labels, the smallest {sample_weight.min(initial=np.inf):g}."
            )
    # Tighter than along a path, where it would cost a hundred times as much.
    return next(logistic_path(features, labels, [C], sample_weight=sample_weight, tolerance=SINGLE_FIT))


def best_linear_probe(data: TrialData, path: Sequence[float] | None = None, rule: ProbeRule = PROBE_RULE) -> Probe:
    """Probe of the C that a rule chooses on ID validation along an ascending path.

    Computed once per data, path, rule and settings and cached on disk, so that LP and LP-FT share it. With class
    weights, the objective has them as sample weights, and the rule `nll` weights the likelihood by them. A refit, which
    has no validation images, takes over the C of its trial.

    Args:
        data: the trial's data; fitted on `train`, C selected on `val`.
        path: values of C; None = the usual 100 (`regularisation_path`).
        rule: see `trainables.tasks.base.ProbeRule`; without effect on a path of one value.

    Raises:
        ValueError: a feature is not finite, all features are alike, or fewer than two classes have training images.
    """
    if not data.has_validation:
        return _at(data, data.recorded_choice(PROBE_C.name))
    path = regularisation_path(100) if path is None else path
    shared = data.spec.shared
    identity = [FORMAT, list(path), rule, shared.metric, shared.loss.class_weights]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    file = data.solution_folder / f"linear_probe-{name}.safetensors"
    return compute_once(file, _load, lambda: _choose(data, path, rule), _save)


def _at(data: TrialData, C: float) -> Probe:
    """The solution of one C, without a validation score."""
    (_, weight, bias), *_ = _solutions(data, [C])
    return Probe(weight.astype(np.float32), bias.astype(np.float32), C, math.nan)


def _choose(data: TrialData, path: Sequence[float], rule: ProbeRule) -> Probe:
    features = np.asarray(data.features("val"), dtype=np.float64)
    shared = data.spec.shared
    metrics = task_metrics(shared.task).selecting(shared.metric)
    class_weights = None
    if shared.loss.class_weights is not None:
        counts = np.bincount(data.labels("train"), minlength=data.num_classes)
        class_weights = np.array(balanced_weights(counts.tolist()))
    validation = ValidationPath(data.labels("val"), metrics, class_weights)
    solutions = []
    for _, weight, bias in _solutions(data, path):
        validation.add(features @ weight.T + bias)
        solutions.append((weight.astype(np.float32), bias.astype(np.float32)))
    choice = validation.choose(rule)
    chosen_weight, chosen_bias = solutions[choice.index]
    curve = None
    if len(path) > 1:
        curve = ProbeCurve(tuple(path), choice.values, choice.losses, choice.within)
    value = choice.values[choice.index]
    return Probe(chosen_weight, chosen_bias, path[choice.index], value, metrics.selection.key, curve)


def _solutions(data: TrialData, path: Sequence[float]) -> Iterator[tuple[float, Doubles, Doubles]]:
    """Solutions (C, weight (K, D), bias (K,)) along the path, for unscaled features."""
    features = np.asarray(data.features("train"), dtype=np.float64)
    labels = data.labels("train")
    _check_features(features, labels)
    # One mean and one standard deviation for all channels: L2 regularisation depends on relative channel scales.
    mean = float(features.mean())
    scale = float(features.std())
    present, positions = np.unique(labels, return_inverse=True)
    if not scale > 0 or len(present) < 2:
        raise ValueError(
            f"A linear probe needs features that differ and images of two classes, but the training split has "
            f"{len(present)} class(es) and features of standard deviation {scale:g}."
        )
    standard = (features - mean) / scale
    sample_weight = None
    if data.spec.shared.loss.class_weights is not None:
        sample_weight = np.array(balanced_weights(np.bincount(positions).tolist()))[positions]
    solutions = logistic_path(standard, positions, path, data.device, sample_weight)
    for C, (rows, offsets) in zip(path, solutions, strict=True):
        # Fold the standardisation into the solution.
        weight = rows / scale
        bias = offsets - rows.sum(1) * mean / scale
        if len(present) < data.num_classes:
            weight, bias = _with_absent(weight, bias, present, data.num_classes, features)
        yield C, weight, bias


def _with_absent(
    weight: Doubles, bias: Doubles, present: NDArray[Any], classes: int, features: Doubles
) -> tuple[Doubles, Doubles]:
    """Add rows for classes without training images (in a fold without one domain).

    Their optimal bias is minus infinity; they get weight zero and the bias that bounds their probability by `ABSENT`.
    """
    logits = features @ weight.T + bias
    highest = logits.max(1, keepdims=True)  # subtracted, so that the exponential cannot overflow
    log_sum_exp = highest[:, 0] + np.log(np.exp(logits - highest).sum(1))
    absent_bias = float(log_sum_exp.min()) + np.log(ABSENT)
    all_weight = np.zeros((classes, weight.shape[1]))
    all_bias = np.full(classes, absent_bias)
    all_weight[present] = weight
    all_bias[present] = bias
    return all_weight, all_bias


def _check_features(features: NDArray[Any], labels: NDArray[Any]) -> None:
    if features.ndim != 2 or len(features) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"A linear probe needs one row of features per label, but got features of shape {features.shape} and "
            f"{len(labels)} labels."
        )
    if not np.isfinite(features).all():
        raise ValueError("Features of a linear probe must be finite, but some are NaN or infinite.")


def _save(probe: Probe, file: Path) -> None:
    curve = None if probe.curve is None else asdict(probe.curve)
    values = {"C": probe.C, "validation": probe.validation, "metric": probe.metric, "curve": curve}
    with atomic_file(file) as written:
        tensors = {name: torch.as_tensor(getattr(probe, name)) for name in ("weight", "bias")}
        save_tensors(tensors, written, {"probe": json.dumps(values)})


def _load(file: Path) -> Probe | None:
    """Solution on disk; None if absent or damaged (it is then computed again)."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="numpy") as tensors:
            metadata = json.loads(tensors.metadata()["probe"])
            curve = metadata["curve"]
            return Probe(
                weight=tensors.get_tensor("weight"),
                bias=tensors.get_tensor("bias"),
                C=metadata["C"],
                validation=metadata["validation"],
                metric=metadata["metric"],
                curve=None if curve is None else ProbeCurve(**{name: tuple(values) for name, values in curve.items()}),
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("The stored linear probe %s is damaged (%s) and is computed again.", file, error)
        return None


@torch.no_grad()
def take_probe(model: TaskModel, probe: Probe) -> Report:
    """Copy a probe's solution into the head.

    Returns its C and, where it has them, its selection metric on validation and the curve that C was chosen on.
    """
    model.head.weight.copy_(torch.as_tensor(probe.weight))
    model.head.bias.copy_(torch.as_tensor(probe.bias))
    report: dict[str, float | Curve] = {PROBE_C.name: probe.C}
    if not math.isnan(probe.validation):
        report[PROBE_VAL.of(probe.metric)] = probe.validation
    if probe.curve is not None:
        flat = probe.curve.flat
        report[PROBE_C_LOW.name] = flat[0]
        report[PROBE_C_HIGH.name] = flat[-1]
        report[PROBE_WITHIN_SE.name] = float(len(flat))
        report[PROBE_PATH.name] = float(len(probe.curve.path))
        report[CURVE] = _recorded(probe.curve, probe.metric)
    return report


def _recorded(curve: ProbeCurve, metric: str) -> Curve:
    columns = {
        "C": curve.path,
        f"{VAL}/{metric}": curve.values,
        LOSS_COLUMN: curve.losses,
        "within_one_se": [float(within) for within in curve.within],
    }
    return Curve(columns, "Validation of the linear probe along its regularisation path.")
