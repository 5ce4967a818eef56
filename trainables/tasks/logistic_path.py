"""L2-regularised multinomial logistic regression along a path of C: scikit-learn's objective, solved faster.

The objective of `sklearn.linear_model.LogisticRegression` is C · Σᵢ sᵢ · cross-entropyᵢ + ½‖W‖², the bias unpenalised,
for sample weights sᵢ (1 by default). It is
strictly convex in W, so that every solver reaches the same optimum; the cost is in the conditioning. Here L-BFGS is
preconditioned by the Cholesky factor of an approximate Hessian (the features' second moments, each image weighted by
the softmax's curvature), and each C is warm-started by extrapolating the previous solutions in log C: ten steps where
plain L-BFGS needs hundreds. Everything is double precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.specs.torch_threads import torch_threads

Doubles = NDArray[np.float64]

MAX_ITERATIONS = 2000
RELATIVE_DECREASE = 1e-7
"""Convergence: a step lowers the objective by less than this fraction of its value at the start."""
RESTARTS = 10
"""Maximum L-BFGS runs per C."""
BLOCK = 1 << 22
"""Entries of features or logits per block of rows (bounds memory)."""
STALE = 20
"""Evaluations of one L-BFGS run, beyond D / 2K, after which the preconditioner is recomputed."""
SMALL = 1 << 24
"""Multiplications per evaluation below which one thread is faster than several."""


def logistic_path(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    path: Sequence[float],
    device: torch.device | str = "cpu",
    sample_weight: NDArray[np.floating] | None = None,
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
    """
    weights = None
    if sample_weight is not None:
        weights = torch.tensor(np.asarray(sample_weight), dtype=torch.float64, device=device)
    problem = _Problem(
        torch.tensor(np.asarray(features), dtype=torch.float64, device=device),
        torch.tensor(np.asarray(labels), dtype=torch.int64, device=device),
        weights,
    )
    for c in path:
        problem.solve(c)
        yield problem.solution()


