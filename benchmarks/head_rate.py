"""Which parametrisation of the head's learning rate lets one range serve all backbones.

    python -m benchmarks.head_rate            # table; two minutes on two cores
    python -m benchmarks.head_rate --json     # the same as JSON on stdout

A linear head is trained on cached features of the handwritten digits, as `full` and `daft` train it (SGD, momentum
0.9, cosine, batch 64, from a random or a zero head), once per rate on a grid of half decades. Features come from
several networks and from one network times 0.01 … 100, so that their mean squared norm spans many orders of magnitude.
`absolute` rates go to the optimiser as they are, `relative` ones divided by the mean squared norm of the training
features. For every set of features: the best rate, and all rates whose validation accuracy is within one point of it;
a head that ends with a loss worse than guessing has diverged at any accuracy.

Why relative: the softmax cross-entropy of a linear head has curvature of at most ½·E‖φ‖² in the weights, and a step at
rate η changes the logits of an image by about η·‖φ‖²; both the largest stable and the useful rates go as 1/E‖φ‖².
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from optuna.distributions import FloatDistribution
from torch import Tensor, nn
from torch.nn import functional as F

import search_spaces
from benchmarks.feature_sets import digit_images, feature_sets
from trainables.engine.contract import ParamGroup
from trainables.engine.optim import resolved_rate

ABSOLUTE = [10.0 ** (k / 2) for k in range(-16, 13)]
RELATIVE = [10.0 ** (k / 2) for k in range(-8, 7)]
Kind = Literal["absolute", "relative"]
KINDS: tuple[Kind, ...] = ("absolute", "relative")
GRIDS: dict[Kind, list[float]] = {"absolute": ABSOLUTE, "relative": RELATIVE}
CLASSES = 10
TRAIN = 1200
"""Training images; the other 597 of the data set validate."""
WITHIN = 0.01
"""Validation accuracy that a good rate may lack against the best one."""


@dataclass(frozen=True)
class Sweep:
    """Validation accuracy of a head on one set of features, by rate (mean over seeds)."""

    absolute: dict[float, float]
    relative: dict[float, float]

    @property
    def best(self) -> float:
        """The best accuracy at any rate."""
        return max(*self.absolute.values(), *self.relative.values())

    def rates(self, kind: Kind) -> dict[float, float]:
        """Rate of one kind → accuracy, ascending."""
        return self.absolute if kind == "absolute" else self.relative

    def best_rate(self, kind: Kind) -> float:
        """The rate of one kind with the best accuracy."""
        accuracies = self.rates(kind)
        return max(accuracies, key=lambda rate: accuracies[rate])

    def good(self, kind: Kind) -> list[float]:
        """Rates of one kind within `WITHIN` of the best, ascending."""
        return [rate for rate, accuracy in self.rates(kind).items() if accuracy >= self.best - WITHIN]


def train_heads(
    features: Tensor, labels: Tensor, rates: Sequence[tuple[float, float]], zero: bool, epochs: int, seed: int
) -> list[float]:
    """Validation accuracy of one head per pair of rates (of weight and bias) after training on the first `TRAIN`
    features.

    A head whose loss is worse than guessing has diverged and counts as guessing. The heads share initialisation and
    batches, and are trained side by side."""
    generator = torch.Generator().manual_seed(seed)
    bound = 0.0 if zero else features.shape[1] ** -0.5  # nn.Linear's own initialisation
    start = torch.empty(features.shape[1] + 1, CLASSES).uniform_(-bound, bound, generator=generator)
    inputs = F.pad(features, (0, 1), value=1.0)  # the bias as a weight of the constant feature
    weights = start.repeat(len(rates), 1, 1).requires_grad_()
    momentum = torch.zeros_like(weights)
    peak = torch.ones_like(start).repeat(len(rates), 1, 1)
    for one, (weight_rate, bias_rate) in zip(peak, rates, strict=True):
        one[:-1], one[-1] = weight_rate, bias_rate
    per_epoch = TRAIN // 64
    for epoch in range(epochs):
        for step, batch in enumerate(torch.split(torch.randperm(TRAIN, generator=generator), 64)[:per_epoch]):
            logits = inputs[batch] @ weights  # (rates, 64, classes)
            targets = labels[batch].repeat(len(rates))
            loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / len(batch)
            (gradient,) = torch.autograd.grad(loss, weights)
            cosine = (1 + math.cos(math.pi * (epoch * per_epoch + step) / (epochs * per_epoch))) / 2
            with torch.no_grad():
                momentum.mul_(0.9).add_(gradient)
                weights.sub_(peak * cosine * momentum)
    logits = (inputs[TRAIN:] @ weights).detach()
    right = (logits.argmax(2) == labels[TRAIN:]).double().mean(1)
    nll = torch.stack([F.cross_entropy(one, labels[TRAIN:]) for one in logits])
    return torch.where(nll <= math.log(CLASSES), right, 1 / CLASSES).tolist()  # NaN compares as False


def sweep(features: Tensor, labels: Tensor, zero: bool, epochs: int, seeds: int) -> Sweep:
    """Train at every rate of both grids, and average over seeds."""
    norm = mean_square_norm(features)
    rates = [_as_in_the_optimiser(rate, kind, norm) for kind in KINDS for rate in GRIDS[kind]]
    runs = [train_heads(features, labels, rates, zero, epochs, seed) for seed in range(seeds)]
    means = [sum(column) / seeds for column in zip(*runs, strict=True)]
    split = len(ABSOLUTE)
    return Sweep(dict(zip(ABSOLUTE, means[:split], strict=True)), dict(zip(RELATIVE, means[split:], strict=True)))


def _as_in_the_optimiser(rate: float, kind: Kind, norm: float) -> tuple[float, float]:
    """What weight and bias of a head really get."""
    weight, bias = nn.Parameter(torch.empty(CLASSES, 1)), nn.Parameter(torch.empty(CLASSES))
    group = ParamGroup("head", [weight, bias], rate, relative=kind == "relative")
    return resolved_rate(group, weight, norm), resolved_rate(group, bias, norm)


def mean_square_norm(features: Tensor) -> float:
    """E‖φ‖² over the training features."""
    return float(features[:TRAIN].double().square().sum(1).mean())


def window_loss(sweeps: dict[str, Sweep], kind: Kind, low: float, high: float) -> float:
    """The accuracy that the worst-served set of features lacks if rates are searched from `low` to `high` only."""
    return max(
        one.best - max(a for rate, a in one.rates(kind).items() if low * 0.99 <= rate <= high * 1.01)
        for one in sweeps.values()
    )


def summarise(sweeps: dict[str, Sweep], kind: Kind, decades: float) -> dict[str, Any]:
    """How well one range of that many decades serves all sets of features: the best such range, and what the
    worst-served set loses with it; how far apart the sets' best rates lie."""
    rates = GRIDS[kind]
    steps = round(2 * decades)
    windows = [(low, high) for low, high in zip(rates, rates[steps:], strict=False)]
    low, high = min(windows, key=lambda w: window_loss(sweeps, kind, *w))
    best = [one.best_rate(kind) for one in sweeps.values()]
    return {
        "decades_between_best_rates": math.log10(max(best) / min(best)),
        "best_range": [low, high],
        "worst_loss_in_it": window_loss(sweeps, kind, low, high),
    }


