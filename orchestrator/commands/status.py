"""`luthier status`: progress of a study, from its journal alone; needs no cluster and changes nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.record.records import TrialRecord, fold, study_header
from orchestrator.study import read_journal
from orchestrator.study_file.load import load_study
from orchestrator.study_file.schema import StudySpec

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Status", "find_study", "read_journal", "status"]

MAX_LISTED = 10
"""Running or failed trials that are printed; `--json` has all."""


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

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        best = self.best()
        return {
            "study": self.study,
            "state": self.state,
            "journal": str(self.journal),
            "seconds_since_last_event": round(self.seconds_since_last_event, 1),
            "planned_search_trials": self.planned,
            "trials": dict(Counter(record.state for record in self.records)),
            "roles": dict(Counter(record.role for record in self.records)),
            "best": None if best is None else _trial(best),
            "running": [_trial(r) for r in self.records if r.state == "running"],
            "failed": [{**_trial(r), "reason": r.reason, "error": r.error} for r in self._failed()],
        }

    def best(self) -> TrialRecord | None:
        """The search trial with the best ID validation accuracy so far (the earliest of equals), finished or not."""
        scored = [(r, _validation(r)) for r in self.records if r.role == "search"]
        return max(
            (r for r, value in scored if value is not None),
            key=lambda r: (_validation(r) or 0.0, -r.number),
            default=None,
        )

    def render(self, console: Console) -> None:
        """Print the status as text."""
        counts = Counter(record.state for record in self.records)
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none yet"
        lines = [
            f"{self.study}: {self.state}; the last event was {_ago(self.seconds_since_last_event)} ago",
            f"Trials: {states}; {self.planned} search trials planned",
        ]
        best = self.best()
        if best is not None:
            lines.append(f"Best on ID validation so far: {_line(best)}")
        running = [r for r in self.records if r.state == "running"]
        lines += _listed("Running", [_line(r) for r in running])
        lines += _listed("Failed", [f"{_line(r)}: {r.reason}: {r.error}" for r in self._failed()])
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _failed(self) -> list[TrialRecord]:
        return [record for record in self.records if record.state == "failed"]


def find_study(path: str | Path) -> tuple[StudySpec, Path]:
    """A study's spec and folder, from the path of its study file or of that folder (errors: see `load_study`)."""
    file_or_folder = Path(path)
    if file_or_folder.is_dir():
        return load_study(file_or_folder / "study.yaml"), file_or_folder.resolve()
    spec = load_study(file_or_folder)
    return spec, Path(spec.storage).absolute() / spec.name


def status(path: str | Path) -> Status:
    """Progress of the study of a file or folder (errors: see `find_study` and `read_journal`)."""
    spec, folder = find_study(path)
    events = read_journal(spec, folder)
    return Status(
        study=spec.name,
        journal=folder / "journal.jsonl",
        state=str(study_header(events).get("state", "not started")),
        records=fold(events),
        seconds_since_last_event=max(0.0, time.time() - events[-1]["time"]) if events else 0.0,
        planned=spec.search.trials,
    )


def _validation(record: TrialRecord) -> float | None:
    value = record.metric("best/val/acc")
    return record.metric("val/acc") if value is None else value


def _trial(record: TrialRecord) -> dict[str, Any]:
    return {
        "number": record.number,
        "label": record.label,
        "strategy": record.strategy,
        "role": record.role,
        "state": record.state,
        "unit": record.unit,
        "val/acc": _validation(record),
        "hparams": dict(record.hparams),
    }


def _line(record: TrialRecord) -> str:
    value = _validation(record)
    score = "" if value is None else f", val {100 * value:.1f} %"
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
