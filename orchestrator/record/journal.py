"""Append-only, durable journal of a study: one JSON object per line.

An event is synced to disk before any listener is called.

Every event has `seq` (0, 1, 2 …), `time` (seconds since the epoch, never decreasing, even if the clock is set back) and
`kind`; its line ends with a checksum. The kinds are

    study_started{format, study, spec, versions, dataset_digest, …}    study_finished{state}
    warm_start{studies, entries}: what the search takes over from earlier studies, by label of an entry
    measured{what, metrics, curves}: of the study as a whole, such as the plasticity of the pretrained network
    trial_suggested{trial_id, number, seed, role, held_out, sample, strategy, label, hparams, config_hash,
                    search_values}
    trial_started{trial_id, node, pid}
    result{trial_id, unit, metrics, curves?, weights?, predictions?}: SHA-256 and size of the latter where they are kept
    trial_paused{trial_id}: at a rung, without a process        trial_promoted{trial_id}: it continues
    trial_finished{trial_id, state: "complete"|"pruned"}
    trial_retried{trial_id, reason, error}     trial_failed{trial_id, reason, error}
    checkpoint_problem{trial_id, problem}: of its checkpoints, or of keeping its weights and predictions
    weights_discarded{trial_id, why: "superseded"|"pruned"}: its weights and predictions are kept no longer
    proposal_repeated{number, search_values, values, state}: the sampler proposed the configuration of that trial again

Older journals may also hold `checkpoint` events, which are ignored. Numbers that are not finite are stored as null, so
that every line is strict JSON. `orchestrator.record.records.fold` turns events into trial records.

The checksum (CRC-32 of the line) protects against silent corruption that is still valid JSON, such as a flipped digit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.record.records import fold
from trainables.specs.fault_injection import fault_point
from trainables.specs.redaction import redact
from trainables.storage.atomic_files import sync

FORMAT = 1
"""Format of the events, part of every `study_started`; raise it when an event changes its meaning. Journals without one
have format 1, which this version reads as well."""

REQUIRED_FIELDS = frozenset({"seq", "time", "kind"})
"""Fields of every event."""

_END = re.compile(rb', "crc": "([0-9a-f]{8})"}\Z')


def encode(event: Mapping[str, Any]) -> bytes:
    """The journal line of an event, newline included; the last field is the checksum `crc`.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(event, allow_nan=False, ensure_ascii=False).encode()
    # The checksum is of the event without it: `decode` puts those bytes together again.
    return text[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(text)


def decode(line: bytes) -> dict[str, Any]:
    """The event of a line without its newline. Lines of older journals have no checksum.

    Raises:
        ValueError: not an event, or the checksum does not match.
    """
    event = json.loads(line)
    if not isinstance(event, dict) or not event.keys() >= REQUIRED_FIELDS:
        raise ValueError("not an event")
    if event.pop("crc", None) is not None:
        end = _END.search(line)
        if end is None or zlib.crc32(line[: end.start()] + b"}") != int(end[1], 16):
            raise ValueError("checksum mismatch")
    return event


__all__ = ["Event", "Journal", "JournalError", "JournalWriteError", "fold"]

Event = dict[str, Any]
Listener = Callable[[Event], object]

logger = logging.getLogger("luthier")

FREE_TEXT = ("error", "problem")
"""Free-text fields (exception messages): redacted before writing."""


class JournalError(ValueError):
    """The journal cannot be read, or another process is writing it."""


class JournalWriteError(OSError):
    """An event could not be written; the journal is unchanged."""


class Journal:
    """Journal of one study: one writing process at a time.

    Any of its threads may append. Opening truncates a torn last line, left by a crash in the middle of a write.
    Pickling keeps only the path: the copy opens the file on its first append.

    Args:
        path: the file; missing parent folders are created.

    Raises:
        JournalError: another process writes this journal, or a line inside it is not JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        # Reentrant: a listener may append an event of its own.
        self._mutex = threading.RLock()
        self._descriptor: int | None = None
        self._listeners: list[Listener] = []
        self._next = 0
        self._latest = 0.0
        self._open()

    @staticmethod
    def read(path: str | Path) -> list[Event]:
        """All complete events of a journal file.

        Read-only, so safe while another thread, process or machine writes.

        Raises:
            FileNotFoundError: no such file.
            JournalError: a line other than the last is damaged.
        """
        return read_from(path, 0)[0]

    def events(self) -> list[Event]:
        """All events so far."""
        return self.read(self.path)

    def knows(self, trial_id: str) -> bool:
        """Whether the trial has been suggested in this journal."""
        return trial_id in self._suggested

    def append(self, kind: str, **fields: Any) -> Event:
        """Write one event durably and return it.

        Raises:
            JournalWriteError: two attempts failed (disk full, disk gone). The journal is unchanged and can be appended
                to again.
        """
        with self._mutex:
            if self._descriptor is None:
                self._open()
            # The clock may have been set back since the last event.
            now = max(time.time(), self._latest)
            event: Event = {"seq": self._next, "time": now, "kind": kind} | _plain(fields)
            if kind == "study_started":
                event["format"] = FORMAT
            event |= {name: redact(str(event[name])) for name in FREE_TEXT if event.get(name) is not None}
            fault_point("before_event", event=kind, seq=self._next)
            self._write(encode(event))
            # After the write: an event that could not be written leaves its number to the next one.
            self._next += 1
            self._latest = now
            fault_point("after_event", event=kind, seq=event["seq"])
            if kind == "trial_suggested":
                self._suggested.add(str(event["trial_id"]))
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:  # a display must not stop a study
                    logger.exception("A listener of the journal failed on %s", kind)
            return event

    def subscribe(self, listener: Listener) -> None:
        """Call `listener(event)` after every later event, in the appending thread.

        Exceptions of a listener are logged and dropped. Subscribing twice has no effect; listeners are not pickled.
        """
        if listener not in self._listeners:
            self._listeners.append(listener)

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        with self._mutex:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
                self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._mutex = threading.RLock()
        self._descriptor = None
        self._listeners = []
        self._suggested: set[str] = set()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not thread-local: the thread that closes a journal may be another than the one that opened it.
        self._lock = FileLock(f"{self.path}.lock", timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise JournalError(
                f"A study is written by one process at a time, but another one holds {self.path}. "
                "Wait until it ends, or use another name or storage for this study."
            ) from None
        try:
            events, self._end = read_from(self.path, 0) if self.path.exists() else ([], 0)
            # O_APPEND: writes go to the end of the file, also after a torn line was cut off.
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._descriptor, self._end)
            sync(self.path.parent)  # the file's name, too, must survive a power cut
        except BaseException:
            self._lock.release()
            raise
        self._next = int(events[-1]["seq"]) + 1 if events else 0
        self._latest = float(events[-1]["time"]) if events else 0.0
        self._suggested = {str(e["trial_id"]) for e in events if e["kind"] == "trial_suggested"}

    def _write(self, line: bytes) -> None:
        try:
            self._try_to_write(line)
        except OSError:  # one retry: a transient error of a network file system must not lose an event
            try:
                self._try_to_write(line)
            except OSError as error:
                raise JournalWriteError(error.errno, error.strerror, str(self.path)) from error
        self._end += len(line)

    def _try_to_write(self, line: bytes) -> None:
        assert self._descriptor is not None
        try:
            rest = memoryview(line)
            # `os.write` may write a part only, as on a disk that is almost full.
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError:
            # What was written of the line is cut off again: the next event must begin on a line of its own.
            with contextlib.suppress(OSError):  # the original failure is the one to report
                os.ftruncate(self._descriptor, self._end)
            raise


def read_from(path: str | Path, offset: int, end: int | None = None) -> tuple[list[Event], int]:
    """Complete events from byte `offset` on, and the offset after the last.

    Up to `end`; None = the end of the file.

    A torn last line (no newline, or not JSON) is left out; a later call returns it once it is complete.

    Raises:
        FileNotFoundError: no such file.
        JournalError: a line other than the last is damaged, or a newer Luthier wrote the journal in another format.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        lines = file.read(-1 if end is None else end - offset).split(b"\n")[:-1]
    events: list[Event] = []
    for index, line in enumerate(lines):
        try:
            event = decode(line)
        except ValueError as error:  # covers JSONDecodeError and UnicodeDecodeError
            # A crash tears the last line only; a damaged one before it was damaged later.
            if index == len(lines) - 1:
                break
            raise JournalError(
                f"Every line of a journal is one JSON event, but the one at byte {offset} of {path} is damaged "
                f"({error}). Restore the file from a copy, or cut it off before that line."
            ) from None
        if event["kind"] == "study_started" and event.get("format", 1) != FORMAT:
            raise JournalError(
                f"This Luthier reads journals of format {FORMAT}, but {path} has format {event['format']!r}. Use the "
                "Luthier that wrote it, or a newer one."
            )
        events.append(event)
        offset += len(line) + 1
    return events, offset


def _plain(value: Any) -> Any:
    """A value as JSON can hold it.

    numpy scalars are unpacked, tuples become lists, non-finite numbers null, values of other types strings.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # `float()`: NumPy's float64 is a subclass.
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return _plain(value.item())
    return str(value)
