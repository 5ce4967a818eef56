"""L2-regularised multinomial logistic regression along a path of C: scikit-learn's objective, solved faster.

The objective of `sklearn.linear_model.LogisticRegression` is C · Σᵢ sᵢ · cross-entropyᵢ + ½‖W‖², the bias unpenalised,
for sample weights sᵢ (1 by default). It is strictly convex in W, so that every solver reaches the same optimum; the
cost is the number of passes over the features. What keeps it low (`benchmarks/logistic_path.py`):

- The features are rotated into their principal axes, which changes neither the objective nor its optimum. The
  Hessian, approximated by the second moments times the softmax's mean curvature, is then a diagonal, and inverting it
  as L-BFGS's preconditioner costs nothing, at any C. Fewer images than channels leave as many axes as images.
- The cross-entropy does not depend on C: value, gradient and L-BFGS's curvature pairs of one C are those of the next
  one, after the exact curvature of the penalty is exchanged.
- Each C starts from the last two solutions, extrapolated linearly in log C.
- The decrease that the quasi-Newton step predicts, half of gᵀH⁻¹g, ends the descent; it is relative to the objective,
  so that every C is solved to the same relative accuracy.

Everything is double precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.specs.torch_threads import torch_threads

Doubles = NDArray[np.float64]

MAX_ITERATIONS = 2000
"""Quasi-Newton steps per C."""
PREDICTED_DECREASE = 1e-7
"""Default tolerance: the next step is predicted to lower the objective by less than this fraction of it."""
SUFFICIENT_DECREASE = 1e-4
"""Share of the linear decrease that a step must reach (Armijo, 1966)."""
BACKTRACKS = 30
"""Shorter steps that are tried before rounding is taken for the reason."""
MEMORY = 10
"""Curvature pairs of L-BFGS."""
BLOCK = 1 << 22
"""Entries of features or logits per block of rows (bounds memory)."""
SMALL = 1 << 24
"""Multiplications per evaluation below which one thread is faster than several."""


def logistic_path(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    path: Sequence[float],
    device: torch.device | str = "cpu",
    sample_weight: NDArray[np.floating] | None = None,
    tolerance: float = PREDICTED_DECREASE,
) -> Iterator[tuple[Doubles, Doubles]]:
    """Solve for each C of an ascending path.

    Yields weight (K, D) and bias (K,), K = largest label + 1. For two classes scikit-learn fits one vector of log-odds
    v with ½‖v‖²; the rows are then −v/2 and v/2.

    Args:
        features: (N, D), used without scaling.
        labels: (N,) integers; every class 0 … K−1 present.
        path: positive, strictly ascending.
        device: device of the computation.
        sample_weight: (N,) positive factors of the images' cross-entropies, of mean about 1; None = 1 for all.
        tolerance: predicted decrease of the objective, relative to it, at which a C counts as solved.
    """
    weights = None
    if sample_weight is not None:
        weights = torch.tensor(np.asarray(sample_weight), dtype=torch.float64, device=device)
    problem = _Problem(
        torch.tensor(np.asarray(features), dtype=torch.float64, device=device),
        torch.tensor(np.asarray(labels), dtype=torch.int64, device=device),
        weights,
        tolerance,
    )
    for c in path:
        problem.solve(c)
        yield problem.solution()


@dataclass(frozen=True)
class _Point:
    """Mean cross-entropy at one state, which no C enters."""

    state: Tensor
    """(K, R + 1) weights in the principal axes and, last, the bias."""
    value: float
    gradient: Tensor
    """(K, R + 1)"""
    curvature: float
    """Mean over images and directions of the softmax's Hessian, (1 − Σₖ pₖ²)/(K − 1), times the image's weight."""


@dataclass(frozen=True)
class _Pair:
    """A step and the change of the objective's gradient along it."""

    step: Tensor
    change: Tensor
    product: float
    """⟨step, change⟩, positive for a strictly convex objective."""


