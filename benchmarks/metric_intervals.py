"""Coverage of the intervals of metrics that are no mean over samples, in simulated studies.

    python -m benchmarks.metric_intervals           # the table of docs/intervals.md, some minutes on one core
    python -m benchmarks.metric_intervals --json

A study has two equal strategies, each on three seeds and the same n samples, whose labels are drawn at random. A logit
is the separation where the class is the label, plus noise of variance 1: in part the sample's own (shared by all runs),
in part the strategy's with this sample, the rest the run's. Seeds add to the separation. The truth is the metric of
infinitely many samples, on average over seeds. Where a class has fewer than two samples, metrics that are means over
classes have no interval; such studies are counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.results.comparison import Score
from orchestrator.results.intervals import Floats, SeedVariance, estimate
from orchestrator.results.predictions import SampleTable
from orchestrator.results.sample_values import SAMPLE_FUNCTIONS, Integers, SplitOutputs

STUDIES = 300
STRATEGIES = 2
SEEDS = 3
SIZES = (100, 500, 2000)
CLASSES = {
    "2, one of 10 %": (0.9, 0.1),
    "10, largest 5 × smallest": tuple(np.geomspace(5, 1, 10) / np.geomspace(5, 1, 10).sum()),
}
"""Shares of the labels."""
SEPARATIONS = (1.5, 3.0)
SEED_SPREADS = (0.0, 0.2)
"""Standard deviation of the separation over seeds."""
SHARES = (0.5, 0.2)
"""Shares of a logit's noise variance: of the sample, and of how it suits the strategy."""
SHARPNESS = 2.0
"""Factor of the logits, which makes their probabilities overconfident."""
METRICS = ("macro_f1", "auroc", "ap", "ece")
POPULATION = 200_000
"""Samples behind the true value, at each of the nodes."""
NODES = 5
"""Of the Gauss-Hermite quadrature over seeds."""


@dataclass(frozen=True)
class Setting:
    """One line of the table, for all metrics."""

    samples: int
    classes: str
    separation: float
    seed_spread: float


def grid() -> Iterator[Setting]:
    """Every line."""
    for line in itertools.product(SIZES, CLASSES, SEPARATIONS, SEED_SPREADS):
        yield Setting(*line)


def truths(classes: str, separation: float, seed_spread: float) -> dict[str, float]:
    """Metric of infinitely many samples, mean over seeds."""
    generator = np.random.default_rng(0)
    proportions = CLASSES[classes]
    targets = np.repeat(np.arange(len(proportions)), np.round(np.asarray(proportions) * POPULATION).astype(int))
    noise = generator.standard_normal((len(targets), len(proportions)), np.float32)
    own = np.eye(len(proportions), dtype=np.float32)[targets]
    points, weights = np.polynomial.hermite_e.hermegauss(NODES)
    nodes = list(zip(points, weights / weights.sum(), strict=True)) if seed_spread else [(0.0, 1.0)]
    values = dict.fromkeys(METRICS, 0.0)
    for point, weight in nodes:
        logits = SHARPNESS * (noise + np.float32(separation + seed_spread * point) * own)
        for key in METRICS:
            of_samples = SAMPLE_FUNCTIONS[key].values(SplitOutputs(logits, targets))
            assert of_samples is not None
            values[key] += float(weight * of_samples.mean())
    return values


