"""`luthier check`: verifies a study's folder.

Reports what the next run would do with it. Changes nothing: the search's database is opened as a copy, checkpoints are
only read.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.planning.objectives import objectives_of
from orchestrator.record.changes import changes, versions
from orchestrator.record.checkpoints import checkpoint_folder
from orchestrator.record.journal import Event, JournalError, read_from
from orchestrator.record.kept_files import kept_problems
from orchestrator.record.records import TrialRecord, fold, study_header
from orchestrator.running.study_run import plain_spec
from orchestrator.running.tracking_process import study_backlog
from orchestrator.search.optuna_store import History, disagreement
from orchestrator.tracking.follower import undelivered_events
from orchestrator.tracking.study_tracking import backlog_text, settings_of, sync_command
from orchestrator.wording import counted
from trainables.data.store import MANIFEST, Store, StoreError
from trainables.storage.checkpoint_format import CheckpointError, load_state
from trainables.storage.checkpoint_store import QUARANTINE, list_checkpoints

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.study import Study

Level = Literal["ok", "note", "problem"]
"""`note`: the next run repairs it or continues without it; `problem`: something is lost, or the next run refuses."""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    what: str
    """`journal`, `study`, `data`, `search`, `checkpoints`, `weights` or `tracking`."""
    level: Level
    message: str

    def to_dict(self) -> dict[str, str]:
        """JSON values."""
        return {"what": self.what, "level": self.level, "message": self.message}


@dataclass(frozen=True)
class StudyCheck:
    """All checks of one study, in order."""

    study: str
    folder: Path
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Whether there is no problem."""
        return not any(finding.level == "problem" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "study": self.study,
            "folder": str(self.folder),
            "sound": self.sound,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def render(self, console: Console) -> None:
        """Print a line per finding."""
        for finding in self.findings:
            line = f"{finding.level:<8}{finding.what:<12}{finding.message}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def check_study(study: Study) -> StudyCheck:
    """Verify the folder of a study that was run.

    Raises:
        FileNotFoundError: the study has not been run.
    """
    journal = study.folder / "journal.jsonl"
    if not journal.exists():
        raise FileNotFoundError(
            f"The study {study.spec.name!r} has no journal at {journal}. Start it with `luthier run`."
        )
    return StudyCheck(study.spec.name, study.folder, tuple(_findings(study)))


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
    yield from _kept(study.folder, fold(events))
    yield from _tracking(study, path)


def _journal(path: Path, events: list[Event], end: int) -> Iterator[Finding]:
    torn_bytes = path.stat().st_size - end
    if torn_bytes:
        yield Finding("journal", "note", f"{torn_bytes} bytes of a torn last event; the next run truncates them.")
    numbers = [event["seq"] for event in events]
    if numbers != list(range(len(numbers))):
        yield Finding("journal", "problem", f"Its {len(events)} events are not numbered consecutively from 0.")
        return
    records = fold(events)
    finished = sum(not record.resumable for record in records)
    summary = f"{len(events)} events, {len(records)} trials, {finished} of them finished"
    resumable = [f"trial {r.number} {r.label} at unit {r.unit}{_paused(r)}" for r in records if r.resumable]
    if resumable:
        summary += f"; to be resumed: {', '.join(resumable)}"
    yield Finding("journal", "ok", summary)


def _paused(record: TrialRecord) -> str:
    return " (paused)" if record.state == "paused" else ""


def _study(study: Study, events: list[Event]) -> Iterator[Finding]:
    before = study_header(events)
    if not before:
        yield Finding("study", "note", "The last run ended before the study began: there is nothing to compare.")
        return
    # With the data's digest of the last run: reading the source again is left to the next one.
    now = {**before, "spec": plain_spec(study.spec), "versions": versions()}
    differences = changes(before, now)
    for change in differences:
        if change.harmless:
            yield Finding("study", "note", f"{change} (no number depends on it)")
        else:
            yield Finding("study", "problem", f"{change} (needs --allow-change {change.key})")
    if not differences:
        yield Finding("study", "ok", "study file, code and packages are those of the last run")


def _data(study: Study, events: list[Event]) -> Iterator[Finding]:
    """The store with the digest that the study ran on.

    A changed source is only noticed by the next run.
    """
    digest = study_header(events).get("dataset_digest")
    if digest is None:
        return
    folder = study.folder.parent / "data"
    for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
        store = Store(manifest.parent)
        try:
            if store.digest != digest:
                continue
            store.verify()
        except (StoreError, OSError, KeyError) as error:
            yield Finding("data", "problem", str(error))
        else:
            yield Finding("data", "ok", f"{store.path} is intact")
        return
    yield Finding("data", "note", f"No store in {folder} has the digest {digest}.")


def _search(study: Study, events: list[Event]) -> Iterator[Finding]:
    database = study.folder / "optuna.db"
    if not database.exists():
        yield Finding("search", "note", f"{database} is missing; the next run rebuilds it from the journal.")
        return
    # A copy, because opening a database may write to it.
    with tempfile.TemporaryDirectory() as folder:
        for file in study.folder.glob("optuna.db*"):
            if not file.name.endswith(".replaced"):
                shutil.copy(file, folder)
        promotes = study.spec.search.scheduler == "promote"
        history = History.of(events, objectives_of(study.spec), promotes)
        problem = disagreement(f"sqlite:///{folder}/optuna.db", study.spec.name, history)
    if problem is None:
        yield Finding("search", "ok", f"{database} agrees with the journal")
    else:
        yield Finding("search", "note", f"{database} {problem}; the next run rebuilds it from the journal.")


def _checkpoints(folder: Path, records: list[TrialRecord]) -> Iterator[Finding]:
    for record in records:
        trial_folder = checkpoint_folder(folder, record.number)
        if record.resumable:
            for path in list_checkpoints(trial_folder):
                yield _checkpoint(path)
        elif trial_folder.exists():
            yield Finding(
                "checkpoints", "note", f"{trial_folder} belongs to a finished trial; the next run removes it."
            )
    quarantine = folder / "checkpoints" / QUARANTINE
    if quarantine.exists():
        for path in sorted(quarantine.iterdir()):
            reason_file = path / "problem.txt"
            reason = "it was damaged"
            if reason_file.exists():
                reason = reason_file.read_text(errors="replace").strip()
            yield Finding("checkpoints", "note", f"{path} is quarantined: {reason}")


def _checkpoint(path: Path) -> Finding:
    try:
        meta = load_state(path).meta
    except CheckpointError as error:
        return Finding("checkpoints", "problem", str(error))
    position = f"unit {meta['unit']}"
    if meta["step"]:
        position += f", step {meta['step']}"
    return Finding("checkpoints", "ok", f"{path} is intact: {position}")


def _kept(folder: Path, records: list[TrialRecord]) -> Iterator[Finding]:
    """Kept weights and predictions, against the digests in the journal."""
    intact = 0
    for record in records:
        problems = kept_problems(folder, record)
        for problem in problems:
            yield Finding("weights", "problem", problem)
        if not problems and (record.weights is not None or record.predictions is not None):
            intact += 1
    if intact:
        yield Finding("weights", "ok", f"kept files of {counted(intact, 'trial')} are intact")


def _tracking(study: Study, journal: Path) -> Iterator[Finding]:
    """The backlog of undelivered events.

    From the stored read offset alone; the server is not asked.
    """
    offset = settings_of(study.spec, journal).position_file().load(journal).offset
    if not undelivered_events(journal, offset):
        yield Finding("tracking", "ok", "MLflow has everything")
        return
    backlog = backlog_text(study_backlog(study.spec, study.folder))
    command = sync_command(study.spec, study.folder)
    yield Finding("tracking", "note", f"{backlog}. The next run delivers them, or at once: {command}")
