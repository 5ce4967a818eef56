"""The leaderboard: one row per entry of the study, with the configuration that the rule chose and its numbers over
fresh seeds. Pure functions on records.

The leaderboard as a person sees it: a table on a terminal, Markdown, and plain JSON values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from scipy.stats import t as student_t

from orchestrator.record.records import TrialRecord
from orchestrator.results.selection import Choice, per_label, tested

if TYPE_CHECKING:
    from rich.console import Console


REPORTED = ("test/acc", "ood/mean/acc", "ood/worst/acc", "calib/ece")
"""Metrics of the leaderboard; `<metric>/ci95` is the half-width of their 95 % interval."""
GAINS = {"gain": "test/acc", "gain/ood": "ood/mean/acc"}
"""Column of the relative gain over linear probing → the accuracy that it compares."""
PROBE = "linear_probe"
"""The strategy that gains are measured from."""


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its two-sided Student-t interval, t(n-1) · s / √n with the sample standard deviation s.

    The half-width is NaN for fewer than two values, and both are NaN for none.
    """
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(student_t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)


def measured(records: Iterable[TrialRecord], config_hash: str) -> list[TrialRecord]:
    """The trials that a configuration is reported by: its complete confirmations, one per seed. The search trial is
    not among them, because it was chosen for being good; it stands in only where there is no confirmation."""
    own = sorted((r for r in records if r.config_hash == config_hash and r.state == "complete"), key=lambda r: r.number)
    confirmed = {r.seed: r for r in reversed(own) if r.role == "confirm"}
    if confirmed:
        return sorted(confirmed.values(), key=lambda r: r.number)
    return [r for r in own if r.role == "search"][:1]


def leaderboard(records: Sequence[TrialRecord], rule: str = "id_val") -> pd.DataFrame:
    """One row per label, best first by the criterion of its chosen configuration; labels without a complete trial
    stand last, with NaN.

    Where a linear probe is among the labels, `gain` and `gain/ood` are the relative gains over it (see
    `relative_gain`) of the means of `test/acc` and `ood/mean/acc`.

    Columns: `label, strategy, rule, criterion` (value that the rule ranked by)`, number, config_hash, hparams, seeds`
    (how many trials the numbers are a mean of)`, confirmed` (False: only the search trial)`, val/acc`, then mean and
    `/ci95` half-width of each metric of `REPORTED`, then `trials, complete, pruned, failed` of the search.

    Under `val_domain:<name>` that domain counts as validation: OOD mean and worst are those of the others.

    Raises:
        ValueError: no complete search trial, or the rule lacks what it needs.
    """
    records = tested(records, rule)
    chosen = per_label(records, rule)
    labels = list(chosen) + [label for label in dict.fromkeys(r.label for r in records) if label not in chosen]
    rows = [_row(records, label, chosen.get(label), rule) for label in labels]
    for probe in [row for row in rows if row["strategy"] == PROBE and row["seeds"]][:1]:
        for row in rows:
            row |= {gain: relative_gain(row[metric], probe[metric]) for gain, metric in GAINS.items()}
    return pd.DataFrame(rows)


def relative_gain(accuracy: float, probe: float) -> float:
    """(accuracy − probe) / probe: the improvement over the accuracy of linear probing, relative to it (papers/003,
    Fig. 2). NaN where the probe's accuracy is 0 or either is NaN."""
    return (accuracy - probe) / probe if probe else math.nan


def _row(records: Sequence[TrialRecord], label: str, choice: Choice | None, rule: str) -> dict[str, Any]:
    search = [r for r in records if r.label == label and r.role == "search"]
    runs = measured(records, choice.record.config_hash) if choice else []
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
        "val/acc": _value(choice.record, "best/val/acc") if choice else math.nan,
    }
    for metric in REPORTED:
        values = [value for r in runs if (value := r.metric(metric)) is not None]
        row[metric], row[f"{metric}/ci95"] = mean_interval(values)
    row["trials"] = len(search)
    for state in ("complete", "pruned", "failed"):
        row[state] = sum(r.state == state for r in search)
    return row


def _value(record: TrialRecord, metric: str) -> float:
    value = record.metric(metric)
    return math.nan if value is None else value


Row = Mapping[Any, Any]
"""One row of `orchestrator.results.leaderboard.leaderboard`."""

SCORES = ("val", "test", "OOD mean", "OOD worst", "ECE")
GAIN_TITLES = ("gain", "gain OOD")
WIDE = 100
"""Columns of a terminal from which on the gains have a place in the table."""


def markdown_table(rows: Sequence[Row]) -> list[str]:
    """The leaderboard's lines in Markdown."""
    titles = ["strategy", "hyperparameters", "seeds", *SCORES, *(GAIN_TITLES if has_gains(rows) else ())]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    return [*lines, *("| " + " | ".join([*cells(row), *gains(row)]) + " |" for row in rows)]


def print_table(console: Console, rows: Sequence[Row]) -> None:
    """The leaderboard on a terminal, and the configuration of each row below it."""
    from rich import box
    from rich.table import Table

    wide = has_gains(rows) and console.width >= WIDE
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("strategy", style="bold", overflow="fold")
    for title in ("seeds", *SCORES, *(GAIN_TITLES if wide else ())):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        label, _, *numbers = cells(row)
        table.add_row(label, *numbers, *(gains(row) if wide else ()))
    table.caption = "per cent; mean ± 95 % interval over fresh seeds, or the search trial where there is one seed"
    if wide:
        table.caption += "; gain = accuracy relative to linear probing's"
    console.print(table)
    for row in rows:
        if row["seeds"]:
            parts = [f"trial {row['number']}", describe(row["hparams"])]
            if has_gains(rows) and not wide and row["strategy"] != PROBE:
                found = zip(gains(row), ("", " OOD"), strict=True)
                parts.insert(1, "gain " + ", ".join(f"{text}{where}" for text, where in found if text != "-"))
            console.print(f"{row['label']}: {', '.join(parts)}", markup=False, highlight=False)


def has_gains(rows: Sequence[Row]) -> bool:
    """Whether the study has a linear probe to compare with."""
    return bool(rows) and all(name in rows[0] for name in GAINS)


def gains(row: Row) -> list[str]:
    """Relative gains over linear probing in per cent, as text; empty where the study has no linear probe."""
    found = [float(row[name]) for name in GAINS if name in row]
    return ["-" if math.isnan(value) else f"{100 * value:+.1f} %" for value in found]


def cells(row: Row) -> list[str]:
    """Label, hyperparameters, seeds and `SCORES` of a row as text; numbers in per cent, "-" where there is none."""
    values = [_percent(row["val/acc"], math.nan)]
    values += [_percent(row[metric], row[f"{metric}/ci95"]) for metric in REPORTED]
    return [str(row["label"]), describe(row["hparams"]), str(row["seeds"]), *values]


def describe(hparams: Mapping[str, Any]) -> str:
    """Hyperparameters on one line, numbers with three significant digits."""
    shown = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in hparams.items() if v is not None}
    return " ".join(f"{key}={value}" for key, value in shown.items()) or "-"


def choice_values(choice: Choice) -> dict[str, Any]:
    """A chosen configuration as plain values."""
    record = choice.record
    shown = {name: getattr(record, name) for name in ("number", "label", "strategy", "config_hash", "seed", "trial_id")}
    return shown | {
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


def _percent(mean: float, half: float) -> str:
    if not math.isfinite(mean):
        return "-"
    return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if math.isfinite(half) else "")
