"""MLflow follows the journal: a background thread reads on from its own position and writes in batches.

The journal is the truth; a tracking server that is slow, down or restarted costs the study no time and no number. What
is not delivered stays in the journal, and `MlflowFollower` on the same journal delivers it later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.record.journal import read_from
from orchestrator.tracking.client import trouble
from orchestrator.tracking.delivery_lock import DeliveryLock
from orchestrator.tracking.outstanding import Additions, Amount, outstanding, updates_of
from orchestrator.tracking.pending import Pending
from orchestrator.tracking.position import PositionFile
from orchestrator.tracking.run_fields import digest
from orchestrator.tracking.run_updates import Projection
from orchestrator.tracking.server_name import server_name
from orchestrator.tracking.sqlite_file import TrackingFileError
from orchestrator.tracking.writer import MlflowWriter

logger = logging.getLogger("luthier")

LONGEST_WAIT = 10.0
"""Seconds between attempts on a server that does not answer."""
PATIENCE = 3.0
"""Seconds that `close` waits for a server that fails; one that takes the record gets the whole time."""
WARN_EVERY = 600.0
"""Seconds between two warnings about a server that fails now and then."""
DUPLICATES_AFTER = 60.0
"""Seconds after which a server has made every run that it was asked for, also if its answer was lost."""


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
        position: name of the position file beside the journal; None = that of the study's own server.
        replay: begin with the first event, whatever the position says.
        additions: counts what the server lacked; None = nobody wants to know.
        lock: held while this follower delivers; None = the journal's.
        abandoned: whether nobody writes the journal any more: at its end, close the runs that it leaves open.
    """

    def __init__(
        self,
        journal: str | Path,
        uri: str,
        experiment: str,
        study: str = "study",
        artifact_location: str | None = None,
        poll: float = 0.5,
        *,
        position: str | None = None,
        replay: bool = False,
        additions: Additions | None = None,
        abandoned: Callable[[], bool] | None = None,
        lock: DeliveryLock | None = None,
    ) -> None:
        self.journal = Path(journal).absolute()
        self.uri, self.experiment, self.artifact_location = uri, experiment, artifact_location
        self.problem: str | None = None
        """What the server's last failure was; None after a success."""
        self.experiment_id: str | None = None
        name = position or f"{self.journal.name}.mlflow.json"
        self.position = PositionFile(self.journal.with_name(name), digest([server_name(uri), experiment]))
        self._poll = poll
        self._study = study
        self._projection = Projection(study)
        self._writer: MlflowWriter | None = None
        self._pending = Pending()
        self._read = self._delivered = 0
        self._seq = -1
        self._refused = 0
        self._replay, self._additions, self._abandoned = replay, additions, abandoned
        self._warned = float("-inf")
        self._doubtful: float | None = None
        self.lock = lock or DeliveryLock(self.journal)
        self._stop = threading.Event()
        self._deadline, self._closed, self._patience = float("inf"), float("inf"), PATIENCE
        self._thread = threading.Thread(target=self._follow, name="luthier-mlflow", daemon=True)

    @property
    def backlog(self) -> int:
        """Events of the journal that are not delivered."""
        return len(read_from(self.journal, self._delivered)[0]) if self.journal.exists() else 0

    @property
    def refused(self) -> int:
        """Writes that the server will never take (each was logged)."""
        return self._refused + (self._writer.refused if self._writer else 0)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the study's run, once it exists."""
        uid = self._projection.study_uid
        return self._writer.run_id(uid) if self._writer is not None and uid is not None else None

    def start(self) -> MlflowFollower:
        """Begin to follow; returns at once."""
        self._thread.start()
        return self

    def waiting(self) -> Amount:
        """What the backlog would add to the server."""
        return outstanding(self.journal, self._delivered, self._study)

    def added(self) -> Amount:
        """What the server lacked and has got (counted by `additions`)."""
        return self._additions.amount(self._pending) if self._additions is not None else Amount()

    def close(self, timeout: float = 30.0, patience: float = PATIENCE) -> int:
        """Deliver what is left, end the thread, and return how many events are not delivered (0 = MLflow is complete).
        Closing again only counts again.

        Args:
            timeout: seconds to wait at most.
            patience: seconds to wait while the server fails.
        """
        if not self._stop.is_set():
            self._closed, self._patience = time.monotonic(), patience
            self._deadline = self._closed + timeout
            self._stop.set()
            while self._thread.is_alive() and not self._given_up():
                self._thread.join(0.05)
        return self.backlog

    def _given_up(self) -> bool:
        now = time.monotonic()
        failing = self.problem is not None and now - max(self._pending.progress, self._closed) >= self._patience
        return now >= self._deadline or failing

    def __enter__(self) -> MlflowFollower:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _follow(self) -> None:
        try:
            self._loop()
        finally:
            self.lock.release()

    def _loop(self) -> None:
        failures = 0
        events, self._delivered = ([], 0) if self._replay else self.position.load(self.journal)
        self._read = self._delivered
        for event in events:
            updates_of(self._projection, event, self.journal)
        while True:
            stopping, began = self._stop.is_set(), time.monotonic()
            try:
                self._advance(stopping)
                failures, self.problem = 0, None
                if stopping:
                    return
            except Exception as error:  # whatever a tracking server does must not end the record
                failures = 1 if self._pending.progress >= began else failures + 1
                self._note(error)
            if stopping:
                if self._given_up():
                    return
                time.sleep(min(0.5, self._poll))
            else:
                self._stop.wait(min(self._poll * 2**failures, LONGEST_WAIT))

    def _advance(self, stopping: bool) -> None:
        """Read what is new, write it, remember it."""
        if not self.journal.exists():
            return
        self.lock.claim()
        waiting = self._pending or self.journal.stat().st_size > self._read
        if self._delivered and self._writer is None and (waiting or self._additions is not None):
            self._find_again()
        events, self._read = read_from(self.journal, self._read)
        for event in events:
            self._seq = event["seq"]
            self._pending.add(updates_of(self._projection, event, self.journal))
        if stopping and self._abandoned is not None and self._abandoned():
            self._pending.add(self._projection.abandoned())
        if self._pending:
            assert self._projection.study_uid is not None
            self._pending.deliver(self._connected(self._projection.study_uid), self._projection.study_uid)
        if self._delivered != self._read:
            self._delivered = self._read
            self.position.save(self._delivered, self._seq, self.run_id)
        self._drop_duplicates(stopping)

    def _connected(self, study_uid: str) -> MlflowWriter:
        if self._writer is None:
            self._writer = MlflowWriter(self.uri, self.experiment, study_uid, self.artifact_location, self._additions)
            self.experiment_id = self._writer.experiment_id
        return self._writer

    def _find_again(self) -> None:
        """Connect to a server that was told of this study before. If it knows nothing of it, or another run of it
        (another server behind the same address, an emptied database), it is told everything."""
        uid, known = self._projection.study_uid, self.position.run()
        assert uid is not None
        writer = self._connected(uid)
        if not writer.knows(uid) or (known and writer.run_id(uid) not in (known, None)):
            self.position.forget()  # first: from here on the server knows the study, but not what it was told before
            self._projection = Projection(self._study)
            self._pending.clear()
            self._read = self._delivered = 0

    def _drop_duplicates(self, stopping: bool) -> None:
        """A server that hung may make a run after all, long after the one that was asked for in its place."""
        if self._doubtful is None or self._writer is None:
            return
        if stopping or time.monotonic() - self._doubtful > DUPLICATES_AFTER:
            self._writer.load_runs()
            self._doubtful = None

    def _note(self, error: Exception) -> None:
        """Say it, if it has not been said lately, and look everything up again where the server may know more than was
        heard of it, or less than it knew."""
        now, writer = time.monotonic(), self._writer
        self.problem = trouble(error)
        if now - self._warned > WARN_EVERY:
            self._warned = now
            logger.warning(
                "MLflow does not take the record (%s). The study goes on; the journal keeps what is missing.",
                self.problem,
            )
        if writer is None:
            return
        if writer.doubtful:
            self._doubtful = now
        gone = isinstance(error, TrackingFileError) or getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"
        if writer.doubtful or gone:
            self._refused += writer.refused
            self._writer = None
