"""Delivery of a journal to MLflow: reads on from a durable offset, and writes in batches.

The journal is the source of truth. A tracking server that is slow, down or restarted costs no number: what is not
delivered stays in the journal, and a later follower of the same journal delivers it.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.record.journal import Event, read_from
from orchestrator.tracking.client import describe_error, server_name
from orchestrator.tracking.delivery_state import DeliveryLock, PositionFile
from orchestrator.tracking.local_database import TrackingFileError
from orchestrator.tracking.model_export import ExportedModel, Exporter, export_chosen_model
from orchestrator.tracking.projection import DeliveredItems, DeliveryCounts, Projection, updates_of
from orchestrator.tracking.run_update import UID_DIGITS, ModelRequest, RunUpdate, Summarizer, Uploads
from orchestrator.tracking.writer import MlflowWriter
from trainables.specs.short_hash import short_hash

logger = logging.getLogger("luthier")

MAX_BACKOFF_S = 10.0
"""Longest wait between two attempts on a server that fails."""
PATIENCE_S = 3.0
"""Wait, at the end of a study, for a server that fails; one that accepts items gets the whole timeout."""
WARNING_INTERVAL_S = 600.0
"""Least time between two warnings about a server that fails now and then."""
LATE_CREATE_S = 60.0
"""Time after which a server has executed every create_run that it received, also if its response was lost."""


@dataclass(frozen=True, kw_only=True)
class FollowerSettings:
    """Settings of a delivery; they are JSON values, for a process of its own."""

    journal: str
    """Absolute path; the file need not exist yet."""
    uri: str
    """Tracking URI."""
    experiment: str
    study: str = "study"
    """Name of the study's run, until the journal gives one."""
    artifact_location: str | None = None
    """Artifact store of a new experiment; None = the server's default."""
    poll_s: float = 0.5
    """Interval between looks at the journal."""
    position: str | None = None
    """Name of the position file beside the journal; None = the one of the study's own server."""
    replay: bool = False
    """Start with the first event, whatever the position is."""
    task: Mapping[str, Any] | None = None
    """Metrics of the study's task (`TaskMetrics.to_dict`): a task may be registered in the driver's process alone."""
    predictions: bool = True
    """As `Uploads.predictions`."""
    registered_model: str | None = None
    """As `Uploads.registered_model`."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    @property
    def path(self) -> Path:
        """Path of the journal."""
        return Path(self.journal)

    @property
    def uploads(self) -> Uploads:
        """Which files of the study's folder are sent."""
        return Uploads(self.predictions, self.registered_model)

    @property
    def target(self) -> str:
        """Identifies server and experiment."""
        return short_hash([server_name(self.uri), self.experiment], UID_DIGITS)

    def position_file(self) -> PositionFile:
        """The durable read offset of this delivery."""
        name = self.position or f"{self.path.name}.mlflow.json"
        return PositionFile(self.path.with_name(name), self.target)


class GiveUp:
    """Limit of a final delivery: a timeout, and less patience with a server that fails.

    Args:
        timeout_s: seconds at most.
        patience_s: seconds without progress while the server fails.
    """

    def __init__(self, timeout_s: float, patience_s: float) -> None:
        self._start = time.monotonic()
        self._deadline = self._start + timeout_s
        self._patience_s = patience_s

    def extend(self, seconds: float) -> None:
        """Leave time out that the server is not responsible for."""
        self._deadline += seconds
        self._start = time.monotonic()

    def is_due(self, problem: str | None, progress: float) -> bool:
        """Whether to stop.

        Args:
            problem: the server's last failure, None after a success.
            progress: when the server last accepted something (`time.monotonic`).
        """
        now = time.monotonic()
        is_failing = problem is not None and now - max(progress, self._start) >= self._patience_s
        return now >= self._deadline or is_failing


