"""Corruption robustness of the entries of a study, from what their confirmed trials recorded.

The corruption error (CE) of a corruption is 100 − accuracy, mean over its five severities, and mCE the mean over the
corruptions, as Ha et al. (2024, Table 4) report it. Beside it stand two figures relative to the study's own linear
probe: the relative mCE as Hendrycks and Dietterich (2019) define it, where the error on clean pictures is subtracted
from both, and the mean of each corruption's error over the probe's. Pure functions on records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from orchestrator.results.comparison import Competitor, Score
from orchestrator.results.intervals import estimate
from orchestrator.wording import counted
from trainables.specs.corruptions import COMMON, GROUPS
from trainables.specs.metrics import (
    CLEAN_ERROR,
    CORRUPTION_ERROR,
    CORRUPTION_ERRORS,
    CORRUPTION_SAMPLES,
    MEAN_CORRUPTION_ERROR,
    NORMALISED_MCE,
    RELATIVE_MCE,
)

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.record.records import TrialRecord
    from orchestrator.results.intervals import Floats

PROBE = "linear_probe"
"""The strategy whose errors are the baseline."""


@dataclass(frozen=True)
class Robustness:
    """Errors of one entry under corruptions, in per cent, means over its confirmed trials."""

    label: str
    strategy: str
    mce: Score
    errors: Mapping[str, Score]
    """Corruption → CE, in the order of the paper's tables."""
    clean: float
    """Error on the same pictures without corruption; NaN = not measured."""
    grid: Mapping[str, Sequence[float]]
    """Corruption → error by severity."""
    relative_mce: float = math.nan
    """Relative mCE against the linear probe; NaN where the study has none, or the probe loses nothing."""
    normalised_mce: float = math.nan
    """Mean of CE over the linear probe's; NaN where the study has none."""

    def group(self, name: str) -> float:
        """Mean CE over one of the paper's four groups; NaN where none of it was measured."""
        values = [self.errors[corruption].mean for corruption in GROUPS[name] if corruption in self.errors]
        return sum(values) / len(values) if values else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON values, but for NaN."""
        return {
            "label": self.label,
            "strategy": self.strategy,
            MEAN_CORRUPTION_ERROR.name: _score_values(self.mce),
            RELATIVE_MCE.name: self.relative_mce,
            NORMALISED_MCE.name: self.normalised_mce,
            CLEAN_ERROR.name: self.clean,
            "corruptions": {
                name: {"ce": _score_values(score), "severities": list(self.grid[name])}
                for name, score in self.errors.items()
            },
        }


def robustness(entries: Sequence[Competitor]) -> list[Robustness]:
    """Robustness of the entries that were measured under corruptions, most robust first.

    Entries are compared on the corruptions that the first of them has; one that lacks some of these is left out.
    """
    measured = {entry.label: (entry, _runs(entry)) for entry in entries}
    present = {label: pair for label, pair in measured.items() if pair[1]}
    if not present:
        return []
    names = _names(next(iter(present.values()))[1][0])
    rows = [
        _of_runs(entry, [run for run in runs if set(names) <= {*_names(run)}], names)
        for entry, runs in present.values()
        if any(set(names) <= {*_names(run)} for run in runs)
    ]
    probe = next((row for row in rows if row.strategy == PROBE), None)
    compared = rows if probe is None else [_against(row, probe) for row in rows]
    return sorted(compared, key=lambda row: row.mce.mean)


def _runs(entry: Competitor) -> list[TrialRecord]:
    name = MEAN_CORRUPTION_ERROR.name
    return [run for run in entry.runs if run.metric(name) is not None and CORRUPTION_ERRORS in run.curves]


def _names(run: TrialRecord) -> list[str]:
    """The corruptions that a trial was measured under, in the order of the paper's tables."""
    measured = set(run.curves[CORRUPTION_ERRORS]["columns"]["corruption"])
    return [name for name in COMMON if name in measured]


def _of_runs(entry: Competitor, runs: Sequence[TrialRecord], names: Sequence[str]) -> Robustness:
    samples = _samples(runs, names)
    errors = {name: _score(runs, samples, [name]) for name in names}
    clean = [value for run in runs if (value := run.metric(CLEAN_ERROR.name)) is not None]
    return Robustness(
        label=entry.label,
        strategy=entry.strategy,
        mce=_score(runs, samples, names),
        errors=errors,
        clean=sum(clean) / len(clean) if len(clean) == len(runs) else math.nan,
        grid={name: np.mean([_severities(run, name) for run in runs], axis=0).tolist() for name in names},
    )


def _severities(run: TrialRecord, name: str) -> list[float]:
    columns = run.curves[CORRUPTION_ERRORS]["columns"]
    return [float(error) for row, error in zip(columns["corruption"], columns["error"], strict=True) if row == name]


def _samples(runs: Sequence[TrialRecord], names: Sequence[str]) -> dict[str, Floats] | None:
    """Corruption → errors of each run and picture, (S, n); None where not all runs have them of the same pictures."""
    tables = [(run.curves.get(CORRUPTION_SAMPLES) or {}).get("columns") or {} for run in runs]
    if any(not {"sample", *names} <= table.keys() for table in tables):
        return None
    pictures = [list(table["sample"]) for table in tables]
    if any(other != pictures[0] for other in pictures) or len(pictures[0]) < 2:
        return None
    return {name: np.asarray([table[name] for table in tables], np.float64) for name in names}


