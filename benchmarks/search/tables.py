"""Outcomes of many replayed searches, and the tables that show them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from scipy.stats import spearmanr

import search_spaces
from benchmarks.search.policies import POLICIES, RANDOM, RAY, SWEEPS
from benchmarks.search.replay import search
from benchmarks.search.surrogate import VAL, Array, Landscape, read
from benchmarks.search.warm import warm_start_without

RIGHT = 0.005
"""A strategy counts as right where its best configuration is within this accuracy of the best of all."""
REACHED = 0.001
"""A search has reached another's best where its own is within this accuracy of it."""
SURROGATES = 10
"""Bootstrap samples of the configurations that surrogates are fitted to: their spread is the replay's error."""

Row = dict[str, Any]
Groups = Mapping[tuple[str, int, str], Sequence[Row]]
"""(landscape, budget, policy) → outcomes."""


@dataclass(frozen=True)
class Task:
    """All searches on one surrogate of a landscape."""

    table: Path
    """Of the landscape."""
    sample: int
    """Bootstrap sample of the configurations."""
    tables: tuple[Path, ...]
    """Of all landscapes: a warm start comes from the others, and without others is not replayed."""
    policies: tuple[str, ...]
    """Names."""
    budgets: tuple[int, ...]
    """Trials; those above a third of the table's configurations are left out."""
    repeats: int
    """Searches per policy and budget, over all surrogates: search r runs on surrogate r modulo their number."""


def tasks(tables: Sequence[Path], policies: Sequence[str], budgets: Sequence[int], repeats: int) -> list[Task]:
    """Everything to be replayed."""
    shared = (tuple(tables), tuple(policies), tuple(budgets), repeats)
    return [Task(table, sample, *shared) for table in tables for sample in range(min(SURROGATES, repeats))]


def replay(task: Task) -> list[Row]:
    """The outcomes of a task, one per policy, budget and search."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return list(_outcomes(task))


def _outcomes(task: Task) -> Iterator[Row]:
    table = task.table
    trials = read(table)
    size = sum(len(part.hparams) for part in trials.values())
    # A longer search would see the surrogate's own shape, not the landscape's.
    affordable = tuple(budget for budget in task.budgets if 3 * budget <= size)
    warm = warm_start_without(table, task.tables, [s for s in trials if search_spaces.space(s)])
    landscape = Landscape.load(table, seed=task.sample)
    right = {s for s, best in landscape.best.items() if best >= landscape.optimum - RIGHT}
    for policy in POLICIES:
        if policy.name not in task.policies or (policy.warm and not warm.studies):
            continue
        for repeat in range(task.sample, task.repeats, SURROGATES):
            for outcome in search(landscape, policy, affordable, repeat, warm):
                yield {
                    "landscape": landscape.name,
                    "policy": policy.name,
                    "sample": task.sample,
                    "repeat": repeat,
                    **vars(outcome),
                    "right": outcome.chosen in right,
                }


ALL = "all"
"""In place of a landscape's name: means over landscapes."""


def report(rows: Sequence[Row]) -> Iterator[str]:
    """Markdown: regret, per landscape and on average, and what it takes to do as well as the references."""
    groups = _grouped(rows)
    yield f"| landscape | trials | policy | regret, points | ± | less than {RANDOM} by | ± | right strategy | time |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for landscape, budget, policy in _ordered(groups):
        group = groups[landscape, budget, policy]
        reference = groups.get((landscape, budget, RANDOM), [])
        mean, error = _mean_and_error(group, lambda row: 100 * row["regret"])
        gain, gain_error = _mean_and_error(
            _differences(reference, group, "regret"), lambda row: 100 * row["difference"]
        )
        time = _ratio(group, reference)
        right = float(np.mean([row["right"] for row in group]))
        yield (
            f"| {landscape} | {budget} | {policy} | {mean:.2f} | {error:.2f} | {gain:.2f} | {gain_error:.2f} | "
            f"{right:.0%} | {time:.2f} |"
        )
    yield ""
    yield from _speed(groups)
    yield ""
    yield from _strategies(groups)


def _speed(groups: Groups) -> Iterator[str]:
    """Device time until a search is as good on validation as another one at its end, as a share of the other's time."""
    yield f"| landscape | trials | policy | time to the best of {SWEEPS} | reached | to that of {RAY} | reached |"
    yield "|---|---|---|---|---|---|---|"
    for landscape, budget, policy in _ordered(groups):
        cells = []
        for reference in (SWEEPS, RAY):
            share, reached = _time_to_best_of(
                groups[landscape, budget, policy], groups.get((landscape, budget, reference), [])
            )
            cells += [f"{share:.2f}" if math.isfinite(share) else "-", f"{reached:.0%}"]
        yield f"| {landscape} | {budget} | {policy} | {' | '.join(cells)} |"


def _strategies(groups: Groups) -> Iterator[str]:
    """Regret within each strategy, over the searches that completed a trial of it."""
    names = sorted({strategy for group in groups.values() for row in group for strategy in row["regrets"]})
    yield f"| landscape | trials | policy | regret of {' | '.join(names)} |"
    yield f"|---|---|---|{'---|' * len(names)}"
    for landscape, budget, policy in _ordered(groups):
        cells = []
        for name in names:
            values = [100 * row["regrets"][name] for row in groups[landscape, budget, policy] if name in row["regrets"]]
            share = len(values) / len(groups[landscape, budget, policy])
            completed = "" if share == 1 else f" ({share:.0%})"
            cells.append(f"{np.mean(values):.2f}{completed}" if values else "")
        yield f"| {landscape} | {budget} | {policy} | {' | '.join(cells)} |"


