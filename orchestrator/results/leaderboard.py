"""Leaderboard: one row per entry of the study, with its chosen configuration and that one's numbers over fresh seeds.

As a data frame, on a terminal, in Markdown, and as plain JSON values. Pure functions on records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.table import Table
from scipy.stats import t as student_t

from orchestrator.record.records import TrialRecord
from orchestrator.results.selection import Choice, per_label, without_validation_domain
from trainables.specs.metrics import CLASSIFICATION, GAIN, GAIN_OOD, TEST, Metric, TaskMetrics

if TYPE_CHECKING:
    from rich.console import Console

INTERVAL = "/ci95"
"""Suffix of the columns with the half-width of a metric's 95 % interval."""
GAINS = (GAIN.name, GAIN_OOD.name)
"""Columns of the relative gain over linear probing, on ID test and on OOD."""
PROBE = "linear_probe"
"""The strategy that gains are measured from."""


def reported_metrics(metrics: TaskMetrics) -> dict[str, Metric]:
    """Recorded name → metric, of the leaderboard's columns with intervals.

    Example:
        >>> list(reported_metrics(CLASSIFICATION))
        ['test/acc', 'ood/mean/acc', 'ood/worst/acc', 'calib/ece']
    """
    selection = dict.fromkeys((metrics.test, metrics.ood_mean, metrics.ood_worst), metrics.selection)
    return selection | {metric.on(TEST): metric for metric in metrics.leaderboard}