class _Problem:
    """State along the path: the last solutions and the cross-entropy's curvature pairs."""

    def __init__(self, features: Tensor, labels: Tensor, weights: Tensor | None, tolerance: float) -> None:
        self.tolerance = tolerance
        self.count = len(features)
        self.classes = int(labels.max()) + 1
        self.threads = 1 if features.numel() * self.classes < SMALL else torch.get_num_threads()
        self.labels = labels
        self.weights = weights
        """(N,), or None = 1 for all."""
        with torch_threads(self.threads):
            self._rotate(features)
        self.rows = max(1, BLOCK // max(self.classes, self.features.shape[1]))
        # Two classes: scikit-learn penalises ½‖v‖² of one log-odds vector, which is ‖W‖² of the rows ∓v/2.
        self.penalty = torch.full_like(self.moments, 2.0 if self.classes == 2 else 1.0)
        self.penalty[-1] = 0.0  # the bias
        # Start at the optimum of the bias alone: the log frequencies of the classes.
        log_frequency = torch.bincount(labels, weights, minlength=self.classes).double().log()
        start = torch.zeros(self.classes, self.features.shape[1], dtype=torch.float64, device=features.device)
        start[:, -1] = log_frequency - log_frequency.mean()
        self.point = self.evaluate(start)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        """Steps and changes of the cross-entropy's gradient, oldest first."""
        self.solved: list[tuple[float, Tensor]] = []
        """log C and state of the last two solutions."""

    def _rotate(self, features: Tensor) -> None:
        """Set centre, axes (D, R), rotated features (N, R + 1) and their second moments (R + 1,).

        Centring changes only the bias, which is the weight of a constant last feature.
        """
        share = torch.full_like(features[:, 0], 1.0) if self.weights is None else self.weights
        share = share / self.count
        self.centre = (share @ features) / share.sum()
        centred = features - self.centre
        row_space = None
        if len(centred) < centred.shape[1]:
            # W is a combination of the images: the penalty leaves nothing outside their span.
            row_space, triangle = torch.linalg.qr(centred.T)
            centred = triangle.T
        moments, axes = torch.linalg.eigh(centred.T @ (centred * share[:, None]))
        self.features = torch.cat([centred @ axes, torch.ones_like(centred[:, :1])], 1)
        self.axes = axes if row_space is None else row_space @ axes
        # Rounding leaves small negative eigenvalues of dependent channels.
        self.moments = torch.cat([moments.clamp(min=0.0), share.sum()[None]])

    def solve(self, c: float) -> None:
        """Move to the optimum for C = c."""
        ridge = self.penalty / (c * self.count)
        with torch_threads(self.threads):
            self._extrapolate(c, ridge)
            self._descend(ridge)
        self.solved = [*self.solved[-1:], (math.log(c), self.point.state)]

    def _extrapolate(self, c: float, ridge: Tensor) -> None:
        """Warm start: extrapolate the last two solutions linearly in log C.

        Only if that lowers the objective.
        """
        if len(self.solved) < 2:
            return
        (log_c0, state0), (log_c1, state1) = self.solved
        extrapolated = self.evaluate(state1 + (state1 - state0) * ((math.log(c) - log_c1) / (log_c1 - log_c0)))
        if _objective(extrapolated, ridge) < _objective(self.point, ridge):
            self._move(extrapolated)

    def _descend(self, ridge: Tensor) -> None:
        """Preconditioned L-BFGS (Nocedal and Wright, 2006, algorithm 7.4) until the predicted decrease is small."""
        pairs = _curvature_pairs(self.pairs, ridge)
        for _ in range(MAX_ITERATIONS):
            gradient = self.point.gradient + ridge * self.point.state
            # The bias has no ridge, and images of certain class no curvature.
            diagonal = max(self.point.curvature, 1e-9) * self.moments + ridge
            direction = -_inverse_hessian(gradient, pairs, diagonal)
            slope = _dot(gradient, direction)
            if -slope / 2 <= self.tolerance * _objective(self.point, ridge):
                return
            reached = self._line_search(direction, slope, ridge)
            if reached is None:
                return
            self._move(reached)
            pairs = [*pairs, *_curvature_pairs(self.pairs[-1:], ridge)][-MEMORY:]

    def _line_search(self, direction: Tensor, slope: float, ridge: Tensor) -> _Point | None:
        """First step of sufficient decrease, from the full one down; None = only rounding is left."""
        start = _objective(self.point, ridge)
        length = 1.0
        for _ in range(BACKTRACKS):
            reached = self.evaluate(self.point.state + length * direction)
            value = _objective(reached, ridge)
            if value <= start + SUFFICIENT_DECREASE * length * slope:
                return reached
            # The minimum of the parabola through both values and the slope, within safe bounds.
            minimum = -slope * length**2 / (2 * (value - start - slope * length))
            length = min(max(minimum, 0.1 * length), 0.5 * length)
        return None

    def _move(self, point: _Point) -> None:
        """Make a point the current one and keep the pair of the step to it."""
        pair = (point.state - self.point.state, point.gradient - self.point.gradient)
        self.pairs = [*self.pairs, pair][-MEMORY:]
        self.point = point

    def evaluate(self, state: Tensor) -> _Point:
        """One pass over the features."""
        loss = torch.zeros((), dtype=torch.float64, device=state.device)
        curvature = torch.zeros_like(loss)
        gradient = torch.zeros_like(state)
        for features, labels, weights in self._blocks():
            log_probability = torch.log_softmax(features @ state.T, 1)
            of_label = log_probability.gather(1, labels[:, None])
            # In place, for memory
            residual = log_probability.exp_()
            certainty = 1 - residual.square().sum(1, keepdim=True)
            # p − one-hot, the derivative with respect to the logits
            residual.scatter_add_(1, labels[:, None], torch.full_like(of_label, -1.0))
            if weights is not None:
                of_label = weights * of_label
                certainty = weights * certainty
                residual *= weights
            loss -= of_label.sum()
            curvature += certainty.sum()
            gradient += residual.T @ features
        mean_curvature = float(curvature) / (self.count * (self.classes - 1))
        return _Point(state, float(loss) / self.count, gradient / self.count, mean_curvature)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Features (B, R + 1), labels (B,) and weights (B, 1) of blocks of rows."""
        for start in range(0, self.count, self.rows):
            rows = slice(start, start + self.rows)
            weights = None if self.weights is None else self.weights[rows, None]
            yield self.features[rows], self.labels[rows], weights

    def solution(self) -> tuple[Doubles, Doubles]:
        """Weight (K, D) and bias (K,) for the features as they were given."""
        weight = self.point.state[:, :-1] @ self.axes.T
        bias = self.point.state[:, -1] - weight @ self.centre
        return weight.cpu().numpy(), bias.cpu().numpy()


def _objective(point: _Point, ridge: Tensor) -> float:
    """Mean cross-entropy + ½ Σ ridge·W²: the objective divided by C·N."""
    return point.value + 0.5 * float((ridge * point.state.square()).sum())


def _curvature_pairs(pairs: Sequence[tuple[Tensor, Tensor]], ridge: Tensor) -> list[_Pair]:
    """Pairs of the cross-entropy → pairs of the objective."""
    changes = [(step, change + ridge * step) for step, change in pairs]
    products = [(step, change, _dot(step, change)) for step, change in changes]
    # Rounding can make the product of a tiny step zero or negative.
    return [_Pair(*pair) for pair in products if pair[2] > 0]


def _inverse_hessian(gradient: Tensor, pairs: Sequence[_Pair], diagonal: Tensor) -> Tensor:
    """L-BFGS's inverse Hessian times a gradient (two-loop recursion), from a diagonal Hessian."""
    result = gradient.clone()
    factors = []
    for pair in reversed(pairs):
        factor = _dot(pair.step, result) / pair.product
        result -= factor * pair.change
        factors.append(factor)
    result /= diagonal
    if pairs:
        latest = pairs[-1]
        # The diagonal, scaled so that it agrees with the curvature of the latest step.
        result *= latest.product / float((latest.change.square() / diagonal).sum())
    for pair, factor in zip(pairs, reversed(factors), strict=True):
        result += (factor - _dot(pair.change, result) / pair.product) * pair.step
    return result


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())
