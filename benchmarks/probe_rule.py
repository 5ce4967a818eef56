"""Which rule chooses the linear probe's C best: accuracy in and out of distribution, and likelihood, over many splits.

    OMP_NUM_THREADS=1 python -m benchmarks.probe_rule             # table; eight CPU minutes
    OMP_NUM_THREADS=1 python -m benchmarks.probe_rule --splits 2  # a quarter of the splits
    OMP_NUM_THREADS=1 python -m benchmarks.probe_rule --json      # every split as JSON on stdout

Handwritten digits through four networks: the demo's two (pretrained on printed digits), EfficientNet-Lite0 (ImageNet)
and a ResNet-18 of random weights. Each split draws 100 or 400 training, 250 (or the first 60 of these) validation
and 800 test images; OOD is the mean over the test images inverted, rotated, noisy and blurred, and printed digits.
The rules of `trainables.tasks.base.ProbeRule` choose on validation; `cv_*` choose by the same statistics of five-fold
cross-validation within the training images, for five more solutions of the path. `oracle_*` are chosen on test data
and show what the path has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.feature_sets import _built_in, _efficientnet, _random, extract
from trainables.demo import digits
from trainables.specs.metrics import task_metrics
from trainables.tasks.base import ProbeRule
from trainables.tasks.linear_probe_head import regularisation_path
from trainables.tasks.logistic_path import logistic_path
from trainables.tasks.probe_rule import ValidationPath, per_image_nll

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Features = dict[str, Doubles]
"""Domain → features (N, D); `id` first."""
Solutions = list[tuple[Doubles, Doubles]]

PATH = regularisation_path(100)
RULES: tuple[ProbeRule, ...] = get_args(ProbeRule)
TRAIN = (100, 400)
VALIDATION = (60, 250)
TEST = 800
FOLDS = 5
ID = "id"
PRINTED = "printed"
MEASURES = ("ID acc", "OOD acc", "ID NLL", "OOD NLL")


@dataclass(frozen=True)
class Split:
    """What every rule chose on one split, and what that gives on test data."""

    network: str
    train: int
    validation: int
    seed: int
    chosen: dict[str, int]
    """Rule → index on the path."""
    measures: dict[str, list[float]]
    """`MEASURES` → value of every C."""


def networks() -> Iterator[tuple[str, nn.Module, int]]:
    """Name, network, side of its images."""
    yield "digits_cnn", _built_in("digits_cnn"), digits.SIDE
    yield "digits_vit", _built_in("digits_vit"), digits.SIDE
    yield "resnet18 (random)", _random("resnet18"), 64
    try:
        yield "tf_efficientnet_lite0", _efficientnet(), 64
    except ImportError as error:
        print(f"tf_efficientnet_lite0 is left out: {error}", file=sys.stderr)


def images() -> tuple[dict[str, Tensor], Integers, Integers]:
    """Domain → images in 0 … 1, labels of the handwritten ones and of the printed ones."""
    handwritten, labels = digits.handwritten_digits()
    printed, printed_labels = digits.printed_digits(50, seed=0)
    pixels = {ID: handwritten, **{kind: digits.shift(handwritten, kind, seed=0) for kind in digits.SHIFTS}}
    pixels[PRINTED] = printed
    domains = {name: torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255 for name, array in pixels.items()}
    return domains, labels, printed_labels


def solve(features: Doubles, labels: Integers) -> Solutions:
    """Solutions along the path, for unscaled features."""
    mean = features.mean()
    scale = features.std()
    paths = logistic_path((features - mean) / scale, labels, PATH)
    return [(rows / scale, offsets - rows.sum(1) * mean / scale) for rows, offsets in paths]


def folds(labels: Integers, generator: np.random.Generator) -> Integers:
    """Fold of each image, stratified."""
    fold = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        fold[members] = (np.arange(len(members)) + generator.integers(FOLDS)) % FOLDS
    return fold


def cross_validated(features: Doubles, labels: Integers, generator: np.random.Generator) -> list[Doubles]:
    """Of each C, the logits (N, K) of every training image under the solution without its fold."""
    fold = folds(labels, generator)
    logits = [np.empty((len(labels), int(labels.max()) + 1)) for _ in PATH]
    for number in range(FOLDS):
        out = fold == number
        for held_out, (weight, bias) in zip(logits, solve(features[~out], labels[~out]), strict=True):
            held_out[out] = features[out] @ weight.T + bias
    return logits


def choices(logits: Sequence[Doubles], targets: Integers) -> dict[str, int]:
    """Index on the path by rule."""
    path = ValidationPath(targets, task_metrics("classification"))
    for one in logits:
        path.add(one)
    return {rule: path.choose(rule).index for rule in RULES}


def measure(solutions: Solutions, domains: dict[str, tuple[Doubles, Integers]]) -> dict[str, list[float]]:
    """`MEASURES` of every C on test data."""
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    for weight, bias in solutions:
        scores = {}
        for name, (features, labels) in domains.items():
            logits = features @ weight.T + bias
            scores[name] = (float((logits.argmax(1) == labels).mean()), float(per_image_nll(logits, labels).mean()))
        accuracy, nll = np.mean([score for name, score in scores.items() if name != ID], axis=0).tolist()
        for name, value in zip(MEASURES, (scores[ID][0], accuracy, scores[ID][1], nll), strict=True):
            values[name].append(value)
    return values


def run(network: str, features: Features, labels: Integers, printed: Integers, train: int, seed: int) -> list[Split]:
    """One draw of images, for each size of the validation set."""
    generator = np.random.default_rng([seed, train])
    order = generator.permutation(len(labels))
    fitted = order[:train]
    if len(np.unique(labels[fitted])) < len(np.unique(labels)):
        return []
    test = order[-TEST:]
    domains = {name: (phi[test], labels[test]) for name, phi in features.items() if name != PRINTED}
    domains[PRINTED] = (features[PRINTED], printed)
    solutions = solve(features[ID][fitted], labels[fitted])
    measures = measure(solutions, domains)
    inside = choices(cross_validated(features[ID][fitted], labels[fitted], generator), labels[fitted])
    oracle = {f"oracle_{where}": int(np.argmax(measures[f"{where} acc"])) for where in ("ID", "OOD")}
    splits = []
    for size in VALIDATION:
        rows = order[train : train + size]
        logits = [features[ID][rows] @ weight.T + bias for weight, bias in solutions]
        chosen = choices(logits, labels[rows]) | {f"cv_{rule}": index for rule, index in inside.items()} | oracle
        splits.append(Split(network, train, size, seed, chosen, measures))
    return splits


def table(splits: Sequence[Split]) -> Iterator[str]:
    """Means over splits by rule."""
    yield f"{'rule':14} {'log10 C':>8} {'its sd':>7}" + "".join(f"{name:>9}" for name in MEASURES)
    for rule in splits[0].chosen:
        values = {name: np.mean([split.measures[name][split.chosen[rule]] for split in splits]) for name in MEASURES}
        groups: dict[tuple[str, int], list[float]] = {}
        for split in splits:
            groups.setdefault((split.network, split.train), []).append(float(np.log10(PATH[split.chosen[rule]])))
        # Within networks and sizes: between them, C has reason to differ.
        deviation = np.sqrt(np.mean([np.var(group) for group in groups.values()]))
        mean = np.mean([np.mean(group) for group in groups.values()])
        numbers = [f"{100 * value:9.2f}" if "acc" in name else f"{value:9.3f}" for name, value in values.items()]
        yield f"{rule:14} {mean:8.2f} {deviation:7.2f}" + "".join(numbers)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=8, help="draws per network and number of training images")
    parser.add_argument("--json", action="store_true", help="JSON on stdout in place of the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pixels, labels, printed = images()
    splits: list[Split] = []
    for name, network, side in networks():
        features: Features = {}
        for domain, pictures in pixels.items():
            sized = F.interpolate(pictures, size=(side, side), mode="bilinear") if side != digits.SIDE else pictures
            features[domain] = extract(network, sized).double().numpy()
        for train in TRAIN:
            for seed in range(options.splits):
                splits += run(name, features, labels, printed, train, seed)
        print(f"{name}: done", file=sys.stderr, flush=True)
    if options.json:
        rows: list[dict[str, Any]] = [split.__dict__ for split in splits]
        json.dump(rows, sys.stdout)
        return
    for size in VALIDATION:
        for title, kept in (("all networks", ""), ("pretrained networks", "random")):
            shown = [s for s in splits if s.validation == size and (not kept or kept not in s.network)]
            print(f"\n{title}, {size} validation images, {len(shown)} splits")
            print("\n".join(table(shown)))


if __name__ == "__main__":
    main()