def simulate(setting: Setting, truth: dict[str, float], studies: int, seed: int = 0) -> list[dict[str, Any]]:
    """Coverage in per cent, of each metric."""
    generator = np.random.default_rng(
        [seed, setting.samples, list(CLASSES).index(setting.classes), round(10 * setting.separation),
         round(10 * setting.seed_spread)]
    )  # fmt: skip
    covered = dict.fromkeys(METRICS, 0)
    differences = dict.fromkeys(METRICS, 0)
    without = dict.fromkeys(METRICS, 0)
    widths: dict[str, list[float]] = {key: [] for key in METRICS}
    for _ in range(studies):
        targets, logits = study(setting, generator)
        for key in METRICS:
            tables = [of_runs(key, runs, targets) for runs in logits]
            present = [table for table in tables if table is not None]
            if len(present) < STRATEGIES:
                without[key] += 1
                continue
            scores = [Score.of_table(table) for table in present]
            covered[key] += sum(score.low <= truth[key] <= score.high for score in scores)
            widths[key] += [score.high - score.low for score in scores]
            pooled = SeedVariance.pooled([estimate(table.values) for table in present])
            low, high = estimate(present[0].values - present[1].values, pooled=pooled).interval()
            differences[key] += bool(low <= 0 <= high)
    rows = []
    for key in METRICS:
        counted = studies - without[key]
        row = {
            "n": setting.samples,
            "classes": setting.classes,
            "separation": setting.separation,
            "seed_spread": setting.seed_spread,
            "metric": key,
            "truth": truth[key],
            "coverage": 100 * covered[key] / (STRATEGIES * counted),
            "difference_coverage": 100 * differences[key] / counted,
            "width": float(np.mean(widths[key])),
            "without": 100 * without[key] / studies,
        }
        rows.append(row)
    return rows


def study(setting: Setting, generator: np.random.Generator) -> tuple[Integers, Floats]:
    """Labels (n,) and logits (strategies, seeds, n, K) of one study."""
    proportions = CLASSES[setting.classes]
    classes = len(proportions)
    targets = generator.choice(classes, size=setting.samples, p=proportions)
    shared, suiting = SHARES
    shape = (STRATEGIES, SEEDS, setting.samples, classes)
    noise = np.sqrt(1 - shared - suiting) * generator.standard_normal(shape)
    noise += np.sqrt(shared) * generator.standard_normal((1, 1, *shape[2:]))
    noise += np.sqrt(suiting) * generator.standard_normal((STRATEGIES, 1, *shape[2:]))
    separation = setting.separation + setting.seed_spread * generator.standard_normal(shape[:2])
    own = np.eye(classes)[targets]
    return targets, (SHARPNESS * (noise + separation[..., None, None] * own)).astype(np.float32)


def of_runs(key: str, logits: Floats, targets: Integers) -> SampleTable | None:
    """Per-sample values of a strategy's runs; None where a class has one sample, or none."""
    function = SAMPLE_FUNCTIONS[key]
    counts = np.bincount(targets, minlength=logits.shape[-1])
    if function.every_class and counts.min() < 2:
        return None
    rows = [function.values(SplitOutputs(run, targets)) for run in logits]
    values = np.stack([row for row in rows if row is not None])
    classes = len(counts)
    effective = classes**2 / float((1 / counts).sum()) if function.every_class else float(len(targets))
    strata = np.zeros(len(targets), np.int64)
    return SampleTable(values, strata, np.ones(1), "", effective, function.ends)


def table(studies: int) -> list[dict[str, Any]]:
    """All lines of all metrics."""
    rows = []
    cache: dict[tuple[str, float, float], dict[str, float]] = {}
    for setting in grid():
        key = (setting.classes, setting.separation, setting.seed_spread)
        if key not in cache:
            cache[key] = truths(*key)
        rows += simulate(setting, cache[key], studies)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line per setting, and one column per metric: coverage, and that of differences."""
    titles = ["n", "classes", "separation ± seeds", *METRICS, "no interval"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for setting in grid():
        of_line = {
            row["metric"]: row
            for row in rows
            if (row["n"], row["classes"], row["separation"], row["seed_spread"])
            == (setting.samples, setting.classes, setting.separation, setting.seed_spread)
        }
        cells = [
            f"{of_line[key]['truth']:.3f}: {of_line[key]['coverage']:.1f}, {of_line[key]['difference_coverage']:.1f}"
            for key in METRICS
        ]
        head = f"| {setting.samples:,} | {setting.classes} | {setting.separation:g} ± {setting.seed_spread:g} "
        lines.append(f"{head}| {' | '.join(cells)} | {of_line[METRICS[0]]['without']:.0f} % |")
    return "\n".join(lines)


def main() -> None:
    """Simulate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = table(args.studies)
    print(json.dumps(rows, indent=1) if args.json else markdown(rows))


if __name__ == "__main__":
    main()