def summary_names(metrics: TaskMetrics) -> list[str]:
    """The leaderboard's columns that are metrics of the study's own run.

    Example:
        >>> summary_names(CLASSIFICATION)
        ['val/acc', 'test/acc', 'ood/mean/acc', 'ood/worst/acc', 'calib/ece', 'gain', 'gain/ood']
    """
    return [metrics.validation, *reported_metrics(metrics), *GAINS]


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its two-sided Student-t interval, t(n-1) · s / √n with the sample standard deviation s.

    The half-width is NaN for fewer than two values, and both are NaN for none.

    Example:
        >>> mean, half = mean_interval([1.0, 2.0, 3.0])
        >>> f"{mean:.1f} ± {half:.2f}"
        '2.0 ± 2.48'
    """
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    # Exact sums, so that the order of the trials does not change the last bit.
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(student_t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)


def reported_trials(records: Iterable[TrialRecord], config_hash: str) -> list[TrialRecord]:
    """The trials that report a configuration: its complete confirmations, one per seed.

    The search trial is not among them, because it was chosen for being good; it stands in only where there is no
    confirmation.
    """
    complete = [r for r in records if r.config_hash == config_hash and r.state == "complete"]
    complete.sort(key=lambda r: r.number)
    # Reversed, so that the earliest trial of a seed is the one that stays in the dict.
    confirmed = {r.seed: r for r in reversed(complete) if r.role == "confirm"}
    if confirmed:
        return sorted(confirmed.values(), key=lambda r: r.number)
    # Chosen for being good, so its numbers flatter; the column `confirmed` shows that.
    return [r for r in complete if r.role == "search"][:1]


def leaderboard(
    records: Sequence[TrialRecord], rule: str = "id_val", metrics: TaskMetrics = CLASSIFICATION
) -> pd.DataFrame:
    """One row per label, best first by the criterion of its chosen configuration.

    Labels without a complete trial come last, with NaN. Where a linear probe is among the labels, `gain` and `gain/ood`
    are the relative gains over it (see `relative_gain`) of the means on ID test and over the OOD domains.

    Columns: `label, strategy, rule, criterion` (value that the rule ranked by)`, number, config_hash, hparams, seeds`
    (how many trials the numbers are a mean of)`, confirmed` (False: only the search trial)`, val/acc`, then mean and
    `/ci95` half-width of each of `reported_metrics`, then `trials, complete, pruned, failed` of the search. Metric
    names are those of the task; here of classification.

    Under `val_domain:<name>` that domain counts as validation: OOD mean and worst are those of the others.

    Raises:
        ValueError: no complete search trial, or the rule lacks what it needs.

    Example:
        >>> from orchestrator.record.records import TrialRecord
        >>> trial = TrialRecord(trial_id="t", number=0, strategy="full", label="full", state="complete",
        ...                     config_hash="h", metrics={"best/val/acc": 0.9, "test/acc": 0.8})
        >>> leaderboard([trial])[["label", "val/acc", "test/acc", "seeds"]].to_dict("records")
        [{'label': 'full', 'val/acc': 0.9, 'test/acc': 0.8, 'seeds': 1}]
    """
    records = without_validation_domain(records, rule, metrics)
    chosen = per_label(records, rule, metrics)
    unranked = [label for label in dict.fromkeys(r.label for r in records) if label not in chosen]
    rows = [_row(records, label, chosen.get(label), rule, metrics) for label in [*chosen, *unranked]]
    probe = next((row for row in rows if row["strategy"] == PROBE and row["seeds"]), None)
    if probe is not None:
        for row in rows:
            for gain, name in zip(GAINS, (metrics.test, metrics.ood_mean), strict=True):
                row[gain] = relative_gain(row[name], probe[name], metrics.selection)
    return pd.DataFrame(rows)


def relative_gain(value: float, probe: float, metric: Metric = CLASSIFICATION.selection) -> float:
    """Improvement over the score of linear probing, relative to it: (value − probe) / probe for an accuracy.

    After Odonnat et al. (2026), Fig. 2. Positive values are improvements, whatever the metric's direction. NaN where
    the probe's value is 0 or either is NaN.

    Example:
        >>> relative_gain(0.75, 0.5)
        0.5
    """
    return metric.score(value - probe) / abs(probe) if probe else math.nan


def _row(
    records: Sequence[TrialRecord], label: str, choice: Choice | None, rule: str, metrics: TaskMetrics
) -> dict[str, Any]:
    search = [r for r in records if r.label == label and r.role == "search"]
    runs = reported_trials(records, choice.record.config_hash) if choice else []
    row: dict[str, Any] = {
        "label": label,
        "strategy": next(r.strategy for r in records if r.label == label),
        "rule": rule,
        "criterion": choice.value if choice else math.nan,
        "number": choice.record.number if choice else -1,
        "config_hash": choice.record.config_hash if choice else "",
        "hparams": dict(choice.record.hparams) if choice else {},
        "seeds": len(runs),
        "confirmed": any(r.role == "confirm" for r in runs),
        metrics.validation: _value(choice.record, metrics.best_validation) if choice else math.nan,
    }
    for name in reported_metrics(metrics):
        values = [run.metric(name) for run in runs]
        row[name], row[f"{name}{INTERVAL}"] = mean_interval([value for value in values if value is not None])
    row["trials"] = len(search)
    for state in ("complete", "pruned", "failed"):
        row[state] = sum(r.state == state for r in search)
    return row


def _value(record: TrialRecord, name: str) -> float:
    value = record.metric(name)
    return math.nan if value is None else value


Row = Mapping[Any, Any]
"""One row of `leaderboard`."""

GAIN_TITLES = ("gain", "gain OOD")
WIDE = 100
"""Terminal width, in columns, from which on the gains are columns of the table."""


def score_titles(metrics: TaskMetrics) -> list[str]:
    """Headings of the columns with scores, in the order of `cells`.

    Example:
        >>> score_titles(CLASSIFICATION)
        ['val', 'test', 'OOD mean', 'OOD worst', 'ECE']
    """
    titles = ["val", "test", "OOD mean", "OOD worst"]
    columns = [metrics.selection] * len(titles) + list(metrics.leaderboard)
    titles += [metric.heading or metric.title for metric in metrics.leaderboard]
    if len({metric.unit for metric in columns}) == 1:  # stated once, by `score_note`
        return titles
    units = ["%" if metric.unit == "fraction" else metric.unit for metric in columns]
    return [f"{title} ({unit})" if unit else title for title, unit in zip(titles, units, strict=True)]


def score_note(metrics: TaskMetrics) -> str:
    """Caption of a table of scores: the unit that all of them share, and their meaning."""
    units = {metric.unit for metric in (metrics.selection, *metrics.leaderboard)}
    shared = units.pop() if len(units) == 1 else ""
    unit = "per cent" if shared == "fraction" else shared
    meaning = "mean ± 95 % interval over fresh seeds, or the search trial where there is one seed"
    return f"{unit}; {meaning}" if unit else meaning


def markdown_table(rows: Sequence[Row], metrics: TaskMetrics = CLASSIFICATION) -> list[str]:
    """The leaderboard's lines in Markdown."""
    gain_titles = GAIN_TITLES if has_gains(rows) else ()
    titles = ["strategy", "hyperparameters", "seeds", *score_titles(metrics), *gain_titles]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        lines.append("| " + " | ".join([*cells(row, metrics), *gains(row)]) + " |")
    return lines


