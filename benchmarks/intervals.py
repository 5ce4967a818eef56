"""Coverage of the intervals, and how often equal and unequal strategies are called ahead, in simulated studies.

    python -m benchmarks.intervals                  # the tables of docs/intervals.md, some minutes on one core
    python -m benchmarks.intervals --json
    python -m benchmarks.intervals --shares STUDY   # the shares of the latent variance that a real study shows

A study has five strategies, each confirmed on three seeds and measured on the same n samples. Whether a sample is
classified correctly depends on its difficulty (shared by all strategies and seeds), on how it suits the strategy
(shared by the strategy's seeds), on the seed (the standard deviation of the accuracy over seeds is given in points),
and on chance: a probit model. The whole grid is reported: every size, scatter over seeds, accuracy and pair of shares
below, and seeds that scatter differently from strategy to strategy. The
estimators are those of `orchestrator.results.intervals`, on 2,000 studies per line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm

from orchestrator.record.journal import Journal
from orchestrator.record.kept_paths import predictions_file
from orchestrator.record.records import fold
from orchestrator.results.intervals import Floats, MeanEstimate, SeedVariance, estimate, holm
from orchestrator.results.predictions import output_matrix, read_predictions

STUDIES = 2000
STRATEGIES = 5
SEEDS = 3
SIZES = (36, 100, 360, 500, 2000)
SEED_POINTS = (0.0, 0.5, 1.0, 2.0)
"""Standard deviations of a strategy's accuracy over seeds, in points."""
UNEQUAL_POINTS = (0.0, 0.5, 0.5, 1.0, 2.0)
"""Those of five strategies that scatter differently."""
ACCURACIES = (0.6, 0.8, 0.95)
GAP = 0.05
POWER_ACCURACY = 0.8
"""Accuracy of the four that are behind."""
SHARES = ((0.5, 0.2), (0.7, 0.1))
"""Shares of the latent variance: the sample's difficulty, and how the sample suits the strategy."""
CHUNK = 12_000_000
"""Simulated values at a time."""


@dataclass(frozen=True)
class Setting:
    """One line of a table."""

    samples: int
    accuracies: tuple[float, ...]
    """True accuracy of every strategy, over samples and seeds."""
    seed_points: tuple[float, ...]
    """Of every strategy."""
    shares: tuple[float, float]
    seeds: int = SEEDS


@dataclass(frozen=True)
class Outcome:
    """What the estimators made of the studies of one setting, as shares of the studies."""

    coverage: float
    """Of the intervals of all strategies."""
    difference_coverage: float
    """Of the intervals of the paired differences to the first strategy."""
    ahead: float
    """Studies in which the leader is called ahead of every rival."""


