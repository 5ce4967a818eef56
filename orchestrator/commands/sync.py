"""`luthier sync`: deliver what a study's journal has and its tracking server lacks.

The journal is only read; a running study is not disturbed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from orchestrator.cluster.driver_process import environment
from orchestrator.commands.status import find_study, read_journal
from orchestrator.errors import PreflightError, Problem, redact
from orchestrator.record.journal import read_from
from orchestrator.running.tracking_process import summarizer
from orchestrator.tracking.client import access_problems, describe_error, server_name
from orchestrator.tracking.delivery_state import DeliveryError, DeliveryLock
from orchestrator.tracking.follower import MlflowFollower
from orchestrator.tracking.projection import DeliveredItems, DeliveryCounts, Projection, backlog
from orchestrator.tracking.run_update import UID_DIGITS, Summarizer
from orchestrator.tracking.study_tracking import settings_of
from orchestrator.tracking.writer import MlflowWriter
from trainables.specs.short_hash import short_hash

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.study_file.schema import StudySpec

GIVE_UP_S = 60.0
"""Seconds without progress after which sync gives up."""
REQUEST_TIMEOUT_S = 30
"""Timeout of a request, longer than beside a running study."""
POLL_S = 0.2
"""Wait before the first retry."""

_NO_PASSWORD = (
    "the copy of a study file in the study's folder keeps no password, but the tracking URI has one. Name the study "
    "file itself (luthier sync STUDY.yaml), or give --tracking-uri without it and set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD."
)


@dataclass(frozen=True)
class SyncReport:
    """Outcome of a sync."""

    study: str
    uri: str
    """Without passwords."""
    experiment: str
    added: DeliveryCounts
    """Items that the server lacked."""
    missing: DeliveryCounts
    """Items that it still lacks, at most."""
    events: int
    """Events of the journal that are not delivered."""
    refused: int
    """Items that the server rejected for good."""
    running: bool
    """Whether the study was running meanwhile, so that more events follow."""
    problem: str | None
    """The server's last failure; None if it accepted everything."""

    @property
    def whole(self) -> bool:
        """Whether the server has everything."""
        return self.events == 0 and self.refused == 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "study": self.study,
            "tracking_uri": self.uri,
            "experiment": self.experiment,
            "added": self.added.to_dict(),
            "missing": self.missing.to_dict(),
            "events_missing": self.events,
            "refused": self.refused,
            "running": self.running,
            "problem": self.problem,
        }

    def render(self, console: Console) -> None:
        """Print the outcome."""
        lines = [f"{self.study} → {self.uri}, experiment {self.experiment}", f"Added: {self.added or 'nothing'}"]
        if self.events:
            lines.append(f"Still missing: {self.missing} ({self.problem or 'the server is slow'}). Try again later.")
        elif self.refused:
            lines.append(f"Refused by the server: {self.refused} (each is named above). All else is there.")
        elif self.running:
            lines.append("MLflow has all so far; the study is running.")
        else:
            lines.append("MLflow has it all.")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def sync(
    study: str | Path,
    uri: str | None = None,
    verify: bool = False,
    give_up_s: float = GIVE_UP_S,
    pictures: bool = False,
) -> SyncReport:
    """Deliver what a tracking server lacks of a study.

    Runs are found by their tags and points are compared, so that nothing is added twice. If the study's driver has
    died, the runs that it left open are closed as interrupted.

    Args:
        study: a study file or the folder of a study.
        uri: another tracking URI than the study's; that server gets the whole study.
        verify: compare every number with the server's, also those that were delivered before.
        give_up_s: seconds without progress after which a server is given up.
        pictures: draw the curves of every complete trial, not only of confirmations and the best; implies `verify`.

    Raises:
        FileNotFoundError: the study has not been run.
        DeliveryError: another process, such as the study's own driver, is delivering it.
        PreflightError: the server refuses the credentials.
    """
    spec, folder = find_study(study)
    read_journal(spec, folder)
    journal = folder / "journal.jsonl"
    target = _target(spec, folder, uri)
    running = _is_running(journal)
    copy_lock = DeliveryLock(journal, copy=True)
    summaries = summarizer(pictures)
    follower = MlflowFollower(
        settings_of(spec, journal, target.uri, position=target.position, replay=verify or pictures, poll_s=POLL_S),
        summaries,
        delivered=DeliveredItems(),
        is_abandoned=lambda: not _is_running(journal),  # the study may be started meanwhile
        lock=copy_lock if running and target.is_copy else DeliveryLock(journal),
    )
    with environment({"MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_TIMEOUT_S)}):
        copy_lock.acquire()
        try:
            if running and not target.is_copy:  # its driver may not have taken the lock yet
                raise follower.lock.refusal()
            follower.lock.acquire()
            if problems := list(access_problems(target.uri, spec.experiment, quiet=True)):
                raise PreflightError(problems, f"The study {spec.name!r}")
            if running:
                _refuse_own_server(spec, journal, target.uri, summaries)
            events = follower.finish(math.inf, give_up_s)
        finally:
            follower.lock.release()
            copy_lock.release()
    missing = DeliveryCounts()
    if events:
        uploads = follower.settings.uploads
        missing = backlog(journal, follower.delivered_offset, spec.name, summaries, uploads)
    return SyncReport(
        study=spec.name,
        uri=redact(target.uri),
        experiment=spec.experiment,
        added=follower.added,
        missing=missing,
        events=events,
        refused=follower.refused,
        running=running,
        problem=follower.problem if events else None,
    )


@dataclass(frozen=True)
class _Target:
    """Server of a sync."""

    uri: str
    is_copy: bool
    """Whether it is another server than the study's own."""
    position: str | None
    """Name of its position file; None = that of the study's own server."""


def _target(spec: StudySpec, folder: Path, uri: str | None) -> _Target:
    """The server to deliver to (PreflightError: its password is missing)."""
    # Not the default of the spec, which is relative to the study file: the folder may have been moved.
    study_uri = spec.tracking.uri or f"sqlite:///{folder.parent / 'mlflow.db'}"
    target_uri = study_uri if uri is None else uri
    if "//***@" in target_uri:
        raise PreflightError([Problem(("tracking", "uri"), _NO_PASSWORD)], f"The study {spec.name!r}")
    if server_name(target_uri) == server_name(study_uri):
        return _Target(target_uri, False, None)
    position = f"journal.jsonl.mlflow-{short_hash([server_name(target_uri), spec.experiment], UID_DIGITS)}.json"
    return _Target(target_uri, True, position)


def _refuse_own_server(spec: StudySpec, journal: Path, target: str, summaries: Summarizer) -> None:
    """Check that a running study is not copied to its own server under another name.

    Servers are distinguished by the id that each gave to the study's run.

    Raises:
        DeliveryError: it is that server, or the servers cannot be compared.
    """
    own_run = settings_of(spec, journal).position_file().run()
    projection = Projection(spec.name, summaries)
    for event in read_from(journal, 0)[0][:1]:
        projection.apply(event)
    try:
        if own_run is None or projection.study_uid is None:
            raise LookupError("its own server does not have the study yet")
        target_run = MlflowWriter(target, spec.experiment, projection.study_uid).run_id(projection.study_uid)
    except Exception as error:  # any failure of a tracking server
        reason = str(error) if isinstance(error, LookupError) else describe_error(error)
        raise DeliveryError(
            "A running study is copied only to another server than its own, but it is unclear whether "
            f"{redact(target)} is one ({reason}). Try again later, or when the study has ended."
        ) from error
    if target_run == own_run:
        raise DeliveryLock(journal).refusal()


def _is_running(journal: Path) -> bool:
    # A driver holds the journal's lock from its start to its end.
    lock = FileLock(f"{journal}.lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False
