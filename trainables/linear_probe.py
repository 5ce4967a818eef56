"""LP, linear probing: L2-regularised logistic regression on frozen features, C chosen on ID validation.

Reference practice (papers/002, "Training Details", after Kumar et al. 2022): 100 values of C, log-spaced from 1e-7 to
1e2; features standardised with one scalar mean and standard deviation of the training features.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from trainables.core.contract import ParamGroup, Phase, Strategy

if TYPE_CHECKING:
    from trainables.core.backbone import Classifier
    from trainables.data.trial_data import TrialData

Floats = NDArray[np.floating]
C_PATH = tuple(float(c) for c in np.logspace(-7, 2, 100))
MAX_ITERATIONS = 500


@dataclass(frozen=True)
class Probe:
    """One solution."""

    weight: NDArray[np.float32]
    """(K, D)"""
    bias: NDArray[np.float32]
    """(K,)"""
    C: float
    val_accuracy: float
    """In [0, 1]."""


def fit_linear_probe(features: Floats, labels: NDArray[np.integer], C: float) -> tuple[Floats, Floats]:
    """The optimum of C · Σᵢ cross-entropyᵢ + ½‖W‖² (scikit-learn's C; the bias is not penalised).

    Args:
        features: (N, D), used as they are.
        labels: (N,) integers 0 … K−1, each class present.
        C: inverse regularisation strength, positive.

    Returns:
        weight (K, D) and bias (K,), float64.

    Raises:
        ValueError: C is not positive, a feature is not finite, or fewer than two classes.
    """
    return _fit_path(features, labels, [C])[0]


def _fit_path(features: Floats, labels: NDArray[np.integer], path: Sequence[float]) -> list[tuple[Floats, Floats]]:
    """Solutions along an ascending path of C, each started from the one before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if not all(c > 0 for c in path):
        raise ValueError(f"C must be positive, but got {min(path)!r}.")
    if not np.isfinite(features).all():
        raise ValueError("Features of a linear probe must be finite, but some are NaN or infinite.")
    classes = int(labels.max()) + 1
    if len(np.unique(labels)) != classes or classes < 2:
        raise ValueError(
            f"A linear probe needs every class 0 … K-1 (K ≥ 2) in its labels, but {classes} are implied "
            f"and {len(np.unique(labels))} are present."
        )
    model = LogisticRegression(solver="lbfgs", max_iter=MAX_ITERATIONS, tol=1e-4, warm_start=True)
    solutions = []
    with warnings.catch_warnings():
        # Weakly regularised ends of the path may stop at the iteration limit, where validation no longer changes.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for c in path:
            model.set_params(C=c)
            model.fit(np.asarray(features, dtype=np.float64), labels)
            solutions.append(_two_rows(model.coef_.copy(), model.intercept_.copy()))
    return solutions


def _two_rows(weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
    """Logits for both classes where scikit-learn gives two classes one row of log-odds: the same probabilities."""
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])


def best_linear_probe(data: TrialData, path: Sequence[float] = C_PATH) -> Probe:
    """The probe of a trial's data with the best ID validation accuracy along a path of C (ties: the smaller C, which
    is the simpler solution). Computed once and kept on disk beside the features, so that LP and LP-FT share it."""
    name = "-".join([f"{len(path)}", f"{min(path):.6g}", f"{max(path):.6g}"])
    file = data.solution_folder / f"linear_probe-{name}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():
                _save(_solve(data, path), file)
    return _load(file)


def _solve(data: TrialData, path: Sequence[float]) -> Probe:
    features = np.asarray(data.features("train"), dtype=np.float64)
    labels = data.labels("train")
    mean, scale = float(features.mean()), float(features.std())
    if not scale > 0:
        raise ValueError("The training features are all alike: a linear probe has nothing to separate classes by.")
    validation, targets = np.asarray(data.features("val"), dtype=np.float64), data.labels("val")
    best: Probe | None = None
    for C, (weight, bias) in zip(path, _fit_path((features - mean) / scale, labels, path), strict=True):
        # The standardisation folded in: the head works on the features as the backbone gives them.
        folded, offset = weight / scale, bias - weight.sum(1) * mean / scale
        accuracy = float(((validation @ folded.T + offset).argmax(1) == targets).mean())
        if best is None or accuracy > best.val_accuracy:
            best = Probe(folded.astype(np.float32), offset.astype(np.float32), C, accuracy)
    assert best is not None
    return best


def _save(probe: Probe, file: Path) -> None:
    from safetensors.numpy import save_file

    descriptor, written = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    os.close(descriptor)
    notes = {"probe": json.dumps({"C": probe.C, "val_accuracy": probe.val_accuracy})}
    save_file({"weight": probe.weight, "bias": probe.bias}, written, metadata=notes)
    os.replace(written, file)


def _load(file: Path) -> Probe:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        notes = json.loads(tensors.metadata()["probe"])
        return Probe(tensors.get_tensor("weight"), tensors.get_tensor("bias"), notes["C"], notes["val_accuracy"])


class LinearProbe(Strategy):
    """LP: one trial computes the whole regularisation path."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Knobs of the probe."""

        C: float | None = None
        """scikit-learn's inverse regularisation strength; None = the best on ID validation of a path."""
        num_C: int = 100
        """Values on the path, log-spaced from 1e-7 to 1e2."""

        def __post_init__(self) -> None:
            if self.C is not None and not self.C > 0:
                raise ValueError(f"C must be positive, but got {self.C!r}.")
            if self.num_C < 2:
                raise ValueError(f"num_C must be at least 2, but got {self.num_C!r}.")

    def phases(self, units: int) -> list[Phase]:
        """One unit, whatever the budget: the solution has a closed optimum."""
        return [Phase("probe", 1, solve=self.solve)]

    def param_groups(self, model: Classifier) -> list[ParamGroup]:
        """The head; it is solved for, not trained, so its rate is never used."""
        return [ParamGroup("head", list(model.head.parameters()), 1.0)]

    def solve(self, model: Classifier, data: TrialData) -> Mapping[str, float]:
        """Put the best probe into the head."""
        config = self.config
        path = [config.C] if config.C is not None else [float(c) for c in np.logspace(-7, 2, config.num_C)]
        probe = best_linear_probe(data, path)
        with torch.no_grad():
            model.head.weight.copy_(torch.as_tensor(probe.weight))
            model.head.bias.copy_(torch.as_tensor(probe.bias))
        return {"linear_probe/C": probe.C, "linear_probe/val_acc": probe.val_accuracy}


STRATEGY = LinearProbe