def _grouped(rows: Sequence[Row]) -> Groups:
    groups: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["landscape"], row["budget"], row["policy"]].append(row)
        groups[ALL, row["budget"], row["policy"]].append(row)
    return groups


def _ordered(groups: Groups) -> list[tuple[str, int, str]]:
    order = {policy.name: i for i, policy in enumerate(POLICIES)}
    return sorted(groups, key=lambda key: (key[0] == ALL, key[0], key[1], order[key[2]]))


def _mean_and_error(rows: Sequence[Row], value: Callable[[Row], float]) -> tuple[float, float]:
    """Mean over landscapes of the mean over searches, and its bootstrap standard error.

    That is the standard deviation between surrogates fitted to bootstrap samples of the configurations; those of
    different landscapes are independent.
    """
    by_sample: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_sample[row["landscape"]][row["sample"]].append(value(row))
    if not by_sample:
        return math.nan, math.nan
    means = []
    variances = []
    for samples in by_sample.values():
        values = [float(np.mean(part)) for part in samples.values()]
        means.append(float(np.mean(values)))
        variances.append(float(np.var(values, ddof=1)) if len(values) > 1 else math.nan)
    return float(np.mean(means)), math.sqrt(sum(variances)) / len(variances)


def _differences(reference: Sequence[Row], group: Sequence[Row], key: str) -> list[Row]:
    """`reference` less `group`, search by search on the same surrogate and seed."""
    values = {_search_of(row): row[key] for row in reference}
    return [{**row, "difference": values[_search_of(row)] - row[key]} for row in group if _search_of(row) in values]


def _search_of(row: Row) -> tuple[Any, ...]:
    return row["landscape"], row["sample"], row["repeat"]


def _ratio(group: Sequence[Row], reference: Sequence[Row]) -> float:
    """Mean over landscapes of the training time, relative to the reference's."""
    ratios = []
    for landscape in sorted({row["landscape"] for row in group}):
        parts = [[r["seconds"] for r in rows if r["landscape"] == landscape] for rows in (group, reference)]
        ratios.append(float(np.mean(parts[0]) / np.mean(parts[1])) if parts[1] else math.nan)
    return float(np.mean(ratios))


def _time_to_best_of(group: Sequence[Row], reference: Sequence[Row]) -> tuple[float, float]:
    """(median share of the reference's time, share of the searches that get there at all).

    A search that does not get there counts as infinitely long, so that the median is infinite where most do not.
    """
    goals = {_search_of(row): (row["progress"][-1][1], row["seconds"]) for row in reference}
    shares = []
    for row in group:
        if _search_of(row) in goals:
            goal, seconds = goals[_search_of(row)]
            times = [time for time, accuracy in row["progress"] if accuracy >= goal - REACHED]
            shares.append(times[0] / seconds if times else math.inf)
    if not shares:
        return math.nan, math.nan
    return float(np.median(shares)), float(np.mean(np.isfinite(shares)))


def errors(tables: list[Path]) -> Iterator[str]:
    """Markdown: how well each surrogate predicts left-out configurations."""
    yield (
        "| landscape | strategy | configurations | diverged | model | left-out error, points | of the better half | "
        "scatter of the table, points | between seeds | best |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for table in tables:
        trials = read(table)
        landscape = Landscape.load(table)
        for strategy, surrogate in landscape.surrogates.items():
            part = trials[strategy]
            points = [surrogate.error, surrogate.error_of_better, float(np.std(part.curves[:, -1, VAL]))]
            points += [surrogate.noise, landscape.best[strategy]]
            cells = " | ".join(f"{100 * value:.1f}" for value in points)
            counts = f"{len(part.hparams)} | {int(part.diverged.sum())}"
            yield f"| {table.stem} | {strategy} | {counts} | {surrogate.model} | {cells} |"


def rank_correlations(tables: list[Path]) -> Iterator[str]:
    """Markdown: Spearman's rank correlation of an epoch's validation with the best one of its trial, per strategy.

    Early stopping after an epoch can be right about the rest of the training where this is high. Trials that diverged
    are left out.
    """
    curves = {table.stem: read(table) for table in tables}
    epochs = max(trials.curves.shape[1] for parts in curves.values() for trials in parts.values())
    yield f"| landscape | strategy | {' | '.join(f'epoch {epoch}' for epoch in range(1, epochs + 1))} |"
    yield f"|---|---|{'---|' * epochs}"
    for landscape, parts in curves.items():
        for strategy, trials in parts.items():
            values = trials.curves[~trials.diverged][:, :, VAL]
            if len(values) > 2:
                cells = [f"{_rank_correlation(values[:, u], values.max(axis=1)):.2f}" for u in range(values.shape[1])]
                yield f"| {landscape} | {strategy} | {' | '.join(cells)} |"


def _rank_correlation(some: Array, others: Array) -> float:
    return float(spearmanr(some, others).statistic)