def print_table(console: Console, rows: Sequence[Row], metrics: TaskMetrics = CLASSIFICATION) -> None:
    """Print the leaderboard, and the configuration of each row below it."""
    wide = has_gains(rows) and console.width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("strategy", style="bold", overflow="fold")
    for title in ("seeds", *score_titles(metrics), *(GAIN_TITLES if wide else ())):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        label, _, *numbers = cells(row, metrics)
        table.add_row(label, *numbers, *(gains(row) if wide else ()))
    table.caption = score_note(metrics)
    if wide:
        table.caption += f"; gain = {metrics.selection.title} relative to linear probing's"
    console.print(table)
    for row in rows:
        if row["seeds"]:
            parts = [f"trial {row['number']}", describe(row["hparams"])]
            if has_gains(rows) and not wide and row["strategy"] != PROBE:
                texts = zip(gains(row), ("", " OOD"), strict=True)
                parts.insert(1, "gain " + ", ".join(f"{text}{split}" for text, split in texts if text != "-"))
            console.print(f"{row['label']}: {', '.join(parts)}", markup=False, highlight=False)


def has_gains(rows: Sequence[Row]) -> bool:
    """Whether the study has a linear probe to compare with."""
    return bool(rows) and all(name in rows[0] for name in GAINS)


def gains(row: Row) -> list[str]:
    """Relative gains over linear probing in per cent, as text; empty where the study has no linear probe."""
    values = [float(row[name]) for name in GAINS if name in row]
    return ["-" if math.isnan(value) else f"{100 * value:+.1f} %" for value in values]


def cells(row: Row, metrics: TaskMetrics = CLASSIFICATION) -> list[str]:
    """Label, hyperparameters, seeds and scores of a row as text; "-" where there is no number."""
    scores = [_number(row[metrics.validation], math.nan, metrics.selection)]
    for name, metric in reported_metrics(metrics).items():
        scores.append(_number(row[name], row[f"{name}{INTERVAL}"], metric))
    return [str(row["label"]), describe(row["hparams"]), str(row["seeds"]), *scores]


def describe(hparams: Mapping[str, Any]) -> str:
    """Hyperparameters on one line, numbers with three significant digits.

    Example:
        >>> describe({"lr_head": 0.01234, "optimizer": "sgd", "preset": None})
        'lr_head=0.0123 optimizer=sgd'
    """
    texts = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in hparams.items() if v is not None}
    return " ".join(f"{key}={value}" for key, value in texts.items()) or "-"


def choice_values(choice: Choice) -> dict[str, Any]:
    """A chosen configuration as plain values."""
    record = choice.record
    fields = ("number", "label", "strategy", "config_hash", "seed", "trial_id")
    return {name: getattr(record, name) for name in fields} | {
        "rule": choice.rule,
        "oracle": choice.oracle,
        "criterion": choice.criterion,
        "value": choice.value,
        "hparams": dict(record.hparams),
    }


def finite(value: Any) -> Any:
    """JSON values: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(mean: float, half: float, metric: Metric) -> str:
    return metric.number(mean, half) if math.isfinite(mean) else "-"