class SendBuffer:
    """Updates that are not delivered yet, coalesced per run.

    Points are sent before artifacts: an artifact store that is down must not hold back any number. Files of the study's
    folder and models come last: one that is too large for a server must not hold back any other artifact.
    """

    def __init__(self) -> None:
        self._updates: dict[str, RunUpdate] = {}
        self._files: dict[str, RunUpdate] = {}
        self._kept: dict[str, RunUpdate] = {}

    def __bool__(self) -> bool:
        return bool(self._updates or self._files or self._kept)

    def __iter__(self) -> Iterator[RunUpdate]:
        return iter([*self._updates.values(), *self._files.values(), *self._kept.values()])

    def add(self, updates: Iterable[RunUpdate]) -> None:
        """Add later updates."""
        for update in updates:
            _merge(self._updates, update)

    def clear(self) -> None:
        """Drop everything."""
        self._updates.clear()
        self._files.clear()
        self._kept.clear()

    def send(
        self, writer: MlflowWriter, study_uid: str, export: Callable[[ModelRequest], ExportedModel]
    ) -> Iterator[None]:
        """Write everything, with a yield after each item; what fails stays (errors: as the writer's).

        Args:
            export: makes the folder of a model that is to be registered.
        """
        while self._updates:
            uid = next(iter(self._updates))
            try:
                writer.write(self._updates[uid])
            except Exception:
                if uid != study_uid:  # it may be this run alone that fails: let the others go first next time
                    self._updates[uid] = self._updates.pop(uid)
                raise
            _merge(self._files, self._updates.pop(uid))
            yield
        while self._files:
            uid = next(iter(self._files))
            writer.write_files(self._files[uid])
            _merge(self._kept, self._files.pop(uid))
            yield
        while self._kept:
            uid = next(iter(self._kept))
            update = self._kept.pop(uid)
            try:
                writer.write_kept_files(update)
                writer.register_model(update, export)
            except Exception:
                self._kept[uid] = update  # behind the others
                raise
            yield


class JournalReader:
    """Incremental reader of a journal that projects its events onto runs.

    Args:
        journal: its path; the file need not exist yet.
        study: name of the study, until the journal gives one.
        summarizer: computes summaries.
        uploads: which files of the study's folder are sent.
    """

    def __init__(self, journal: Path, study: str, summarizer: Summarizer, uploads: Uploads | None = None) -> None:
        self._journal = journal
        self._study = study
        self._uploads = uploads
        self._summarizer = summarizer
        self.restart()

    def restart(self) -> None:
        """Go back to the first event."""
        self.offset = 0
        self.seq = -1
        self.projection = Projection(self._study, self._summarizer, self._uploads)

    def skip(self, events: Iterable[Event], offset: int) -> None:
        """Continue at a byte offset, after events that were delivered before."""
        for event in events:
            updates_of(self.projection, event, self._journal)
            self.seq = event["seq"]
        self.offset = offset

    def has_more(self) -> bool:
        """Whether the journal has grown."""
        return self._journal.exists() and self._journal.stat().st_size > self.offset

    def read(self) -> list[RunUpdate]:
        """Updates of all new events."""
        events, self.offset = read_from(self._journal, self.offset)
        updates = []
        for event in events:
            self.seq = event["seq"]
            updates += updates_of(self.projection, event, self._journal)
        return updates