def simulate(setting: Setting, studies: int = STUDIES, seed: int = 0) -> Outcome:
    """Simulate studies and evaluate every interval and comparison in them."""
    points = [round(10 * points) for points in setting.seed_points]
    shares = [round(10 * share) for share in setting.shares]
    generator = np.random.default_rng([seed, setting.samples, *points, *shares, setting.seeds])
    at_once = max(1, CHUNK // (len(setting.accuracies) * setting.seeds * setting.samples))
    covered = 0
    difference_covered = 0
    ahead = 0
    done = 0
    while done < studies:
        size = min(at_once, studies - done)
        correct = tables(setting, size, generator)
        counts = evaluate(correct, np.asarray(setting.accuracies))
        covered += counts[0]
        difference_covered += counts[1]
        ahead += counts[2]
        done += size
    strategies = len(setting.accuracies)
    return Outcome(covered / (studies * strategies), difference_covered / (studies * (strategies - 1)), ahead / studies)


def tables(setting: Setting, studies: int, generator: np.random.Generator) -> Floats:
    """Correctness (studies, strategies, seeds, samples) as 0 and 1, in float32 because there are millions."""
    shape = (studies, len(setting.accuracies), setting.seeds, setting.samples)
    shared, suiting = setting.shares
    difficulty = generator.standard_normal((studies, 1, 1, setting.samples), np.float32)
    suited = generator.standard_normal((studies, shape[1], 1, setting.samples), np.float32)
    latent = np.float32(np.sqrt(1 - shared - suiting)) * generator.standard_normal(shape, np.float32)
    latent += np.float32(np.sqrt(shared)) * difficulty + np.float32(np.sqrt(suiting)) * suited
    thresholds = []
    spreads = []
    for accuracy, points in zip(setting.accuracies, setting.seed_points, strict=True):
        spread = latent_spread(accuracy, points / 100)
        spreads.append(spread)
        thresholds.append(norm.ppf(accuracy) * np.sqrt(1 + spread**2))
    effects = generator.standard_normal(shape[:3]) * np.asarray(spreads)[:, None]
    bounds = np.asarray(thresholds)[:, None] + effects
    return (latent < bounds[..., None].astype(np.float32)).astype(np.float32)


def latent_spread(accuracy: float, spread: float) -> float:
    """Standard deviation of the seed's effect on the latent scale that makes that of the accuracy `spread`."""
    return float(spread / norm.pdf(norm.ppf(accuracy)))


def evaluate(correct: Floats, accuracies: Floats) -> tuple[int, int, int]:
    """(covered intervals, covered paired differences, studies whose leader is ahead of every rival)."""
    own = estimate(correct)
    low, high = own.share_interval()
    covered = int(((low <= accuracies) & (accuracies <= high)).sum())
    leaders = own.mean.argmax(axis=1)
    difference_covered = 0
    studies, strategies = own.mean.shape
    p_values = np.ones((studies, strategies))
    rows = np.arange(studies)
    leading = correct[rows, leaders]
    pooled = SeedVariance.pooled([_entry(own, index) for index in range(strategies)])
    for rival in range(strategies):
        p_values[:, rival] = estimate(leading - correct[:, rival], pooled=pooled).p_value()
        if rival > 0:
            low, high = estimate(correct[:, rival] - correct[:, 0], pooled=pooled).interval()
            truth = accuracies[rival] - accuracies[0]
            difference_covered += int(((low <= truth) & (truth <= high)).sum())
    ahead = sum(
        max(holm([p for rival, p in enumerate(row) if rival != leader])) <= 0.05
        for row, leader in zip(p_values.tolist(), leaders.tolist(), strict=True)
    )
    return covered, difference_covered, ahead


def _entry(estimates: MeanEstimate, index: int) -> MeanEstimate:
    """One strategy's part of an estimate over (studies, strategies)."""
    parts = (estimates.mean, estimates.variance, estimates.freedom, estimates.seed_share, estimates.seed_part)
    mean, variance, freedom, share, part = (values[:, index] for values in parts)
    return MeanEstimate(
        mean, variance, freedom, estimates.seeds, estimates.samples, share, part, estimates.seed_freedom
    )


def grid() -> Iterator[tuple[int, tuple[float, ...], tuple[float, float]]]:
    """Every size, scatter over seeds of the five strategies, and pair of shares."""
    scatters = [(points,) * STRATEGIES for points in SEED_POINTS]
    yield from itertools.product(SIZES, [*scatters, UNEQUAL_POINTS], SHARES)


def equal_table(studies: int) -> list[dict[str, Any]]:
    """Equal strategies: coverage, and how often the first of five, or of two, is called ahead."""
    rows = []
    for samples, points, shares in grid():
        for accuracy in ACCURACIES:
            five = simulate(Setting(samples, (accuracy,) * STRATEGIES, points, shares), studies)
            two = simulate(Setting(samples, (accuracy,) * 2, (points[0], points[-1]), shares), studies)
            row = {
                "n": samples,
                "seed_points": points,
                "shares": shares,
                "accuracy": accuracy,
                "coverage": five.coverage,
                "difference_coverage": five.difference_coverage,
                "ahead_of_five": five.ahead,
                "ahead_of_two": two.ahead,
            }
            rows.append(row)
    return rows


def gap_table(studies: int) -> list[dict[str, Any]]:
    """One strategy `GAP` better than four others, all equal: how often it is called ahead of every one of them."""
    accuracies = (POWER_ACCURACY + GAP, *(POWER_ACCURACY,) * (STRATEGIES - 1))
    rows = []
    for samples, points, shares in grid():
        ahead = simulate(Setting(samples, accuracies, points, shares), studies, seed=1).ahead
        rows.append({"n": samples, "seed_points": points, "shares": shares, "ahead": ahead})
    return rows


def markdown(equal: list[dict[str, Any]], unequal: list[dict[str, Any]]) -> str:
    """Both tables; the first averages over accuracies and shares and gives the extreme lines."""
    scatters = list(dict.fromkeys(row["seed_points"] for row in equal))
    lines = ["| n | seed ± points | coverage | of differences | ahead, of 5 | ahead, of 2 |", "|---" * 6 + "|"]
    for samples, points in itertools.product(SIZES, scatters):
        rows = [row for row in equal if (row["n"], row["seed_points"]) == (samples, points)]
        cells = [_range(rows, name) for name in ("coverage", "difference_coverage", "ahead_of_five", "ahead_of_two")]
        lines.append(f"| {samples:,} | {_points_text(points)} | {' | '.join(cells)} |")
    lines += ["", "| n | shares | " + " | ".join(f"seed ± {_points_text(points)}" for points in scatters) + " |"]
    lines.append("|---" * (2 + len(scatters)) + "|")
    for samples, shares in itertools.product(SIZES, SHARES):
        ahead = [f"{100 * row['ahead']:.1f} %" for row in unequal if (row["n"], row["shares"]) == (samples, shares)]
        lines.append(f"| {samples:,} | {shares[0]:g}, {shares[1]:g} | {' | '.join(ahead)} |")
    return "\n".join(lines)


def _points_text(points: tuple[float, ...]) -> str:
    return f"{points[0]:g}" if len(set(points)) == 1 else "unequal"


def _range(rows: list[dict[str, Any]], name: str) -> str:
    """Mean over accuracies and shares and, in brackets, the extremes."""
    values = [100 * row[name] for row in rows]
    return f"{sum(values) / len(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def measured_shares(study: Path) -> dict[str, tuple[float, float]]:
    """Shares of the latent variance on every split of a study, from its kept predictions.

    The tetrachoric correlation of two runs' correctness is the share of the sample's difficulty where the runs are of
    different strategies, and that share plus the strategy's own where they are of one. Medians over pairs of runs.
    """
    correct: dict[str, dict[str, list[Floats]]] = {}
    for record in fold(Journal.read(study / "journal.jsonl")):
        if record.role != "confirm" or record.predictions is None:
            continue
        table = read_predictions(predictions_file(study, record.number))
        splits = np.asarray(table["split"].to_pylist())
        right = (output_matrix(table).argmax(axis=1) == np.asarray(table["target"])).astype(np.float64)
        for split in np.unique(splits):
            correct.setdefault(str(split), {}).setdefault(record.label, []).append(right[splits == split])
    shares = {}
    for split, by_label in correct.items():
        within = [tetrachoric(*pair) for runs in by_label.values() for pair in itertools.combinations(runs, 2)]
        between = [
            tetrachoric(first, second)
            for one, other in itertools.combinations(by_label.values(), 2)
            for first, second in itertools.product(one, other)
        ]
        shared = float(np.nanmedian(between))
        shares[split] = (shared, float(np.nanmedian(within)) - shared)
    return shares


def tetrachoric(first: Floats, second: Floats) -> float:
    """Correlation of two normal variables of which only the signs (0 or 1) are observed; NaN where one is constant."""
    thresholds = [norm.ppf(1 - values.mean()) for values in (first, second)]
    if not np.isfinite(thresholds).all():
        return math.nan
    both_wrong = float(((first == 0) & (second == 0)).mean())

    def excess(correlation: float) -> float:
        covariance = [[1.0, correlation], [correlation, 1.0]]
        return float(multivariate_normal.cdf(thresholds, cov=covariance)) - both_wrong

    ends = (-0.999, 0.999)
    if excess(ends[0]) >= 0 or excess(ends[1]) <= 0:
        return ends[0] if excess(ends[0]) >= 0 else ends[1]
    return float(brentq(excess, *ends))


def main() -> None:
    """Simulate and print the tables, or measure the shares of a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shares", type=Path, metavar="STUDY")
    args = parser.parse_args()
    if args.shares:
        for split, (shared, suited) in measured_shares(args.shares).items():
            print(f"{split}: difficulty {shared:.2f}, suits the strategy {suited:.2f}")
        return
    equal = equal_table(args.studies)
    unequal = gap_table(args.studies)
    if args.json:
        print(json.dumps({"equal": equal, "unequal": unequal}, indent=1))
    else:
        print(markdown(equal, unequal))


if __name__ == "__main__":
    main()
