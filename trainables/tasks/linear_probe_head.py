"""Linear probe: L2-regularised logistic regression on frozen features, C chosen on validation data."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from trainables.specs.metrics import ACCURACY, NLL, PROBE_C, PROBE_VAL, TaskMetrics, task_metrics
from trainables.storage.atomic_files import atomic_file
from trainables.storage.checkpoint_format import save_tensors
from trainables.storage.compute_once import compute_once
from trainables.tasks.class_weights import balanced_weights
from trainables.tasks.classification_metrics import classification_metrics
from trainables.tasks.logistic_path import logistic_path

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel


log = logging.getLogger("luthier")

Doubles = NDArray[np.float64]
LOWEST_C = -7
HIGHEST_C = 2
"""Ends of the regularisation path, as powers of ten."""
ABSENT = 1e-6
"""Upper bound on the probability of a class without training images, on any training image."""
FORMAT = 2
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
    return next(logistic_path(features, labels, [C], sample_weight=sample_weight))


def best_linear_probe(data: TrialData, path: Sequence[float] | None = None) -> Probe:
    """Probe with the best selection metric on ID validation along an ascending path of C.

    Ties go to the tie-breaker, then to the smaller C. Computed once per data, path and settings and cached on disk, so
    that LP and LP-FT share it. With class weights, the objective has them as sample weights. A refit, which has no
    validation images, takes over the C of its trial.

    Args:
        data: the trial's data; fitted on `train`, C selected on `val`.
        path: values of C; None = the usual 100 (`regularisation_path`).

    Raises:
        ValueError: a feature is not finite, all features are alike, or fewer than two classes have training images.
    """
    if not data.has_validation:
        return _at(data, data.recorded_choice(PROBE_C.name))
    path = regularisation_path(100) if path is None else path
    identity: list[Any] = [FORMAT, list(path)]
    shared = data.spec.shared
    if shared.metric is not None or shared.loss.class_weights is not None:
        # Left out at their defaults, whose solutions keep the names that they had before these settings.
        identity += [shared.metric, shared.loss.class_weights]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    file = data.solution_folder / f"linear_probe-{name}.safetensors"
    return compute_once(file, _load, lambda: _choose(data, path), _save)


def _at(data: TrialData, C: float) -> Probe:
    """The solution of one C, without a validation score."""
    (_, weight, bias), *_ = _solutions(data, [C])
    return Probe(weight.astype(np.float32), bias.astype(np.float32), C, math.nan)


def _choose(data: TrialData, path: Sequence[float]) -> Probe:
    validation = np.asarray(data.features("val"), dtype=np.float64)
    targets = data.labels("val")
    shared = data.spec.shared
    metrics = task_metrics(shared.task).selecting(shared.metric)
    selection = metrics.selection.key
    best: Probe | None = None
    best_order: tuple[float, float] | None = None
    for C, weight, bias in _solutions(data, path):
        values = _validation_values(validation @ weight.T + bias, targets, metrics)
        order = metrics.order(values[selection], values[metrics.tie_breaker.key])
        # Strictly greater: of equal scores the first, with the smaller C, is kept.
        if best_order is None or order > best_order:
            best_order = order
            best = Probe(weight.astype(np.float32), bias.astype(np.float32), C, values[selection], selection)
    assert best is not None
    return best


def _validation_values(logits: Doubles, targets: NDArray[Any], metrics: TaskMetrics) -> dict[str, float]:
    """Selection metric and tie-breaker by key."""
    values = {ACCURACY.key: float((logits.argmax(1) == targets).mean()), NLL.key: _nll(logits, targets)}
    others = {metrics.selection.key, metrics.tie_breaker.key} - values.keys()
    if others:
        values |= classification_metrics(torch.from_numpy(logits), torch.from_numpy(targets), others)
    return values


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


def _nll(logits: Doubles, targets: NDArray[Any]) -> float:
    """Mean negative log-likelihood."""
    # By the largest logit, so that the exponential cannot overflow.
    shifted = logits - logits.max(1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(targets)), targets]).mean())


def _check_features(features: NDArray[Any], labels: NDArray[Any]) -> None:
    if features.ndim != 2 or len(features) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"A linear probe needs one row of features per label, but got features of shape {features.shape} and "
            f"{len(labels)} labels."
        )
    if not np.isfinite(features).all():
        raise ValueError("Features of a linear probe must be finite, but some are NaN or infinite.")


def _save(probe: Probe, file: Path) -> None:
    metadata = {"probe": json.dumps({"C": probe.C, "validation": probe.validation, "metric": probe.metric})}
    with atomic_file(file) as written:
        save_tensors({name: torch.as_tensor(getattr(probe, name)) for name in ("weight", "bias")}, written, metadata)


def _load(file: Path) -> Probe | None:
    """Solution on disk; None if absent or damaged (it is then computed again)."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="numpy") as tensors:
            metadata = json.loads(tensors.metadata()["probe"])
            return Probe(
                weight=tensors.get_tensor("weight"),
                bias=tensors.get_tensor("bias"),
                C=metadata["C"],
                validation=metadata["validation"],
                metric=metadata["metric"],
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("The stored linear probe %s is damaged (%s) and is computed again.", file, error)
        return None


@torch.no_grad()
def take_probe(model: TaskModel, probe: Probe) -> dict[str, float]:
    """Copy a probe's solution into the head.

    Returns its C and, where it has one, its selection metric on validation.
    """
    model.head.weight.copy_(torch.as_tensor(probe.weight))
    model.head.bias.copy_(torch.as_tensor(probe.bias))
    validation = {} if math.isnan(probe.validation) else {PROBE_VAL.of(probe.metric): probe.validation}
    return {PROBE_C.name: probe.C, **validation}