class MlflowFollower:
    """Keeps a study's MLflow runs up to date with its journal.

    One run per study (parent), one per trial (child).

    Runs are identified by the tags `luthier.study_uid` and `luthier.trial_uid`, so that a study that is continued, or a
    journal that is replayed from the start, continues the same runs and adds nothing twice. No method raises because of
    the server.

    Args:
        settings: what is delivered where.
        summarizer: computes summaries of trials and study.
        delivered: collects the items that the server lacked; None = they are not counted.
        is_abandoned: whether the study's driver has died, so that its open runs are closed at the end of the journal.
        lock: held while this follower delivers; default: the journal's.
        on_change: called after each delivered item and each attempt, and before and after an export.
        exporter: exports the chosen model of a study.
    """

    def __init__(
        self,
        settings: FollowerSettings,
        summarizer: Summarizer,
        *,
        delivered: DeliveredItems | None = None,
        is_abandoned: Callable[[], bool] = lambda: False,
        lock: DeliveryLock | None = None,
        on_change: Callable[[MlflowFollower], object] = lambda follower: None,
        exporter: Exporter = export_chosen_model,
    ) -> None:
        self.settings = settings
        self.problem: str | None = None
        """The server's last failure; None after a success."""
        self.progress = float("-inf")
        """When the server last accepted something (`time.monotonic`)."""
        self.delivered_offset = 0
        """Byte of the journal after the last delivered event."""
        self.is_exporting = False
        """Whether the chosen model is being exported, which no server can speed up."""
        self.lock = lock or DeliveryLock(settings.path)
        self._delivered = delivered
        self._is_abandoned = is_abandoned
        self._on_change = on_change
        self._exporter = exporter
        self._exported: tuple[str, ExportedModel] | None = None
        self._reader = JournalReader(settings.path, settings.study, summarizer, settings.uploads)
        self._position = settings.position_file()
        self._buffer = SendBuffer()
        self._server = _Connection(settings, delivered)
        self._warnings = _RateLimit(WARNING_INTERVAL_S)

    @property
    def backlog(self) -> int:
        """Number of events that are not delivered."""
        return undelivered_events(self.settings.path, self.delivered_offset)

    @property
    def refused(self) -> int:
        """Number of items that the server rejected for good."""
        return self._server.refused

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the study's run, once it exists."""
        return self._server.run_id(self._reader.projection.study_uid)

    @property
    def added(self) -> DeliveryCounts:
        """Numbers of items that the server lacked and was sent (counted with `delivered`)."""
        return (self._delivered or DeliveredItems()).counts(self._buffer)

    def finish(self, timeout_s: float, patience_s: float = PATIENCE_S) -> int:
        """Deliver up to the end of the journal; returns the number of events that are not delivered.

        Args:
            timeout_s: seconds after which a failure is not retried.
            patience_s: seconds without progress after which a failure is not retried.
        """
        finishing = threading.Event()
        finishing.set()
        limit = GiveUp(timeout_s, patience_s)
        self.run(finishing, lambda: limit.is_due(self.problem, self.progress))
        return self.backlog

    def run(self, finishing: threading.Event, give_up: Callable[[], bool] = lambda: False) -> None:
        """Follow the journal; once `finishing` is set, return when everything is delivered.

        Args:
            finishing: set by another thread when the study has ended.
            give_up: whether to return although something is not delivered; asked after failures once it is finishing.
        """
        try:
            self._load_position()
            failures = 0
            while True:
                is_last = finishing.is_set()
                started = time.monotonic()
                try:
                    self._deliver(is_last)
                    self.problem = None
                    failures = 0
                except Exception as error:  # no failure of a tracking server may end the delivery
                    # An accepted item shows that the server is back: the wait starts short again.
                    failures = 1 if self.progress >= started else failures + 1
                    self._handle_failure(error)
                self._on_change(self)
                if is_last and (self.problem is None or give_up()):
                    return
                if is_last:
                    time.sleep(min(0.5, self.settings.poll_s))
                else:
                    finishing.wait(min(self.settings.poll_s * 2**failures, MAX_BACKOFF_S))
        finally:
            if self._exported is not None:
                self._exported[1].remove()
            self.lock.release()

    def _export(self, request: ModelRequest) -> ExportedModel:
        """The model of a request, exported once for all attempts to send it."""
        if self._exported is None or self._exported[0] != request.end:
            self.is_exporting = True
            self._on_change(self)
            try:
                self._exported = request.end, self._exporter(self.settings.path.parent, self.settings.target)
            finally:
                self.is_exporting = False
                self._on_change(self)
        return self._exported[1]

    def _load_position(self) -> None:
        if self.settings.replay:
            return
        position = self._position.load(self.settings.path)
        self._reader.skip(position.events, position.offset)
        self.delivered_offset = position.offset
        self._on_change(self)

    def _deliver(self, is_last: bool) -> None:
        """Read new events, send their updates, and store the position."""
        if not self.settings.path.exists():
            return
        # At each delivery, not once: where another process delivers this journal, this one takes over when it ends.
        self.lock.acquire()
        is_due = self._buffer or self._reader.has_more() or self._delivered is not None
        if self.delivered_offset and is_due and not self._server.is_connected:
            self._reconnect()
        self._buffer.add(self._reader.read())
        if is_last and self._is_abandoned():
            self._buffer.add(self._reader.projection.close_open_runs())
        study_uid = self._reader.projection.study_uid
        if self._buffer:
            assert study_uid is not None
            for _ in self._buffer.send(self._server.connected(study_uid), study_uid, self._export):
                self.progress = time.monotonic()
                self._on_change(self)
        # After the send: a crash in between delivers these events twice, which adds nothing.
        if self.delivered_offset != self._reader.offset:
            self.delivered_offset = self._reader.offset
            self._position.save(self.delivered_offset, self._reader.seq, self.run_id)
        self._server.drop_late_duplicates(now=is_last)

    def _reconnect(self) -> None:
        """Connect to a server; replay the journal if it lacks the study.

        Likewise if it has another run of the study. It is then another server behind the same address, or its database
        was emptied.
        """
        study_uid = self._reader.projection.study_uid
        assert study_uid is not None
        writer = self._server.connected(study_uid)
        stored_run = self._position.run()
        is_other_run = stored_run is not None and writer.run_id(study_uid) not in (stored_run, None)
        if not writer.has_run(study_uid) or is_other_run:
            # First of all, since from the next write on the server has the study, but not what was delivered before.
            self._position.reset()
            self._reader.restart()
            self._buffer.clear()
            self.delivered_offset = 0

    def _handle_failure(self, error: Exception) -> None:
        """Log a failure (rate-limited), and drop cached server state that may be wrong after it."""
        self.problem = describe_error(error)
        if self._warnings.allow():
            logger.warning(
                "MLflow does not take the record (%s). The study continues; the journal keeps what is missing.",
                self.problem,
            )
        self._server.invalidate(error)


