"""`luthier run --check`: is everything in a study's folder whole, and what would the next run do with it? Changes
nothing: the database is looked at in a copy, and a checkpoint is only read."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.record.changes import changes
from orchestrator.record.checkpoints import checkpoint_folder
from orchestrator.record.journal import Event, JournalError, read_from
from orchestrator.record.records import TrialRecord, fold, study_header

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.study import Study

Level = Literal["ok", "note", "problem"]
"""`note`: the next run mends it or goes on without; `problem`: something was lost, or the next run refuses."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    """`journal`, `study`, `data`, `search`, `checkpoints` or `tracking`."""
    level: Level
    message: str

    def to_dict(self) -> dict[str, str]:
        """JSON values."""
        return {"what": self.what, "level": self.level, "message": self.message}


@dataclass(frozen=True)
class StudyCheck:
    """Everything that was looked at, in order."""

    study: str
    folder: Path
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Whether there is no problem."""
        return not any(finding.level == "problem" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        found = [finding.to_dict() for finding in self.findings]
        return {"study": self.study, "folder": str(self.folder), "sound": self.sound, "findings": found}

    def render(self, console: Console) -> None:
        """A line per finding."""
        for finding in self.findings:
            line = f"{finding.level:<8}{finding.what:<12}{finding.message}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def check_study(study: Study) -> StudyCheck:
    """Look at the folder of a study that was run.

    Raises:
        FileNotFoundError: the study has not been run.
    """
    folder = study.folder
    if not (folder / "journal.jsonl").exists():
        raise FileNotFoundError(f"The study {study.spec.name!r} has no journal in {folder}. Run it first.")
    return StudyCheck(study.spec.name, folder, tuple(_findings(study)))


def _findings(study: Study) -> Iterator[Finding]:
    path = study.folder / "journal.jsonl"
    try:
        events, end = read_from(path, 0)
    except JournalError as error:
        yield Finding("journal", "problem", str(error))
        return
    yield from _journal(path, events, end)
    yield from _study(study, events)
    yield from _data(study, events)
    yield from _search(study, events)
    yield from _checkpoints(study.folder, fold(events))
    yield from _tracking(study, path)


def _journal(path: Path, events: list[Event], end: int) -> Iterator[Finding]:
    torn = path.stat().st_size - end
    if torn:
        yield Finding("journal", "note", f"{torn} bytes of a torn last event, which the next run cuts off.")
    numbers = [event["seq"] for event in events]
    if numbers != list(range(len(numbers))):
        yield Finding("journal", "problem", f"Its {len(events)} events are not numbered from 0 on without a gap.")
        return
    records = fold(events)
    ended = sum(not record.resumable for record in records)
    left = [f"trial {r.number} {r.label} at unit {r.unit}" for r in records if r.resumable]
    more = f"; to be continued: {', '.join(left)}" if left else ""
    yield Finding("journal", "ok", f"{len(events)} events, {len(records)} trials, {ended} of them ended{more}")


def _study(study: Study, events: list[Event]) -> Iterator[Finding]:
    from orchestrator.record.changes import versions
    from orchestrator.running.study_run import plain_spec

    before = study_header(events)
    now = {**before, "spec": plain_spec(study.spec), "versions": versions()}
    found = changes(before, now)
    for change in found:
        effect = "no number depends on it" if change.harmless else f"needs --allow-change {change.key}"
        yield Finding("study", "note" if change.harmless else "problem", f"{change} ({effect})")
    if not found:
        yield Finding("study", "ok", "study file, code and packages are those of the last run")


def _data(study: Study, events: list[Event]) -> Iterator[Finding]:
    """The stores of the digest that the study was run on; whether the source has changed, only the next run finds."""
    from trainables.data.store import MANIFEST, Store, StoreError

    wanted = study_header(events).get("dataset_digest")
    stores = [Store(place.parent) for place in sorted((study.folder.parent / "data").glob(f"*/{MANIFEST}"))]
    for store in stores:
        try:
            if store.digest != wanted:
                continue
            store.verify()
            yield Finding("data", "ok", f"{store.path} is whole")
            return
        except (StoreError, OSError, KeyError) as error:
            yield Finding("data", "problem", str(error))
            return
    yield Finding("data", "note", f"No store with the digest {wanted} lies in {study.folder.parent / 'data'}.")


def _search(study: Study, events: list[Event]) -> Iterator[Finding]:
    """In a copy, since opening a database may write to it."""
    from orchestrator.planning.build import metric_of
    from orchestrator.search.optuna_store import History, disagreement

    database = study.folder / "optuna.db"
    if not database.exists():
        yield Finding("search", "note", f"{database} is missing: the next run makes it from the journal.")
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in study.folder.glob("optuna.db*"):
            if not file.name.endswith(".replaced"):
                shutil.copy(file, folder)
        history = History.of(events, (metric_of(study.spec),))
        problem = disagreement(f"sqlite:///{folder}/optuna.db", study.spec.name, history)
    if problem is None:
        yield Finding("search", "ok", f"{database} agrees with the journal")
    else:
        yield Finding("search", "note", f"{database} {problem}: the next run makes it again from the journal.")


def _checkpoints(folder: Path, records: list[TrialRecord]) -> Iterator[Finding]:
    from trainables.storage.checkpoint_format import CheckpointError, load_state
    from trainables.storage.checkpoint_store import QUARANTINE, checkpoints

    for record in records:
        place = checkpoint_folder(folder, record.number)
        if not record.resumable:
            if place.exists():
                yield Finding("checkpoints", "note", f"{place} is of a trial that has ended; the next run removes it.")
            continue
        for path in checkpoints(place):
            try:
                meta = load_state(path).meta
                where = f"unit {meta['unit']}" + (f", step {meta['step']}" if meta["step"] else "")
                yield Finding("checkpoints", "ok", f"{path} is whole: {where}")
            except CheckpointError as error:
                yield Finding("checkpoints", "problem", str(error))
    quarantine = folder / "checkpoints" / QUARANTINE
    for path in sorted(quarantine.iterdir()) if quarantine.exists() else ():
        told = path / "problem.txt"
        why = told.read_text(errors="replace").strip() if told.exists() else "found damaged"
        yield Finding("checkpoints", "note", f"{path} was put aside: {why}")


def _tracking(study: Study, journal: Path) -> Iterator[Finding]:
    """Delivery to MLflow as this folder records it; the server is not asked."""
    from orchestrator.running.tracking_process import study_backlog
    from orchestrator.tracking.follower import undelivered_events
    from orchestrator.tracking.study_tracking import backlog_text, settings_of, sync_command

    offset = settings_of(study.spec, journal).position_file().load(journal).offset
    if not undelivered_events(journal, offset):
        yield Finding("tracking", "ok", "MLflow has it all")
        return
    missing = backlog_text(study_backlog(study.spec, study.folder))
    command = sync_command(study.spec, study.folder)
    yield Finding("tracking", "note", f"{missing}. The next run delivers them, or at once: {command}")
