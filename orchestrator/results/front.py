"""Pareto front of a study: configurations that no other beats in all objectives.

The objectives are the rule's criterion (the selecting metric on validation) and costs. As for the choice, a confirmed
configuration counts with the means over its fresh seeds, and search trials stand in only where nothing was confirmed:
the best of many search trials flatters. Pure functions on records; test data are never looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from orchestrator.record.costs import COSTS, objective_value
from orchestrator.record.records import TrialRecord
from orchestrator.results.leaderboard import describe
from orchestrator.results.selection import Choice, rank, reported_value
from orchestrator.wording import listed
from trainables.specs.metrics import CLASSIFICATION, TaskMetrics
from trainables.specs.suggestions import did_you_mean

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class TradeOff:
    """One configuration with its objectives."""

    choice: Choice
    """The configuration, its score and its confirmed seeds."""
    costs: Mapping[str, float]
    """Cost by its name in the study file; the mean over the runs that the score is a mean of."""
    on_front: bool
    """Whether no other configuration is at least as good in every objective and better in one."""


@dataclass(frozen=True)
class Front:
    """All configurations that can be compared, and which of them are on the front."""

    rule: str
    costs: Sequence[str]
    """Names of the costs."""
    confirmed: bool
    """Whether scores and costs are means over fresh seeds; False = search trials, because nothing was confirmed."""
    configurations: Sequence[TradeOff]
    """The front first, from its best score down, then the others by score."""
    left_out: Sequence[Choice] = ()
    """Configurations without a recorded value of one of the costs."""

    @property
    def members(self) -> list[TradeOff]:
        """The configurations on the front, from the best score down."""
        return [configuration for configuration in self.configurations if configuration.on_front]

    def sentence(self, metrics: TaskMetrics = CLASSIFICATION) -> str:
        """What is compared, and how many are on the front."""
        titles = listed([f"validation {metrics.selection.title}", *(COSTS[name].title for name in self.costs)], 4)
        behind = "means over the confirmed seeds" if self.confirmed else "search trials, because nothing was confirmed"
        count = f"{len(self.members)} of {len(self.configurations)} configurations"
        text = f"Pareto front of {titles} ({behind}): {count}."
        text += " No other is at least as good in all of these and better in one."
        if self.left_out:
            numbers = ", ".join(str(choice.record.number) for choice in self.left_out)
            text += f" Left out, because a cost was not recorded: trials {numbers}."
        return text


def non_dominated(scores: Sequence[Sequence[float]]) -> list[bool]:
    """Which points no other point dominates; larger is better in every coordinate.

    A point dominates another if it is at least as large in every coordinate and larger in one. Equal points do not
    dominate each other: they are on the front together, or not at all.

    Raises:
        ValueError: points of different lengths, or a coordinate that is NaN, which compares with nothing.

    Example:
        >>> non_dominated([(0.9, -10), (0.8, -5), (0.8, -10), (0.9, -10)])
        [True, True, False, True]
    """
    if not scores:
        return []
    points = np.asarray(scores, dtype=np.float64)
    if points.ndim != 2:
        raise ValueError(f"Points need one length, but got an array of shape {points.shape}.")
    if np.isnan(points).any():
        raise ValueError(f"Points are compared by numbers, but got NaN in {int(np.isnan(points).sum())} coordinates.")
    on_front = []
    for point in points:
        at_least = (points >= point).all(axis=1)
        larger = (points > point).any(axis=1)
        on_front.append(not bool((at_least & larger).any()))
    return on_front


def front(
    records: Iterable[TrialRecord],
    costs: Sequence[str],
    rule: str = "id_val",
    metrics: TaskMetrics = CLASSIFICATION,
) -> Front:
    """The Pareto front of a study.

    Args:
        costs: names of costs (`orchestrator.record.costs.COSTS`), one or more.

    Raises:
        ValueError: no or unknown costs; or see `orchestrator.results.selection.rank`.

    Example:
        >>> trials = [
        ...     TrialRecord(trial_id=name, number=number, strategy=name, label=name, state="complete", config_hash=name,
        ...                 metrics={"best/val/acc": accuracy, "cost/trainable_parameters": size})
        ...     for number, (name, accuracy, size) in enumerate(
        ...         [("full", 0.9, 1e6), ("lora", 0.9, 1e4), ("linear_probe", 0.8, 1e3)])
        ... ]
        >>> [member.choice.record.label for member in front(trials, ["trainable_parameters"]).members]
        ['lora', 'linear_probe']
    """
    check_costs(costs)
    records = list(records)
    ranked = rank(records, rule, metrics)
    compared = [choice for choice in ranked if choice.seeds] or ranked
    values = [_costs(records, compared, name) for name in costs]
    rows = [dict(zip(costs, row, strict=True)) for row in zip(*values, strict=True)]
    complete = {
        at: {name: value for name, value in row.items() if value is not None}
        for at, row in enumerate(rows)
        if None not in row.values()
    }
    scores = [
        [metrics.selection.score(compared[at].value), *(-value for value in row.values())]
        for at, row in complete.items()
    ]
    flags = non_dominated(scores)
    configurations = [
        TradeOff(compared[at], row, on_front) for (at, row), on_front in zip(complete.items(), flags, strict=True)
    ]
    return Front(
        rule=rule,
        costs=tuple(costs),
        confirmed=bool(compared[0].seeds),
        configurations=sorted(configurations, key=lambda configuration: not configuration.on_front),  # stable
        left_out=[choice for at, choice in enumerate(compared) if at not in complete],
    )


def front_candidates(
    records: Iterable[TrialRecord],
    k: int,
    costs: Sequence[str],
    rule: str = "id_val",
    metrics: TaskMetrics = CLASSIFICATION,
) -> list[TrialRecord]:
    """Up to `k` configurations for confirmation: the best of every label, then the search's front, then the rest.

    Each of the three from its best score down. Search trials alone decide, whether or not some were confirmed before.

    Raises:
        ValueError: see `front`.
    """
    searched = [record for record in records if record.role != "confirm"]
    on_front = {member.choice.record.number for member in front(searched, costs, rule, metrics).members}
    ranked = [choice.record for choice in rank(searched, rule, metrics)]
    first: dict[str, int] = {}
    for record in ranked:
        first.setdefault(record.label, record.number)
    best = set(first.values())
    return sorted(ranked, key=lambda record: (record.number not in best, record.number not in on_front))[:k]


def check_costs(costs: Sequence[str]) -> None:
    """Raise ValueError for no cost, or a name that is none."""
    if isinstance(costs, str) or not costs:
        raise ValueError(f"A front needs a list of one or more costs of {', '.join(COSTS)}, but got {costs!r}.")
    for name in costs:
        if name not in COSTS:
            raise ValueError(f"A cost is one of {', '.join(COSTS)}, but got {name!r}.{did_you_mean(name, COSTS)}")


def front_frame(front: Front, metrics: TaskMetrics = CLASSIFICATION) -> pd.DataFrame:
    """One row per configuration that can be compared, the front first.

    Columns: `label, strategy, number, config_hash, hparams, seeds` (confirmed ones; 0 = the search trial)`, val/acc`
    (the rule's criterion, under the name of the study's metric)`,` the costs, and `on_front`.
    """
    columns = ["label", "strategy", "number", "config_hash", "hparams", "seeds", metrics.validation, *front.costs]
    return pd.DataFrame(front_rows(front, metrics), columns=[*columns, "on_front"])


def front_rows(front: Front, metrics: TaskMetrics = CLASSIFICATION) -> list[dict[str, Any]]:
    """The rows of `front_frame` as plain values."""
    rows = []
    for configuration in front.configurations:
        choice = configuration.choice
        record = choice.record
        rows.append(
            {
                "label": record.label,
                "strategy": record.strategy,
                "number": record.number,
                "config_hash": record.config_hash,
                "hparams": dict(record.hparams),
                "seeds": choice.seeds,
                metrics.validation: choice.value,
                **configuration.costs,
                "on_front": configuration.on_front,
            }
        )
    return rows


def front_titles(front: Front) -> list[str]:
    """Column titles of `front_cells`."""
    return ["strategy", "trial", "seeds", "val", *(COSTS[name].title for name in front.costs), "hyperparameters"]


def front_cells(front: Front, metrics: TaskMetrics = CLASSIFICATION) -> list[list[str]]:
    """The configurations on the front as texts, one list per configuration."""
    lines = []
    for member in front.members:
        choice = member.choice
        costs = [COSTS[name].text(value) for name, value in member.costs.items()]
        score = metrics.selection.text(choice.value)
        record = choice.record
        lines.append(
            [record.label, str(record.number), str(choice.seeds or "-"), score, *costs, describe(record.hparams)]
        )
    return lines


def front_markdown(front: Front, metrics: TaskMetrics = CLASSIFICATION) -> list[str]:
    """The front's lines in Markdown, the sentence first."""
    titles = front_titles(front)
    lines = [front.sentence(metrics), "", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    return lines + ["| " + " | ".join(cells) + " |" for cells in front_cells(front, metrics)]


def print_front(console: Console, front: Front, metrics: TaskMetrics = CLASSIFICATION) -> None:
    """Print the front as a table."""
    console.print(front.sentence(metrics), markup=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    titles = front_titles(front)
    for title in titles:
        text = title in (titles[0], titles[-1])
        table.add_column(title, justify="left" if text else "right", overflow="fold", no_wrap=not text)
    for cells in front_cells(front, metrics):
        table.add_row(*(escape(cell) for cell in cells))
    console.print(table, highlight=False)


def cost_warnings(records: Iterable[TrialRecord], costs: Sequence[str]) -> list[str]:
    """Costs that did not work as objectives of the search, one sentence each."""
    complete = [record for record in records if record.role == "search" and record.state == "complete"]
    sentences = []
    for name in costs:
        cost = COSTS[name]
        values = {objective_value(record.metrics, name) for record in complete}
        if len(complete) > 1 and len(values) == 1 and None not in values:
            text = cost.text(values.pop())
            sentences.append(
                f"The objective {name} is {text} in all {len(complete)} complete trials of the search: it could not "
                "steer it. Add entries that differ in it, or leave it out of search.objectives."
            )
        sources = {next((r for r in cost.recorded if r in record.metrics), None) for record in complete} - {None}
        if len(sources) > 1:
            sentences.append(
                f"The objective {name} is {' in some trials of the search and '.join(sorted(map(str, sources)))} in "
                "others, which the sampler took for one quantity. Run a study on machines of one kind."
            )
    return sentences


def _costs(records: Sequence[TrialRecord], compared: Sequence[Choice], name: str) -> list[float | None]:
    """A cost of every configuration, of all under one recorded name.

    Memory of a GPU is not compared with memory of the host: where some trials had a GPU and others had none, all count
    with the host's.
    """
    columns = [
        [reported_value(records, choice.record, recorded) for choice in compared] for recorded in COSTS[name].recorded
    ]
    return next((column for column in columns if None not in column), columns[-1])
