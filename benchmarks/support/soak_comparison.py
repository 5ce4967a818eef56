"""The end of a soaked study, compared with the same study undisturbed."""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.soak_plain import FINAL, METRICS
from benchmarks.support.soak_run import Outcome

Point = tuple[str, str, int]
"""(trial, metric, step)."""


@dataclass(frozen=True)
class StudyEnd:
    """Results of one study at its end."""

    curves: dict[str, Any]
    """Trial → its numbers in the study itself; only trials that used their budget."""
    points: dict[Point, list[float | None]]
    """Values in the tracker; None = not finite."""
    runs: int
    trials_with_runs: int
    zombies: int
    """Runs that are still RUNNING, the study's own included."""


def luthier(study: Path, database: Path, units: int) -> StudyEnd:
    """From the journal and the tracking database."""
    from orchestrator.record.journal import Journal, fold

    curves = {
        json.dumps([r.label, r.hparams, r.seed], sort_keys=True): [
            {key: value for key, value in unit.items() if not key.startswith("cost/")} for unit in r.history
        ]
        for r in fold(Journal.read(study / "journal.jsonl"))
        if r.state == "complete" and r.unit == units
    }
    names = dict(_query(database, "select run_uuid, name from runs where {active}"))
    kinds = dict(_query(database, "select run_uuid, value from tags where key = 'luthier.kind'"))
    of_trials = {run: name for run, name in names.items() if kinds.get(run) == "trial"}
    return _study_end(database, curves, of_trials, lambda key: not key.startswith(("cost/", "system/")))


def plain(study: Path, database: Path, units: int) -> StudyEnd:
    """From the last results and the tracking database."""
    final = json.loads((study / FINAL).read_text()) if (study / FINAL).exists() else {}
    curves = {number: result for number, result in final.items() if result["epoch"] == units}
    numbers = dict(_query(database, "select run_uuid, value from params where key = 'number'"))
    return _study_end(database, curves, numbers, lambda key: key in METRICS)


def row(whole: StudyEnd, disturbed: StudyEnd, calm: Outcome, rough: Outcome) -> dict[str, Any]:
    """The figures of the release gate, and the counts behind them."""
    count = Counter({point: len(values) for point, values in disturbed.points.items()})
    same = all(set(values) == set(disturbed.points.get(point, ())) for point, values in whole.points.items())
    return {
        "trials_lost": len(whole.curves.keys() - disturbed.curves.keys()),
        "epochs_repeated": rough.repeated,
        "points_lost": len(whole.points.keys() - disturbed.points.keys()),
        "points_dup": sum(count.values()) - len(count),
        "runs_dup": disturbed.runs - disturbed.trials_with_runs,
        "zombies": disturbed.zombies,
        "overhead_x": round(rough.seconds / calm.seconds, 2),
        "bit_exact": same and whole.curves == disturbed.curves,
        "max_stall_s": round(rough.longest_stall, 2),
        "points_extra": len(disturbed.points.keys() - whole.points.keys()),
        "faults": sum(rough.faults.values()),
        "seconds_per_fault": round((rough.seconds - calm.seconds) / max(1, sum(rough.faults.values())), 1),
        "trials": len(whole.curves),
        "points": len(whole.points),
        "seconds": [round(calm.seconds), round(rough.seconds)],
        "drivers": rough.drivers,
        "drivers_failed": rough.failures,
        "finished": rough.finished,
        "stall_undisturbed_s": round(calm.longest_stall, 2),
    }


def _study_end(database: Path, curves: dict[str, Any], trials: dict[str, str], counts: Any) -> StudyEnd:
    points: dict[Point, list[float | None]] = {}
    rows = _query(database, "select run_uuid, key, step, value, is_nan from metrics order by timestamp")
    for run, key, step, value, is_nan in rows:
        if run in trials and counts(key):
            number = None if is_nan or not math.isfinite(value) else float(value)
            points.setdefault((trials[run], key, step), []).append(number)
    open_runs = _query(database, "select run_uuid from runs where status = 'RUNNING' and {active}")
    return StudyEnd(curves, points, len(trials), len(set(trials.values())), len(open_runs))


def _query(database: Path, text: str) -> list[Any]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(text.format(active="lifecycle_stage = 'active'")).fetchall()
    finally:
        connection.close()