def _score(runs: Sequence[TrialRecord], samples: Mapping[str, Floats] | None, names: Sequence[str]) -> Score:
    """Mean error over some corruptions with its interval, over pictures and seeds where per-sample errors are kept."""
    if samples is not None:
        values = np.mean([samples[name] for name in names], axis=0)
        count = values.shape[1]
        return Score.of_estimate(estimate(values, np.zeros(count, np.int64), np.ones(1)))
    of_runs = [[run.metrics[CORRUPTION_ERROR.of(name)] for name in names] for run in runs]
    score = Score.of(sum(values) / len(values) for values in of_runs)
    assert score is not None
    return score


def _against(row: Robustness, probe: Robustness) -> Robustness:
    """The same with its figures relative to the linear probe's."""
    relative = [_ratio(row.errors[name].mean - row.clean, probe.errors[name].mean - probe.clean) for name in row.errors]
    over_probe = [_ratio(row.errors[name].mean, probe.errors[name].mean) for name in row.errors]
    return Robustness(
        label=row.label,
        strategy=row.strategy,
        mce=row.mce,
        errors=row.errors,
        clean=row.clean,
        grid=row.grid,
        relative_mce=sum(relative) / len(relative),
        normalised_mce=sum(over_probe) / len(over_probe),
    )


def robustness_frame(rows: Sequence[Robustness]) -> pd.DataFrame:
    """One row per entry; see `orchestrator.results.study_results.Results.robustness`."""
    name = MEAN_CORRUPTION_ERROR.name
    return pd.DataFrame(
        [
            {
                "label": row.label,
                "strategy": row.strategy,
                name: row.mce.mean,
                f"{name}/low": row.mce.low,
                f"{name}/high": row.mce.high,
                NORMALISED_MCE.name: row.normalised_mce,
                RELATIVE_MCE.name: row.relative_mce,
                CLEAN_ERROR.name: row.clean,
                **{CORRUPTION_ERROR.of(corruption): score.mean for corruption, score in row.errors.items()},
            }
            for row in rows
        ]
    )


def _ratio(value: float, baseline: float) -> float:
    """Quotient in per cent; NaN where the baseline is not positive."""
    return 100 * value / baseline if baseline > 0 else math.nan


def _score_values(score: Score) -> dict[str, Any]:
    return {
        "mean": score.mean,
        "low": score.low,
        "high": score.high,
        "seeds": score.seeds,
        "samples": score.samples,
        "interval": score.basis,
    }


TITLES = ("entry", "mCE", "clean", "over probe", "relative", *GROUPS)
"""Headings of `lines`."""


def lines(rows: Sequence[Robustness]) -> list[list[str]]:
    """The table as text, in the order of `TITLES`; "-" where there is no number."""
    return [
        [
            row.label,
            _text(row.mce.mean, row.mce.half),
            *(_text(value) for value in (row.clean, row.normalised_mce, row.relative_mce)),
            *(_text(row.group(group)) for group in GROUPS),
        ]
        for row in rows
    ]


def corruption_titles(rows: Sequence[Robustness]) -> list[str]:
    """Headings of `corruption_lines`."""
    return ["corruption", *(row.label for row in rows)]


def corruption_lines(rows: Sequence[Robustness]) -> list[list[str]]:
    """CE of every corruption, a column per entry."""
    if not rows:
        return []
    return [
        [name.replace("_", " "), *(_text(row.errors[name].mean, row.errors[name].half) for row in rows)]
        for name in rows[0].errors
    ]


def note(rows: Sequence[Robustness]) -> str:
    """What the table's numbers are, and what their intervals are over."""
    first = rows[0]
    corruptions = counted(len(first.errors), "corruption")
    bases = [f"{basis}" for basis in dict.fromkeys(row.mce.basis for row in rows) if basis != "none"]
    over = f" ± 95 % interval over {', '.join(bases)}" if bases else ""
    images = f"; {first.mce.samples:,} pictures" if first.mce.samples else ""
    return (
        f"per cent; mCE = mean error over {corruptions} at 5 severities{over}{images}; over probe, relative = that "
        "error, and what corruption adds to the clean error, as a share of the linear probe's"
    )


def markdown(rows: Sequence[Robustness]) -> list[str]:
    """Both tables in Markdown."""
    tables = ((TITLES, lines(rows)), (corruption_titles(rows), corruption_lines(rows)))
    text = []
    for titles, cells in tables:
        text += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        text += ["| " + " | ".join(row) + " |" for row in cells]
        text.append("")
    return [*text, f"Errors: {note(rows)}."]


def print_robustness(console: Console, rows: Sequence[Robustness]) -> None:
    """Print the entries by mCE."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=note(rows))
    table.add_column("under corruptions", style="bold", overflow="fold")
    for title in TITLES[1:]:
        table.add_column(title, justify="right", no_wrap=True)
    for cells in lines(rows):
        table.add_row(*map(escape, cells))
    console.print(table)


def _text(value: float, half: float = math.nan) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.1f}" if math.isnan(half) else f"{value:.1f} ± {half:.1f}"