class _Problem:
    """State along the path: the last two solutions and the current preconditioner."""

    def __init__(self, features: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        self.count = len(features)
        self.classes = int(labels.max()) + 1
        self.rows = max(1, BLOCK // max(self.classes, features.shape[1]))
        self.threads = 1 if features.numel() * self.classes < SMALL else torch.get_num_threads()
        self.labels = labels
        self.weights = weights
        """(N,), or None = 1 for all."""
        self.centre = features.mean(0)
        # Centring changes only the bias, which is the weight of a constant last feature.
        self.features = torch.cat([features - self.centre, torch.ones_like(features[:, :1])], 1)
        # Two classes: scikit-learn penalises ½‖v‖² of one log-odds vector, which is ‖W‖² of the rows ∓v/2.
        self.penalty = torch.full_like(self.features[0], 2.0 if self.classes == 2 else 1.0)
        self.penalty[-1] = 0.0  # the bias
        # Start at the optimum of the bias alone: the log frequencies of the classes.
        log_frequency = torch.bincount(labels, weights, minlength=self.classes).double().log()
        self.state = torch.zeros(self.classes, self.features.shape[1], dtype=torch.float64, device=features.device)
        self.state[:, -1] = log_frequency - log_frequency.mean()
        self.solved: list[tuple[float, Tensor]] = []
        self.moments = self.relative_moments()

    def solve(self, c: float) -> None:
        """Move to the optimum for C = c."""
        ridge = self.penalty / (c * self.count)
        with torch_threads(self.threads):
            self._extrapolate(c, ridge)
            for _ in range(RESTARTS):
                relative, evaluations = self._descend(ridge)
                if evaluations > STALE + self.features.shape[1] // (2 * self.classes):
                    self.moments = self.relative_moments()
                # The tolerance is relative to the objective at the start of a run: after a long descent it is too
                # loose, and another run starts from here.
                if relative > 0.8:
                    break
        # The last two, through which the next warm start is extrapolated.
        self.solved = [*self.solved[-1:], (math.log(c), self.state)]

    def _extrapolate(self, c: float, ridge: Tensor) -> None:
        """Warm start: extrapolate the last two solutions linearly in log C.

        Only if that lowers the objective.
        """
        if len(self.solved) < 2:
            return
        (log_c0, state0), (log_c1, state1) = self.solved
        extrapolated = state1 + (state1 - state0) * (math.log(c) - log_c1) / (log_c1 - log_c0)
        if bool(self.value(extrapolated, ridge)[0] < self.value(state1, ridge)[0]):
            self.state = extrapolated

    def _descend(self, ridge: Tensor) -> tuple[float, int]:
        """Run L-BFGS from the current state.

        Returns:
            The final objective relative to its value at the start, and the number of evaluations.
        """
        start, _ = self.value(self.state, ridge)
        _, mean_weight = self.hessian_weights()
        # Once per run of L-BFGS: the Hessian at its start preconditions all of its steps.
        root = torch.linalg.cholesky(mean_weight * self.moments + torch.diag(ridge))
        # Coordinates in which the approximate Hessian is the identity
        scaled = torch.nn.Parameter((self.state @ root).contiguous())
        optimizer = torch.optim.LBFGS(
            [scaled],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=1e-9,
            tolerance_change=RELATIVE_DECREASE,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        relative = 1.0
        evaluations = 0

        def objective() -> float:
            nonlocal relative, evaluations
            value, gradient = self.value(_divide(scaled.detach(), root, upper=False), ridge)
            # Divided by the start's objective, so that L-BFGS's absolute tolerances mean the same for every C.
            scaled.grad = _divide(gradient, root.T, upper=True) / start
            relative = float(value / start)
            evaluations += 1
            return relative

        optimizer.step(objective)  # type: ignore[no-untyped-call]
        self.state = _divide(scaled.detach(), root, upper=False)
        return relative, evaluations

    def value(self, state: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy + ½ Σ ridge·W², and its gradient (K, D + 1)."""
        loss = 0.5 * (ridge * state.square()).sum()
        gradient = ridge * state
        for features, labels, weights in self._blocks():
            log_probability = torch.log_softmax(features @ state.T, 1)
            of_label = log_probability.gather(1, labels[:, None])
            loss -= (of_label if weights is None else weights * of_label).sum() / self.count
            # In place, for memory: p − one-hot, the derivative with respect to the logits
            residual = log_probability.exp_()
            residual.scatter_add_(1, labels[:, None], torch.full_like(residual[:, :1], -1.0))
            if weights is not None:
                residual *= weights
            gradient += residual.T @ features / self.count
        return loss, gradient

    def hessian_weights(self) -> tuple[Tensor, float]:
        """Per-image curvature of the objective (N,), and its mean over images.

        (1 − Σ_k p_k²)/(K − 1), the mean over directions of the softmax's Hessian, times the image's weight.
        """
        parts = []
        for features, _, factors in self._blocks():
            probability = torch.softmax(features @ self.state.T, 1)
            # Never zero: the moments are divided by the mean, and images of certain class have no curvature.
            curvature = (1 - probability.square().sum(1)).clamp(min=1e-9) / (self.classes - 1)
            parts.append(curvature if factors is None else curvature * factors[:, 0])
        weights = torch.cat(parts)
        return weights, float(weights.mean())

    def relative_moments(self) -> Tensor:
        """Second moments (D + 1, D + 1) of the features.

        Weighted by each image's relative curvature.
        """
        weights, mean = self.hessian_weights()
        moments = torch.zeros_like(self.penalty).diag()
        for (features, _, _), weight in zip(self._blocks(), torch.split(weights, self.rows), strict=True):
            moments += features.T @ (features * weight[:, None]) / (mean * self.count)
        # The multiple of the identity keeps them positive definite, also for linearly dependent features.
        return moments + 1e-9 * moments.diagonal().mean() * torch.eye(len(moments), device=moments.device)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Features (R, D + 1), labels (R,) and weights (R, 1) of blocks of rows."""
        for start in range(0, self.count, self.rows):
            rows = slice(start, start + self.rows)
            weights = None if self.weights is None else self.weights[rows, None]
            yield self.features[rows], self.labels[rows], weights

    def solution(self) -> tuple[Doubles, Doubles]:
        """Weight (K, D) and bias (K,) for uncentred features."""
        weight = self.state[:, :-1]
        bias = self.state[:, -1] - weight @ self.centre
        return weight.cpu().numpy(), bias.cpu().numpy()


def _divide(rows: Tensor, triangle: Tensor, upper: bool) -> Tensor:
    """Solve X @ triangle = rows for X."""
    solution: Tensor = torch.linalg.solve_triangular(triangle, rows, upper=upper, left=False)
    return solution.contiguous()  # L-BFGS views its parameter and gradient as one row
