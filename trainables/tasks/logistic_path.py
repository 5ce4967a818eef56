"""L2-regularised multinomial logistic regression along a path of C: scikit-learn's objective, solved faster.

The objective of `sklearn.linear_model.LogisticRegression` is C · Σᵢ cross-entropyᵢ + ½‖W‖², the bias unpenalised. It is
convex with one optimum, so that any way of descending gives the same answer; what costs time is its conditioning. Here
L-BFGS works in coordinates in which an approximate Hessian (the features' second moments, each image weighted by how
undecided the model is about it) is the identity, and each C starts from where the solutions before it point to: ten
steps where plain L-BFGS needs hundreds. Everything is double precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Doubles = NDArray[np.float64]

MAX_ITERATIONS = 2000
RELATIVE_DECREASE = 1e-7
"""A solution is taken when a step lowers the objective by less than this share of it."""
RESTARTS = 10
BLOCK = 1 << 22
"""Entries of features or logits that are worked on at a time."""
STALE = 20
"""Evaluations that a descent may take before the approximate Hessian is made anew."""
SMALL = 1 << 24
"""Multiplications of one evaluation below which several threads would only wait for each other."""


def logistic_path(
    features: NDArray[np.floating],
    labels: NDArray[np.integer],
    path: Sequence[float],
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Doubles, Doubles]]:
    """Solutions for each C of an ascending path: weight (K, D) and bias (K,), K = largest label + 1.

    For two classes scikit-learn fits one vector of log-odds v with ½‖v‖²; the rows are then −v/2 and v/2.

    Args:
        features: (N, D), used as they are.
        labels: (N,) integers; every class 0 … K−1 present.
        path: positive, strictly ascending.
        device: where to compute, in double precision.
    """
    problem = _Problem(
        torch.tensor(np.asarray(features), dtype=torch.float64, device=device),
        torch.tensor(np.asarray(labels), dtype=torch.int64, device=device),
    )
    for c in path:
        problem.solve(c)
        yield problem.solution()


class _Problem:
    """State along the path: the last solutions, and the approximate Hessian in use."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.count, self.classes = len(features), int(labels.max()) + 1
        self.rows = max(1, BLOCK // max(self.classes, features.shape[1]))
        self.threads = 1 if features.numel() * self.classes < SMALL else torch.get_num_threads()
        self.labels = labels
        self.centre = features.mean(0)
        # Centred, which only changes the bias; the bias is the weight of a last feature that is always one.
        self.features = torch.cat([features - self.centre, torch.ones_like(features[:, :1])], 1)
        # ½‖v‖² of two classes' one log-odds vector is ‖W‖² of its two rows ∓v/2.
        self.penalty = torch.full_like(self.features[0], 2.0 if self.classes == 2 else 1.0)
        self.penalty[-1] = 0.0
        frequency = torch.bincount(labels, minlength=self.classes).double().log()
        self.state = torch.zeros(self.classes, self.features.shape[1], dtype=torch.float64, device=features.device)
        self.state[:, -1] = frequency - frequency.mean()
        self.solved: list[tuple[float, Tensor]] = []
        self.moments = self.relative_moments()

    def solve(self, c: float) -> None:
        """Move to the optimum for C = c."""
        ridge = self.penalty / (c * self.count)
        with _threads(self.threads):
            self._extrapolate(c, ridge)
            for _ in range(RESTARTS):
                share, evaluations = self._descend(ridge)
                if evaluations > STALE + self.features.shape[1] // (2 * self.classes):
                    self.moments = self.relative_moments()
                if share > 0.8:
                    break
        self.solved = [*self.solved[-1:], (math.log(c), self.state)]

    def _extrapolate(self, c: float, ridge: Tensor) -> None:
        """Start where the last two solutions point to, being almost linear in log C, if that is the better start."""
        if len(self.solved) < 2:
            return
        (first, earlier), (second, later) = self.solved
        ahead = later + (later - earlier) * (math.log(c) - second) / (second - first)
        if bool(self.value(ahead, ridge)[0] < self.value(later, ridge)[0]):
            self.state = ahead

    def _descend(self, ridge: Tensor) -> tuple[float, int]:
        """L-BFGS from the present state; returns what share of the objective is left of where it started, and the
        number of evaluations. The tolerance belongs to the start: after a long way down it has to be renewed."""
        start, _ = self.value(self.state, ridge)
        _, indecision = self.indecision()
        root = torch.linalg.cholesky(indecision * self.moments + torch.diag(ridge))
        scaled = torch.nn.Parameter((self.state @ root).contiguous())
        optimizer = torch.optim.LBFGS(
            [scaled],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=1e-9,
            tolerance_change=RELATIVE_DECREASE,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        share, evaluations = 1.0, 0

        def objective() -> float:
            nonlocal share, evaluations
            value, gradient = self.value(_divide(scaled.detach(), root, upper=False), ridge)
            scaled.grad = _divide(gradient, root.T, upper=True) / start
            share, evaluations = float(value / start), evaluations + 1
            return share

        optimizer.step(objective)  # type: ignore[no-untyped-call]
        self.state = _divide(scaled.detach(), root, upper=False)
        return share, evaluations

    def value(self, state: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy + ½ Σ ridge·W², and its gradient (K, D + 1)."""
        loss, gradient = 0.5 * (ridge * state.square()).sum(), ridge * state
        for features, labels in self._blocks():
            probability = torch.log_softmax(features @ state.T, 1)
            loss -= probability.gather(1, labels[:, None]).sum() / self.count
            probability.exp_().scatter_add_(1, labels[:, None], torch.full_like(probability[:, :1], -1.0))
            gradient += probability.T @ features / self.count
        return loss, gradient

    def indecision(self) -> tuple[Tensor, float]:
        """Per image (1 − Σ_k p_k²)/(K − 1), the mean over directions of the softmax's Hessian; and its mean over
        images."""
        parts = []
        for features, _ in self._blocks():
            probability = torch.softmax(features @ self.state.T, 1)
            parts.append((1 - probability.square().sum(1)).clamp(min=1e-9) / (self.classes - 1))
        weights = torch.cat(parts)
        return weights, float(weights.mean())

    def relative_moments(self) -> Tensor:
        """Second moments (D + 1, D + 1) of the features, each image weighted by its share of the indecision. A little
        of the identity keeps them positive definite."""
        weights, mean = self.indecision()
        moments = torch.zeros_like(self.penalty).diag()
        for (features, _), weight in zip(self._blocks(), torch.split(weights, self.rows), strict=True):
            moments += features.T @ (features * weight[:, None]) / (mean * self.count)
        return moments + 1e-9 * moments.diagonal().mean() * torch.eye(len(moments), device=moments.device)

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(torch.split(self.features, self.rows), torch.split(self.labels, self.rows), strict=True)

    def solution(self) -> tuple[Doubles, Doubles]:
        """The state in the coordinates of the features."""
        weight = self.state[:, :-1]
        return weight.cpu().numpy(), (self.state[:, -1] - weight @ self.centre).cpu().numpy()


def _divide(rows: Tensor, triangle: Tensor, upper: bool) -> Tensor:
    """X with X @ triangle = rows."""
    found: Tensor = torch.linalg.solve_triangular(triangle, rows, upper=upper, left=False)
    return found.contiguous()  # L-BFGS views its parameter and gradient as one row


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
