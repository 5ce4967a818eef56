"""Coverage of the intervals, and how often equal and unequal strategies are called ahead, in simulated studies.

    python -m benchmarks.intervals            # the tables of docs/intervals.md, some minutes on one core
    python -m benchmarks.intervals --json

A study has five strategies, each confirmed on three seeds and measured on the same n samples. Whether a sample is
classified correctly depends on its difficulty (shared by all strategies and seeds), on how it suits the strategy
(shared by the strategy's seeds), on the seed (the standard deviation of the accuracy over seeds is given in points),
and on chance: a probit model. The estimators are those of `orchestrator.results.intervals`, on 2,000 studies per line.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from orchestrator.results.intervals import Floats, MeanEstimate, SeedVariance, estimate, holm

STUDIES = 2000
STRATEGIES = 5
SEEDS = 3
SIZES = (36, 100, 500, 2000)
SEED_POINTS = (0.0, 0.5, 1.0)
"""Standard deviations of a strategy's accuracy over seeds, in points."""
ACCURACIES = (0.8, 0.95)
GAP = 0.05
POWER_ACCURACY = 0.8
"""Accuracy of the four that are behind."""
SHARED = 0.7
"""Share of the latent variance that is the sample's difficulty."""
SUITED = 0.1
"""Share that is how the sample suits the strategy."""
CHUNK = 12_000_000
"""Simulated values at a time."""


@dataclass(frozen=True)
class Setting:
    """One line of a table."""

    samples: int
    accuracies: tuple[float, ...]
    """True accuracy of every strategy, over samples and seeds."""
    seed_points: float
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
    generator = np.random.default_rng([seed, setting.samples, round(10 * setting.seed_points), setting.seeds])
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
    rest = 1 - SHARED - SUITED
    difficulty = generator.standard_normal((studies, 1, 1, setting.samples), np.float32)
    suited = generator.standard_normal((studies, shape[1], 1, setting.samples), np.float32)
    latent = np.sqrt(rest, dtype=np.float32) * generator.standard_normal(shape, np.float32)
    latent += np.float32(np.sqrt(SHARED)) * difficulty + np.float32(np.sqrt(SUITED)) * suited
    thresholds = []
    spreads = []
    for accuracy in setting.accuracies:
        spread = latent_spread(accuracy, setting.seed_points / 100)
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


def coverage_table(studies: int) -> list[dict[str, Any]]:
    """Equal strategies at three accuracies: coverage, and how often the first of five, or of two, is called ahead."""
    rows = []
    for samples in SIZES:
        for points in SEED_POINTS:
            for accuracy in ACCURACIES:
                setting = Setting(samples, (accuracy,) * STRATEGIES, points)
                five = simulate(setting, studies)
                two = simulate(Setting(samples, (accuracy,) * 2, points), studies)
                rows.append(
                    {
                        "n": samples,
                        "seed_points": points,
                        "accuracy": accuracy,
                        "coverage": five.coverage,
                        "difference_coverage": five.difference_coverage,
                        "ahead_of_five": five.ahead,
                        "ahead_of_two": two.ahead,
                    }
                )
    return rows


def power_table(studies: int) -> list[dict[str, Any]]:
    """One strategy `GAP` better than four others, all equal: how often it is called ahead of every one of them."""
    rows = []
    for samples in SIZES:
        for points in SEED_POINTS:
            setting = Setting(samples, (POWER_ACCURACY + GAP, *(POWER_ACCURACY,) * (STRATEGIES - 1)), points)
            rows.append({"n": samples, "seed_points": points, "ahead": simulate(setting, studies, seed=1).ahead})
    return rows


def markdown(equal: list[dict[str, Any]], unequal: list[dict[str, Any]]) -> str:
    """Both tables; the first averages over accuracies and shows the extreme lines."""
    lines = ["| n | seed ± points | coverage | of differences | ahead, of 5 | ahead, of 2 |", "|---" * 6 + "|"]
    for samples in SIZES:
        for points in SEED_POINTS:
            rows = [row for row in equal if (row["n"], row["seed_points"]) == (samples, points)]
            cells = [
                _range(rows, name) for name in ("coverage", "difference_coverage", "ahead_of_five", "ahead_of_two")
            ]
            lines.append(f"| {samples:,} | {points:g} | {' | '.join(cells)} |")
    lines += ["", "| n | " + " | ".join(f"seed ± {points:g}" for points in SEED_POINTS) + " |"]
    lines.append("|---" * (1 + len(SEED_POINTS)) + "|")
    for samples in SIZES:
        shares = [f"{100 * row['ahead']:.1f} %" for row in unequal if row["n"] == samples]
        lines.append(f"| {samples:,} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _range(rows: list[dict[str, Any]], name: str) -> str:
    """Mean over accuracies and, in brackets, the extremes."""
    values = [100 * row[name] for row in rows]
    return f"{sum(values) / len(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def main() -> None:
    """Simulate and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=STUDIES)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    equal = coverage_table(args.studies)
    unequal = power_table(args.studies)
    if args.json:
        print(json.dumps({"equal": equal, "unequal": unequal}, indent=1))
    else:
        print(markdown(equal, unequal))


if __name__ == "__main__":
    main()
