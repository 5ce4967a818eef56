"""The leaderboard as a person sees it: a table on a terminal, Markdown, and plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.results.leaderboard import GAINS, PROBE, REPORTED

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.results.selection import Choice

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