def default_loss(sweeps: dict[str, Sweep], strategy: str) -> dict[str, float]:
    """What the search space of a strategy costs the worst-served set: its whole range, and its default alone (at the
    nearest rate of the grid)."""
    rate = search_spaces.space(strategy)["lr_head"]
    assert isinstance(rate.distribution, FloatDistribution)
    near = min(RELATIVE, key=lambda value: abs(math.log(value / rate.default)))
    return {
        "low": rate.distribution.low,
        "high": rate.distribution.high,
        "default": rate.default,
        "worst_loss_in_range": window_loss(sweeps, "relative", rate.distribution.low, rate.distribution.high),
        "worst_loss_at_default": max(one.best - one.relative[near] for one in sweeps.values()),
    }


def report(results: dict[str, dict[str, Sweep]], norms: dict[str, float]) -> str:
    """The table for people."""
    lines = []
    for strategy, sweeps in results.items():
        space = default_loss(sweeps, strategy)
        decades = math.log10(space["high"] / space["low"])
        lines += [
            f"\nhead as {strategy} starts it; good = within {WITHIN:.0%} of the best",
            f"{'features':32} {'mean ‖φ‖²':>10} {'best':>6}  {'absolute: best, good':30} relative: best, good",
        ]
        for name, one in sweeps.items():
            cells = [_cell(one, kind) for kind in KINDS]
            lines.append(f"{name:32} {norms[name]:10.3g} {one.best:6.1%}  {cells[0]:30} {cells[1]}")
        for kind in KINDS:
            total = summarise(sweeps, kind, decades)
            low, high = total["best_range"]
            lines.append(
                f"{kind}: best rates {total['decades_between_best_rates']:.1f} decades apart; the best range of "
                f"{decades:.1f} decades, {low:.2g} … {high:.2g}, costs at most {total['worst_loss_in_it']:.1%}"
            )
        lines.append(
            f"search space of {strategy}: {space['low']:g} … {space['high']:g} costs at most "
            f"{space['worst_loss_in_range']:.1%}, its default {space['default']:g} alone at most "
            f"{space['worst_loss_at_default']:.1%}"
        )
    return "\n".join(lines)


def _cell(one: Sweep, kind: Kind) -> str:
    good = one.good(kind)
    return f"{one.best_rate(kind):.2g}, " + (f"{good[0]:.2g} … {good[-1]:.2g}" if good else "none")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    options = parser.parse_args()
    labels = digit_images(8)[1]
    features = feature_sets()
    norms = {name: mean_square_norm(phi) for name, phi in features.items()}
    results = {
        strategy: {n: sweep(phi, labels, zero, options.epochs, options.seeds) for n, phi in features.items()}
        for strategy, zero in (("daft", True), ("full", False))
    }
    if not options.json:
        print(report(results, norms))
        return
    out = {
        strategy: {
            "sets": {name: {"mean_square_norm": norms[name], **asdict(one)} for name, one in sweeps.items()},
            "space": (space := default_loss(sweeps, strategy)),
            **{kind: summarise(sweeps, kind, math.log10(space["high"] / space["low"])) for kind in KINDS},
        }
        for strategy, sweeps in results.items()
    }
    json.dump(out, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
