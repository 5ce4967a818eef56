"""L2-regularised multinomial logistic regression along a path of C: scikit-learn's objective, solved faster.

The objective of `sklearn.linear_model.LogisticRegression` is C · Σᵢ cross-entropyᵢ + ½‖W‖², the bias unpenalised. It is
convex with one optimum, so that any way of descending gives the same answer; what costs time is its conditioning, which
is that of the features' covariance. Here the features are rotated to the eigenvectors of their covariance (a rotation
leaves ½‖W‖² as it is) and each coordinate is scaled by the inverse root of its curvature, so that L-BFGS needs tens of
steps where it would need hundreds, and each C starts from the solution of the one before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

MAX_ITERATIONS = 2000
RELATIVE_DECREASE = 1e-8
"""A solution is taken when a step lowers the objective by less than this share of it."""
RESTARTS = 10
BLOCK = 1 << 22
"""Entries of the logits that are worked on at a time."""


def logistic_path(
    features: NDArray[np.floating], labels: NDArray[np.integer], path: Sequence[float]
) -> Iterator[tuple[Doubles, Doubles]]:
    """Solutions for each C of an ascending path: weight (K, D) and bias (K,), K = largest label + 1.

    For two classes scikit-learn fits one vector of log-odds v with ½‖v‖²; the rows are then −v/2 and v/2.

    Args:
        features: (N, D), used as they are.
        labels: (N,) integers; every class 0 … K−1 present.
        path: positive, ascending.
    """
    problem = _Problem(np.asarray(features, dtype=np.float64), np.asarray(labels))
    for c in path:
        problem.solve(c)
        yield problem.solution()


class _Problem:
    """State along the path: the last solution in rotated coordinates, and the curvature there."""

    def __init__(self, features: Doubles, labels: NDArray[np.integer]) -> None:
        self.count, self.classes = len(features), int(labels.max()) + 1
        self.labels = labels.astype(np.int64)
        self.centre = features.mean(0)
        centred = features - self.centre
        spread, self.axes = np.linalg.eigh(centred.T @ centred / self.count)
        self.spread = np.maximum(spread, 0.0)
        self.rotated = centred @ self.axes
        # ½‖v‖² of two classes' one log-odds vector is ‖W‖² of its two rows ∓v/2.
        self.penalty = 2.0 if self.classes == 2 else 1.0
        frequency = np.bincount(self.labels, minlength=self.classes) / self.count
        self.weight = np.zeros((self.classes, features.shape[1]))
        self.bias = np.log(frequency)
        self.bias -= self.bias.mean()

    def solve(self, c: float) -> None:
        """Move to the optimum for C = c."""
        ridge = self.penalty / (c * self.count)
        for _ in range(RESTARTS):
            if self._descend(ridge) > 0.8:
                break

    def _descend(self, ridge: float) -> float:
        """L-BFGS from the present state; returns what share of the objective is left of where it started. The
        tolerance and the scaling belong to the start: after a long way down both have to be renewed."""
        from scipy.optimize import minimize

        start, _, _, curvature = self.value(self.weight, self.bias, ridge)
        scale = np.append(1 / np.sqrt(curvature * self.spread + ridge), 1 / math.sqrt(curvature))

        def objective(flat: Doubles) -> tuple[float, Doubles]:
            both = flat.reshape(self.classes, -1) * scale
            value, weight, bias, _ = self.value(both[:, :-1], both[:, -1], ridge)
            gradient = np.concatenate([weight, bias[:, None]], 1) * scale
            return value / start, gradient.ravel() / start

        both = np.concatenate([self.weight, self.bias[:, None]], 1) / scale
        found = minimize(
            objective,
            both.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": MAX_ITERATIONS,
                "maxfun": 2 * MAX_ITERATIONS,
                "maxcor": 20,
                "ftol": RELATIVE_DECREASE,
                "gtol": 1e-9,
            },
        )
        both = found.x.reshape(self.classes, -1) * scale
        self.weight, self.bias = both[:, :-1].copy(), both[:, -1].copy()
        return float(found.fun)

    def value(self, weight: Doubles, bias: Doubles, ridge: float) -> tuple[float, Doubles, Doubles, float]:
        """Mean cross-entropy + ½·ridge·‖W‖², its gradients, and the mean curvature of the softmax."""
        loss, surprise = 0.0, 0.0
        weight_gradient, bias_gradient = ridge * weight, np.zeros(self.classes)
        rows = max(1, BLOCK // self.classes)
        for i in range(0, self.count, rows):
            features, labels = self.rotated[i : i + rows], self.labels[i : i + rows]
            logits = features @ weight.T + bias
            logits -= logits.max(1, keepdims=True)
            wanted = logits[np.arange(len(labels)), labels]
            probability = np.exp(logits, out=logits)
            total = probability.sum(1)
            loss += float((np.log(total) - wanted).sum())
            probability /= total[:, None]
            surprise += len(labels) - float(np.square(probability).sum())
            probability[np.arange(len(labels)), labels] -= 1
            weight_gradient += probability.T @ features / self.count
            bias_gradient += probability.sum(0) / self.count
        value = loss / self.count + 0.5 * ridge * float(np.square(weight).sum())
        # Σ_k p_k(1−p_k) is the trace of the softmax's Hessian, which has K−1 directions.
        curvature = max(surprise / self.count / (self.classes - 1), 1e-6)
        return value, weight_gradient, bias_gradient, curvature

    def solution(self) -> tuple[Doubles, Doubles]:
        """The state in the coordinates of the features."""
        weight = self.weight @ self.axes.T
        return weight, self.bias - weight @ self.centre