class _Connection:
    """The writer of a study, and when it has to be replaced."""

    def __init__(self, settings: FollowerSettings, delivered: DeliveredItems | None) -> None:
        self._settings = settings
        self._delivered = delivered
        self._writer: MlflowWriter | None = None
        self._refused = 0
        self._in_doubt_since: float | None = None

    @property
    def is_connected(self) -> bool:
        return self._writer is not None

    @property
    def refused(self) -> int:
        return self._refused + (self._writer.refused if self._writer is not None else 0)

    def run_id(self, uid: str | None) -> str | None:
        return self._writer.run_id(uid) if self._writer is not None and uid is not None else None

    def connected(self, study_uid: str) -> MlflowWriter:
        """The writer, created if there is none (errors: as its constructor's)."""
        if self._writer is None:
            settings = self._settings
            self._writer = MlflowWriter(
                settings.uri,
                settings.experiment,
                study_uid,
                settings.artifact_location,
                self._delivered,
                settings.path.parent,
            )
        return self._writer

    def drop_late_duplicates(self, now: bool) -> None:
        """Delete empty duplicates of runs whose create_run was retried, once the server has executed both."""
        if self._in_doubt_since is None or self._writer is None:
            return
        if now or time.monotonic() - self._in_doubt_since > LATE_CREATE_S:
            self._writer.load_runs()
            if self._settings.registered_model is not None:
                self._writer.models.drop_duplicates()
            self._in_doubt_since = None

    def invalidate(self, error: Exception) -> None:
        """Discard the writer if its cached state may differ from the server's."""
        writer = self._writer
        if writer is None:
            return
        is_in_doubt = writer.create_in_doubt or writer.models.create_in_doubt
        if is_in_doubt:
            self._in_doubt_since = time.monotonic()
        code = getattr(error, "error_code", None)
        is_gone = isinstance(error, TrackingFileError) or code == "RESOURCE_DOES_NOT_EXIST"
        if is_in_doubt or is_gone:
            self._refused += writer.refused
            self._writer = None


class _RateLimit:
    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last = float("-inf")

    def allow(self) -> bool:
        """Whether the interval since the last permission has passed."""
        now = time.monotonic()
        if now - self._last <= self._interval_s:
            return False
        self._last = now
        return True


def undelivered_events(journal: Path, offset: int) -> int:
    """Number of events of a journal from byte `offset` on."""
    return len(read_from(journal, offset)[0]) if journal.exists() else 0


def _merge(updates: dict[str, RunUpdate], update: RunUpdate) -> None:
    if update.uid in updates:
        updates[update.uid].merge(update)
    else:
        updates[update.uid] = update
