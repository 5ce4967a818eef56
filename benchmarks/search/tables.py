"""Outcomes of many replayed searches, and the tables that show them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from benchmarks.search.policies import POLICIES, Policy
from benchmarks.search.replay import search
from benchmarks.search.surrogate import VAL, Landscape, read

RIGHT = 0.005
"""A strategy counts as right where its best configuration is within this accuracy of the best of all."""
SURROGATES = 10
"""Bootstrap samples of the configurations that surrogates are fitted to: their spread is the replay's error."""


def outcomes(
    table: Path, policies: Iterable[Policy], budgets: tuple[int, ...], repeats: int
) -> Iterator[dict[str, Any]]:
    """Replay every policy `repeats` times; surrogates take turns."""
    size = sum(len(trials.hparams) for trials in read(table).values())
    # A longer search would see the surrogate's own shape, not the landscape's.
    affordable = tuple(budget for budget in budgets if 3 * budget <= size)
    for sample in range(min(SURROGATES, repeats)):
        landscape = Landscape.load(table, seed=sample)
        right = {s for s, best in landscape.best.items() if best >= landscape.optimum - RIGHT}
        for policy in policies:
            for repeat in range(sample, repeats, SURROGATES):
                for outcome in search(landscape, policy, affordable, seed=repeat):
                    yield {
                        "landscape": landscape.name,
                        "policy": policy.name,
                        "sample": sample,
                        **vars(outcome),
                        "right": outcome.chosen in right,
                    }


def replay(task: tuple[Path, str, tuple[int, ...], int]) -> list[dict[str, Any]]:
    table, name, budgets, repeats = task
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return list(outcomes(table, [p for p in POLICIES if p.name == name], budgets, repeats))


def report(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a line per landscape, budget and policy, then the averages over landscapes."""
    yield "| landscape | trials | policy | regret, points | ± | right strategy | epochs' time |"
    yield "|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["landscape"], row["budget"], row["policy"]].append(row)
        groups["all", row["budget"], row["policy"]].append(row)
    order = {policy.name: i for i, policy in enumerate(POLICIES)}
    reference = {
        key[:2]: float(np.mean([row["seconds"] for row in group])) for key, group in groups.items() if not order[key[2]]
    }
    for key in sorted(groups, key=lambda k: (k[0] == "all", k[0], k[1], order[k[2]])):
        group = groups[key]
        regrets = [100 * row["regret"] for row in group]
        by_sample = defaultdict(list)
        for row in group:
            by_sample[row["landscape"], row["sample"]].append(100 * row["regret"])
        means = [float(np.mean(values)) for values in by_sample.values()]
        error = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
        right = float(np.mean([row["right"] for row in group]))
        time = float(np.mean([row["seconds"] for row in group])) / reference[key[:2]]
        yield f"| {key[0]} | {key[1]} | {key[2]} | {np.mean(regrets):.2f} | {error:.2f} | {right:.0%} | {time:.2f} |"


def errors(tables: list[Path]) -> Iterator[str]:
    """Markdown: how well each surrogate predicts left-out configurations."""
    yield "| landscape | strategy | configurations | left-out error, points | scatter of the table, points |"
    yield "|---|---|---|---|---|"
    for table in tables:
        trials = read(table)
        for strategy, surrogate in Landscape.load(table).surrogates.items():
            final = trials[strategy].curves[:, -1, VAL]
            yield (
                f"| {table.stem} | {strategy} | {len(trials[strategy].hparams)} | {100 * surrogate.error:.1f} | "
                f"{100 * float(np.std(final)):.1f} |"
            )
