"""Where a study stands, from its journal alone: no cluster, no tracking server, and nothing is changed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.record.journal import Journal
from orchestrator.record.records import TrialRecord, fold, study_header
from orchestrator.study_file.spec import StudySpec, load_study

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 10
"""Running or failed trials that are listed for a person."""


@dataclass(frozen=True)
class Status:
    """A moment of a study."""

    study: str
    journal: Path
    state: str
    """`running`, `complete`, `interrupted` or `failed`; a driver that was killed leaves `running`."""
    records: Sequence[TrialRecord]
    quiet_seconds: float
    """Time since the last event of the journal."""
    planned: int
    """Search trials that the study asks for."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        best = self.best()
        return {
            "study": self.study,
            "state": self.state,
            "journal": str(self.journal),
            "seconds_since_last_event": round(self.quiet_seconds, 1),
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
        """Print the status for a person."""
        counts = Counter(record.state for record in self.records)
        known = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none yet"
        lines = [
            f"{self.study}: {self.state}; the last event was {_ago(self.quiet_seconds)} ago",
            f"Trials: {known}; {self.planned} search trials are asked for",
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
    """A study's spec and its folder, from its study file or from that folder itself (errors: see `load_study`)."""
    given = Path(path)
    if given.is_dir():
        return load_study(given / "study.yaml"), given.resolve()
    spec = load_study(given)
    return spec, Path(spec.storage).absolute() / spec.name


def read_journal(spec: StudySpec, folder: Path) -> list[dict[str, Any]]:
    """All events of a study.

    Raises:
        FileNotFoundError: the study has not been run.
    """
    journal = folder / "journal.jsonl"
    if not journal.exists():
        raise FileNotFoundError(f"The study {spec.name!r} has no journal at {journal}. Start it with `luthier run`.")
    return Journal.read(journal)


def status(path: str | Path) -> Status:
    """Where the study of a file or folder stands (errors: see `find_study` and `read_journal`)."""
    spec, folder = find_study(path)
    events = read_journal(spec, folder)
    return Status(
        study=spec.name,
        journal=folder / "journal.jsonl",
        state=str(study_header(events).get("state", "not started")),
        records=fold(events),
        quiet_seconds=max(0.0, time.time() - events[-1]["time"]) if events else 0.0,
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
    more = [f"  … and {len(lines) - SHOWN} more (--json lists all)"] if len(lines) > SHOWN else []
    return [f"{title}:", *(f"  {line}" for line in lines[:SHOWN]), *more] if lines else []


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
