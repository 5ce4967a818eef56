"""`luthier status`: progress of a study.

From its journal alone; needs no cluster and changes nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.record.records import TrialRecord, fold, metrics_of, study_header, validation_score
from orchestrator.search.warm_start import warm_start_sentences
from orchestrator.study import read_journal
from orchestrator.study_file.load import load_study
from orchestrator.study_file.schema import StudySpec
from trainables.specs.metrics import TaskMetrics, task_metrics

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Status", "find_study", "read_journal", "status"]

MAX_LISTED = 10
"""Running, paused or failed trials that are printed; `--json` has all."""


@dataclass(frozen=True)
class Status:
    """Progress of a study at one moment."""

    study: str
    journal: Path
    state: str
    """`running`, `complete`, `interrupted` or `failed`; also `running` after a driver was killed."""
    records: Sequence[TrialRecord]
    seconds_since_last_event: float
    planned: int
    """Search trials of the study file (`search.trials`)."""
    metrics: TaskMetrics = field(default_factory=task_metrics)
    """Of the study's task."""
    warm_start: Sequence[str] = ()
    """What the study took over from earlier ones, in lines; empty = nothing."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        best = self.best()
        return {
            "study": self.study,
            "state": self.state,
            "journal": str(self.journal),
            "seconds_since_last_event": round(self.seconds_since_last_event, 1),
            "planned_search_trials": self.planned,
            "warm_start": list(self.warm_start),
            "trials": dict(Counter(record.state for record in self.records)),
            "roles": dict(Counter(record.role for record in self.records)),
            "best": None if best is None else _trial(best, self.metrics),
            "running": [_trial(r, self.metrics) for r in self.records if r.state == "running"],
            "paused": [_trial(r, self.metrics) for r in self.records if r.state == "paused"],
            "failed": [{**_trial(r, self.metrics), "reason": r.reason, "error": r.error} for r in self._failed()],
        }

    def best(self) -> TrialRecord | None:
        """The search trial with the best validation score so far.

        The earliest of equals, finished or not.
        """
        scored = [(validation_score(r, self.metrics), r) for r in self.records if r.role == "search"]
        ranked = [(self.metrics.selection.score(value), -r.number, r) for value, r in scored if value is not None]
        return max(ranked, key=lambda row: row[:2])[2] if ranked else None

    def render(self, console: Console) -> None:
        """Print the status as text."""
        counts = Counter(record.state for record in self.records)
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none yet"
        lines = [
            f"{self.study}: {self.state}; the last event was {_ago(self.seconds_since_last_event)} ago",
            f"Trials: {states}; {self.planned} search trials planned",
            *self.warm_start,
        ]
        best = self.best()
        if best is not None:
            lines.append(f"Best on ID validation so far: {_line(best, self.metrics)}")
        running = [r for r in self.records if r.state == "running"]
        lines += _listed("Running", [_line(r, self.metrics) for r in running])
        paused = [r for r in self.records if r.state == "paused"]
        lines += _listed("Paused, each at its rung", [_line(r, self.metrics) for r in paused])
        lines += _listed("Failed", [f"{_line(r, self.metrics)}: {r.reason}: {r.error}" for r in self._failed()])
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _failed(self) -> list[TrialRecord]:
        return [record for record in self.records if record.state == "failed"]


def find_study(path: str | Path) -> tuple[StudySpec, Path]:
    """A study's spec and folder, from a path.

    The path is that of its study file or of that folder (errors: see `load_study`).
    """
    file_or_folder = Path(path)
    if file_or_folder.is_dir():
        return load_study(file_or_folder / "study.yaml"), file_or_folder.resolve()
    spec = load_study(file_or_folder)
    return spec, Path(spec.storage).absolute() / spec.name


def status(path: str | Path) -> Status:
    """Progress of the study of a file or folder (errors: see `find_study` and `read_journal`)."""
    spec, folder = find_study(path)
    events = read_journal(spec, folder)
    header = study_header(events)
    return Status(
        study=spec.name,
        journal=folder / "journal.jsonl",
        state=str(header.get("state", "not started")),
        records=fold(events),
        # The clock of the driver's machine may be ahead of this one's.
        seconds_since_last_event=max(0.0, time.time() - events[-1]["time"]) if events else 0.0,
        planned=spec.search.trials,
        # The study as it ran: its file may have changed since.
        metrics=metrics_of(header.get("spec") or spec),
        warm_start=warm_start_sentences(header),
    )


def _trial(record: TrialRecord, metrics: TaskMetrics) -> dict[str, Any]:
    return {
        "number": record.number,
        "label": record.label,
        "strategy": record.strategy,
        "role": record.role,
        "state": record.state,
        "unit": record.unit,
        metrics.validation: validation_score(record, metrics),
        "hparams": dict(record.hparams),
    }


def _line(record: TrialRecord, metrics: TaskMetrics) -> str:
    value = validation_score(record, metrics)
    score = "" if value is None else f", val {metrics.selection.text(value)}"
    role = "" if record.role == "search" else f", {record.role}"
    return f"trial {record.number} {record.label}{role}, unit {record.unit}{score}"


def _listed(title: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    listed = [f"{title}:", *(f"  {line}" for line in lines[:MAX_LISTED])]
    if len(lines) > MAX_LISTED:
        listed.append(f"  … and {len(lines) - MAX_LISTED} more (--json lists all)")
    return listed


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
