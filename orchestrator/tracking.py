"""MLflow follows the journal: a background thread reads on from its own position and writes in batches.

The journal is the truth; a tracking server that is slow, down or restarted costs the study no time and no number. What
is not delivered stays in the journal, and `MlflowFollower` on the same journal delivers it later.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from orchestrator.errors import redact
from orchestrator.journal import Event, read_from
from orchestrator.mlflow_writer import MlflowWriter, sqlite_file
from orchestrator.position import PositionFile
from orchestrator.run_fields import RunUpdate, digest
from orchestrator.run_updates import Projection

if TYPE_CHECKING:
    from orchestrator.journal import Journal
    from orchestrator.spec import StudySpec

logger = logging.getLogger("luthier")

LONGEST_WAIT = 10.0
"""Seconds between attempts on a server that does not answer."""
CLOSING_SECONDS = 20.0
"""How long the end of a study waits for a tracking server that is behind."""


@contextlib.contextmanager
def follow(spec: StudySpec, journal: Journal | Path) -> Iterator[MlflowFollower]:
    """A follower for the block's duration, as the study says (`tracking.uri`, `tracking.experiment`). A SQLite file
    keeps its artifacts in `mlartifacts` beside it. What could not be delivered at the end is said on the log."""
    uri, path = spec.tracking_uri, journal if isinstance(journal, Path) else journal.path
    database = sqlite_file(uri)
    artifacts = None if database is None else (database.parent / "mlartifacts").as_uri()
    follower = MlflowFollower(path, uri, spec.experiment, spec.name, artifacts).start()
    try:
        yield follower
    finally:
        left = follower.close(CLOSING_SECONDS)
        if left:
            logger.warning(
                "MLflow is %d events behind (%s). Nothing is lost: the next run of this study delivers them.",
                left,
                follower.problem or "it is slow",
            )


class MlflowFollower:
    """Keeps one MLflow run per study (parent) and one per trial (child) up to date with a journal.

    Runs are found again by the tags `luthier.study_uid` and `luthier.trial_uid`, so a study that is continued, or a
    journal that is replayed from the start, goes on in the same runs and adds nothing twice. No method raises because
    of the server, and none waits for it except `close`.

    Args:
        journal: path of the journal; need not exist yet.
        uri: tracking URI.
        experiment: name of the MLflow experiment.
        study: name of the study's run, used if the journal does not say.
        artifact_location: for a new experiment; None = the server decides.
        poll: seconds between looks at the journal.
    """

    def __init__(
        self,
        journal: str | Path,
        uri: str,
        experiment: str,
        study: str = "study",
        artifact_location: str | None = None,
        poll: float = 0.5,
    ) -> None:
        self.journal = Path(journal).absolute()
        self.uri, self.experiment, self.artifact_location = uri, experiment, artifact_location
        self.problem: str | None = None
        """What the server's last failure was; None after a success."""
        self.experiment_id: str | None = None
        self.run_id: str | None = None
        """MLflow's id of the study's run, once it exists."""
        name = f"{self.journal.name}.mlflow.json"
        self.position = PositionFile(
            self.journal.with_name(name), digest([uri, experiment])
        )  # a URI may hold a password
        self._poll = poll
        self._study = study
        self._projection = Projection(study)
        self._writer: MlflowWriter | None = None
        self._pending: dict[str, RunUpdate] = {}
        self._artifacts: dict[str, RunUpdate] = {}
        self._read = self._delivered = 0
        self._seq = -1
        self._refused = 0
        self._lock = FileLock(f"{self.position.path}.lock", timeout=0, thread_local=False)
        self._stop = threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._follow, name="luthier-mlflow", daemon=True)

    @property
    def backlog(self) -> int:
        """Events of the journal that are not delivered."""
        if not self.journal.exists():
            return 0
        return len(read_from(self.journal, self._delivered)[0])

    @property
    def refused(self) -> int:
        """Writes that the server will never take (each was logged)."""
        return self._refused + (self._writer.refused if self._writer else 0)

    def start(self) -> MlflowFollower:
        """Begin to follow; returns at once."""
        self._thread.start()
        return self

    def close(self, timeout: float = 30.0) -> int:
        """Deliver what is left for at most `timeout` seconds, end the thread, and return how many events are not
        delivered (0 = MLflow is complete). Closing again only counts again."""
        if not self._stop.is_set():
            self._deadline = time.monotonic() + timeout
            self._stop.set()
            if self._thread.is_alive():
                self._thread.join(timeout)
        return self.backlog

    def __enter__(self) -> MlflowFollower:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _follow(self) -> None:
        try:
            self._loop()
        finally:
            self._lock.release()

    def _loop(self) -> None:
        failures = 0
        events, self._delivered = self.position.load(self.journal)
        self._read = self._delivered
        for event in events:
            self._updates(event)
        while True:
            stopping = self._stop.is_set()
            try:
                self._advance()
                failures, self.problem = 0, None
                if stopping:
                    return
            except Exception as error:  # whatever a tracking server does must not end the record
                failures += 1
                self._note(error, first=failures == 1)
                self._refused += self._writer.refused if self._writer else 0
                self._writer = None  # runs may have been made whose answer was lost: look them up again
            if stopping:
                if time.monotonic() >= self._deadline:
                    return
                time.sleep(min(0.5, self._poll))
            else:
                self._stop.wait(min(self._poll * 2**failures, LONGEST_WAIT))

    def _advance(self) -> None:
        """Read what is new, write it, remember it."""
        if not self.journal.exists():
            return
        self._claim()
        waiting = self._pending or self._artifacts or self.journal.stat().st_size > self._read
        if self._delivered and self._writer is None and waiting:
            self._find_again()
        events, self._read = read_from(self.journal, self._read)
        for event in events:
            self._seq = event["seq"]
            for update in self._updates(event):
                _add(self._pending, update)
        if self._pending or self._artifacts:
            self._write_pending()
        if self._delivered != self._read:
            self._delivered = self._read
            self.position.save(self._delivered, self._seq)

    def _updates(self, event: Event) -> list[RunUpdate]:
        try:
            return self._projection.apply(event)
        except Exception:  # one event that makes no sense must not hold back all others
            logger.exception("MLflow is not told of event %s of %s", event["seq"], self.journal)
            return []

    def _write_pending(self) -> None:
        assert self._projection.study_uid is not None
        writer = self._connected(self._projection.study_uid)
        while self._pending:  # numbers first: an artifact store that is down holds none back
            uid = next(iter(self._pending))
            writer.write(self._pending[uid])
            _add(self._artifacts, self._pending.pop(uid))
        self.run_id = writer.run_id(self._projection.study_uid)
        while self._artifacts:
            uid = next(iter(self._artifacts))
            writer.attach(self._artifacts[uid])
            del self._artifacts[uid]

    def _connected(self, study_uid: str) -> MlflowWriter:
        if self._writer is None:
            self._writer = MlflowWriter(self.uri, self.experiment, study_uid, self.artifact_location)
            self.experiment_id = self._writer.experiment_id
        return self._writer

    def _find_again(self) -> None:
        """Connect to a server that was told of this study before. If it knows nothing of it (another server behind the
        same address, an emptied database), it is told everything."""
        assert self._projection.study_uid is not None
        if not self._connected(self._projection.study_uid).knows(self._projection.study_uid):
            self._projection = Projection(self._study)
            self._pending.clear()
            self._artifacts.clear()
            self._read = self._delivered = 0

    def _claim(self) -> None:
        """One follower per journal; its lock ends with the process."""
        if not self._lock.is_locked:
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise RuntimeError(f"another process is delivering {self.journal}") from None

    def _note(self, error: Exception, first: bool) -> None:
        self.problem = redact(f"{type(error).__name__}: {error}".partition("\n")[0])[:300]
        if first:
            logger.warning(
                "MLflow does not take the record (%s). The study goes on; the journal keeps what is missing.",
                self.problem,
            )


def _add(updates: dict[str, RunUpdate], update: RunUpdate) -> None:
    if update.uid in updates:
        updates[update.uid].absorb(update)
    else:
        updates[update.uid] = update
