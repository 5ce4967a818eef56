"""Linear probe: L2-regularised logistic regression on frozen features along a path of C, and its head."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trainables.specs.metrics import ACCURACY, PROBE_C
from trainables.storage.atomic_files import atomic_file
from trainables.storage.compute_once import compute_once
from trainables.tasks.logistic_path import logistic_path

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel


log = logging.getLogger("luthier")

Doubles = NDArray[np.float64]
LOWEST_C, HIGHEST_C = -7, 2
"""Powers of ten."""
ABSENT = 1e-6
"""Probability that a class without training images may have on any training image."""
FORMAT = 1
"""Of the solutions on disk; raised when they would be computed differently."""


@dataclass(frozen=True)
class Probe:
    """One solution, for features as the backbone gives them."""

    weight: NDArray[np.float32]
    """(K, D)"""
    bias: NDArray[np.float32]
    """(K,)"""
    C: float
    val_accuracy: float
    """In [0, 1]."""


def regularisation_path(count: int) -> list[float]:
    """`count` values of C, log-spaced from 1e-7 to 1e2."""
    return [float(c) for c in np.logspace(LOWEST_C, HIGHEST_C, count)]


def fit_linear_probe(features: NDArray[Any], labels: NDArray[Any], C: float) -> tuple[Doubles, Doubles]:
    """The optimum of C · Σᵢ cross-entropyᵢ + ½‖W‖² (scikit-learn's C; the bias is not penalised).

    Args:
        features: (N, D), used as they are.
        labels: (N,) integers 0 … K−1, each class present.
        C: inverse regularisation strength, positive.

    Returns:
        weight (K, D) and bias (K,), float64. Two classes get a row each, of opposite sign; their difference is the one
        row of scikit-learn.

    Raises:
        ValueError: C is not positive, a feature is not finite, the lengths differ, or a class is missing.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    if not C > 0:
        raise ValueError(f"C must be positive, but got {C!r}.")
    _check_features(features, labels)
    present, classes = np.unique(labels), int(labels.max()) + 1
    if len(present) != classes or classes < 2:
        raise ValueError(
            f"A linear probe needs at least two classes, numbered from 0 without a gap, but the labels hold "
            f"{', '.join(map(str, present[:10]))}."
        )
    return next(logistic_path(features, labels, [C]))


def best_linear_probe(data: TrialData, path: Sequence[float] | None = None) -> Probe:
    """The probe of a trial's data with the best ID validation accuracy along an ascending path of C.

    Ties go to the lower validation NLL, then to the smaller C. Computed once per data and path and kept on disk beside
    the features, so that LP and LP-FT share it.

    Args:
        data: the trial's data; `train` is fitted, `val` chooses.
        path: None = the reference practice of 100 values.

    Raises:
        ValueError: a feature is not finite, all features are alike, or fewer than two classes have training images.
    """
    path = regularisation_path(100) if path is None else path
    name = hashlib.sha256(json.dumps([FORMAT, list(path)]).encode()).hexdigest()[:12]
    file = data.solution_folder / f"linear_probe-{name}.safetensors"
    return compute_once(file, _load, lambda: _choose(data, path), _save)


def _choose(data: TrialData, path: Sequence[float]) -> Probe:
    validation, targets = np.asarray(data.features("val"), dtype=np.float64), data.labels("val")
    best: tuple[tuple[float, float], float, Doubles, Doubles] | None = None
    for C, weight, bias in _solutions(data, path):
        logits = validation @ weight.T + bias
        score = (float((logits.argmax(1) == targets).mean()), -_nll(logits, targets))
        if best is None or score > best[0]:
            best = (score, C, weight, bias)
    assert best is not None
    score, C, weight, bias = best
    return Probe(weight.astype(np.float32), bias.astype(np.float32), C, score[0])


def _solutions(data: TrialData, path: Sequence[float]) -> Iterator[tuple[float, Doubles, Doubles]]:
    """C, weight (K, D) and bias (K,) along the path, the standardisation of the features folded in."""
    features, labels = np.asarray(data.features("train"), dtype=np.float64), data.labels("train")
    _check_features(features, labels)
    mean, scale = float(features.mean()), float(features.std())
    present, positions = np.unique(labels, return_inverse=True)
    if not scale > 0 or len(present) < 2:
        raise ValueError(
            f"A linear probe needs features that differ and images of two classes, but the training split has "
            f"{len(present)} class(es) and features of standard deviation {scale:g}."
        )
    standard = (features - mean) / scale
    for C, (rows, offsets) in zip(path, logistic_path(standard, positions, path, data.device), strict=True):
        weight, bias = rows / scale, offsets - rows.sum(1) * mean / scale
        if len(present) < data.num_classes:
            weight, bias = _with_absent(weight, bias, present, data.num_classes, features)
        yield C, weight, bias


def _with_absent(
    weight: Doubles, bias: Doubles, present: NDArray[Any], classes: int, features: Doubles
) -> tuple[Doubles, Doubles]:
    """Rows for classes without training images (in a fold without one domain): the optimum would send their bias to
    minus infinity, so they get weight zero and the bias that leaves them a probability of at most `ABSENT`."""
    logits = features @ weight.T + bias
    highest = logits.max(1, keepdims=True)
    least = float((highest[:, 0] + np.log(np.exp(logits - highest).sum(1))).min())
    all_weight, all_bias = np.zeros((classes, weight.shape[1])), np.full(classes, least + np.log(ABSENT))
    all_weight[present], all_bias[present] = weight, bias
    return all_weight, all_bias


def _nll(logits: Doubles, targets: NDArray[Any]) -> float:
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
    notes = {"probe": json.dumps({"C": probe.C, "val_accuracy": probe.val_accuracy})}
    with atomic_file(file) as written:
        save_file({"weight": probe.weight, "bias": probe.bias}, written, metadata=notes)


def _load(file: Path) -> Probe | None:
    """The solution on disk; None where there is none, or none that can be read (then it is computed again)."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="numpy") as tensors:
            notes = json.loads(tensors.metadata()["probe"])
            return Probe(tensors.get_tensor("weight"), tensors.get_tensor("bias"), notes["C"], notes["val_accuracy"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("The stored linear probe %s is damaged (%s) and is computed again.", file, error)
        return None


@torch.no_grad()
def take_probe(model: TaskModel, probe: Probe) -> dict[str, float]:
    """Copy a linear probe's solution into the head; returns the metrics that name it."""
    model.head.weight.copy_(torch.as_tensor(probe.weight))
    model.head.bias.copy_(torch.as_tensor(probe.bias))
    return {PROBE_C.name: probe.C, f"{PROBE_C.group}/val_{ACCURACY.key}": probe.val_accuracy}
