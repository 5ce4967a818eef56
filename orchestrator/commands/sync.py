"""`luthier sync`: what a study's journal holds and its tracking server lacks is delivered, whenever that is possible
again. The journal is only read; a study that runs is not disturbed."""

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
from orchestrator.tracking.access import access_problems
from orchestrator.tracking.client import trouble
from orchestrator.tracking.delivery_lock import DeliveryError, DeliveryLock
from orchestrator.tracking.following import follower_of
from orchestrator.tracking.outstanding import Additions, Amount
from orchestrator.tracking.run_fields import digest
from orchestrator.tracking.run_updates import Projection
from orchestrator.tracking.server_name import server_name
from orchestrator.tracking.writer import MlflowWriter

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.study_file.schema import StudySpec

GIVE_UP_SECONDS = 60.0
"""How long a server may take nothing before sync gives up."""
REQUEST_SECONDS = 30
"""A server may answer more slowly than a running study would wait for it."""

_NO_PASSWORD = (
    "the copy of a study file in the study's folder keeps no password, but the tracking URI has one. Name the study "
    "file itself (luthier sync STUDY.yaml), or give --tracking-uri without it and set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD."
)


@dataclass(frozen=True)
class SyncReport:
    """What a sync did."""

    study: str
    uri: str
    """Without passwords."""
    experiment: str
    added: Amount
    """What the server lacked before."""
    missing: Amount
    """What it still lacks, at most."""
    events: int
    """Events of the journal that are not delivered."""
    refused: int
    """Writes that the server will never take."""
    running: bool
    """Whether the study was running meanwhile: there will be more."""
    problem: str | None
    """The server's last failure; None if it took everything."""

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
        """Print it for a person."""
        lines = [f"{self.study} → {self.uri}, experiment {self.experiment}", f"Added: {self.added or 'nothing'}"]
        if self.events:
            lines.append(f"Still missing: {self.missing} ({self.problem or 'the server is slow'}). Try again later.")
        elif self.refused:
            lines.append(f"Refused by the server: {self.refused} (each is named above). All else is there.")
        else:
            lines.append("MLflow has it all." if not self.running else "MLflow has all so far; the study is running.")
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def sync(
    study: str | Path,
    uri: str | None = None,
    verify: bool = False,
    give_up: float = GIVE_UP_SECONDS,
) -> SyncReport:
    """Deliver what a tracking server lacks of a study. Runs are found by their tags and points are compared, so that
    nothing is added twice. If nobody runs the study, runs that it left open are closed as interrupted.

    Args:
        study: a study file or the folder of a study.
        uri: another tracking URI than the study's; that server is told everything.
        verify: compare every number with the server's, also what was delivered before.
        give_up: seconds after which a server that takes nothing is given up.

    Raises:
        FileNotFoundError: the study has not been run.
        DeliveryError: another process, such as the study's own driver, is delivering it.
        PreflightError: the server refuses these credentials.
    """
    spec, folder = find_study(study)
    read_journal(spec, folder)
    journal, own = folder / "journal.jsonl", spec.tracking.uri or f"sqlite:///{folder.parent / 'mlflow.db'}"
    target = own if uri is None else uri
    copy = server_name(target) != server_name(own)
    if "//***@" in target:
        raise PreflightError([Problem(("tracking", "uri"), _NO_PASSWORD)], f"The study {spec.name!r}")
    running = _is_running(journal)
    options: dict[str, Any] = {"additions": Additions(), "replay": verify, "poll": 0.2}
    options["abandoned"] = lambda: not _is_running(journal)  # it may begin while this delivers
    if copy:
        options["position"] = f"{journal.name}.mlflow-{digest([server_name(target), spec.experiment])}.json"
    copies = DeliveryLock(journal, copy=True)
    if running and copy:
        options["lock"] = copies
    follower = follower_of(spec, journal, target, **options)
    with environment({"MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS)}):
        copies.claim()
        try:
            follower.lock.claim(refuse=running and not copy)
            if problems := list(access_problems(target, spec.experiment, quiet=True)):
                raise PreflightError(problems, f"The study {spec.name!r}")
            if running and copy:
                _refuse_its_own_server(spec, journal, target)
            events = follower.start().close(math.inf, give_up)
        finally:
            follower.lock.release()
            copies.release()
    return SyncReport(
        study=spec.name,
        uri=redact(target),
        experiment=spec.experiment,
        added=follower.added(),
        missing=follower.waiting() if events else Amount(),
        events=events,
        refused=follower.refused,
        running=running,
        problem=follower.problem if events else None,
    )


def _refuse_its_own_server(spec: StudySpec, journal: Path, target: str) -> None:
    """The server of a running study may have other names than that in the study file. What tells servers apart is the
    id that each gave to the study's run.

    Raises:
        DeliveryError: it is that server, or this cannot be told.
    """
    own = follower_of(spec, journal)
    known, projection = own.position.run(), Projection(spec.name)
    for event in read_from(journal, 0)[0][:1]:
        projection.apply(event)
    try:
        if known is None or projection.study_uid is None:
            raise LookupError("its own server has not been told of it yet")
        found = MlflowWriter(target, spec.experiment, projection.study_uid).run_id(projection.study_uid)
    except Exception as error:  # whatever a tracking server does
        why = str(error) if isinstance(error, LookupError) else trouble(error)
        raise DeliveryError(
            f"A running study is copied only to another server than its own, but whether {redact(target)} is one "
            f"cannot be told ({why}). Try again later, or when the study has ended."
        ) from error
    if found == known:
        own.lock.claim(refuse=True)


def _is_running(journal: Path) -> bool:
    lock = FileLock(f"{journal}.lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        return True
    lock.release()
    return False
