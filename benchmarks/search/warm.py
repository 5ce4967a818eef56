"""What a search on one landscape takes over from all others: leave one landscape out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.search.surrogate import VAL, Trials
from benchmarks.search.surrogate import read as read_table
from orchestrator.record.records import TrialRecord
from orchestrator.search.stages import Entry
from orchestrator.search.warm_start import WarmStart, take_over

OBJECTIVE = "val/acc"


def warm_start_without(table: Path, tables: Sequence[Path], strategies: list[str]) -> WarmStart:
    """The warm start of a search on one table's landscape, with every other table as an earlier study.

    Args:
        table: of the landscape that is searched.
        tables: of all landscapes.
        strategies: that are searched.
    """
    studies = {other.stem: study_of(read_table(other)) for other in tables if other != table}
    entries = {s: take_over(studies, Entry("", s), OBJECTIVE, maximise=True) for s in strategies}
    return WarmStart(tuple(studies), entries)


def study_of(trials: dict[str, Trials]) -> list[TrialRecord]:
    """A landscape's configurations as the search trials of a study: the first seed of each, without diverged ones."""
    records: list[TrialRecord] = []
    for strategy, table in trials.items():
        _, first = np.unique(table.configuration, return_index=True)
        for index in first:
            curve = table.curves[index, :, VAL]
            records.append(
                TrialRecord(
                    trial_id=str(len(records)),
                    number=len(records),
                    strategy=strategy,
                    label=strategy,
                    hparams=table.hparams[table.configuration[index]],
                    state="failed" if table.diverged[index] else "complete",
                    metrics={f"best/{OBJECTIVE}": float(curve.max())},
                )
            )
    return records
