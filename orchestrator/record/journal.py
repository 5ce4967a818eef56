"""The append-only record of a study: one JSON object per line, on disk before anything else hears of the event.

Every event has `seq` (0, 1, 2 …), `time` (seconds since the epoch, never before that of the event before, wherever the
clock is set to) and `kind`; its line ends with a checksum (orchestrator/record/journal.py). The kinds are

    study_started{study, spec, versions, dataset_digest, …}            study_finished{state}
    measured{what, metrics, curves}: of the study as a whole, such as the plasticity of the pretrained network
    trial_suggested{trial_id, number, seed, role, held_out, sample, strategy, label, hparams, config_hash,
                    search_values}
    trial_started{trial_id, node, pid}     result{trial_id, unit, metrics, curves?}     checkpoint{trial_id, unit, path}
    trial_finished{trial_id, state: "complete"|"pruned"}
    trial_retried{trial_id, reason, error}     trial_failed{trial_id, reason, error}
    checkpoint_problem{trial_id, problem}
    proposal_repeated{number, search_values, values, state}: the sampler proposed the configuration of that trial again

Numbers that are not finite are stored as null, so that every line is strict JSON. `fold` (folding.py) turns
events into trial records.

One line of a journal: an event as JSON, and a checksum over its bytes, for a digit that a disk changed is as good
JSON as the right one.
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
from trainables.specs.fault_injection import reach
from trainables.specs.redaction import redact
from trainables.storage.atomic_files import sync

NEEDED = frozenset({"seq", "time", "kind"})
"""Fields of every event."""

_END = re.compile(rb', "crc": "([0-9a-f]{8})"}\Z')


def encode(event: Mapping[str, Any]) -> bytes:
    """The line of an event, with its newline; the checksum comes last, as the field `crc`.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(event, allow_nan=False, ensure_ascii=False).encode()
    return text[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(text)


def decode(line: bytes) -> dict[str, Any]:
    """The event of a line without its newline. Lines of older journals have no checksum.

    Raises:
        ValueError: no event, or not the one that was written.
    """
    event = json.loads(line)
    if not isinstance(event, dict) or not event.keys() >= NEEDED:
        raise ValueError("not an event")
    if event.pop("crc", None) is not None:
        end = _END.search(line)
        if end is None or zlib.crc32(line[: end.start()] + b"}") != int(end[1], 16):
            raise ValueError("its checksum is another")
    return event


__all__ = ["Event", "Journal", "JournalError", "JournalWriteError", "fold"]

Event = dict[str, Any]
Listener = Callable[[Event], object]

logger = logging.getLogger("luthier")

FREE_TEXT = ("error", "problem")
"""Fields whose words are somebody else's, and may quote a secret."""


class JournalError(ValueError):
    """The journal cannot be read, or is being written by somebody else."""


class JournalWriteError(OSError):
    """The disk did not take an event; the journal is as it was before."""


class Journal:
    """The journal of one study, opened for writing by one process at a time (any thread of it may append).

    Opening cuts off a torn last line, which a crash in the middle of a write leaves behind. A pickled journal is its
    path: the copy opens the file when it is first written to.

    Args:
        path: the file; folders above it are made.

    Raises:
        JournalError: another process writes this journal, or a line inside it is not JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._mutex = threading.RLock()
        self._descriptor: int | None = None
        self._listeners: list[Listener] = []
        self._next, self._latest = 0, 0.0
        self._open()

    @staticmethod
    def read(path: str | Path) -> list[Event]:
        """All complete events of a journal file. Changes nothing, so it may be called while another thread, process or
        machine writes.

        Raises:
            FileNotFoundError: no such file.
            JournalError: a line other than the last is damaged.
        """
        return read_from(path, 0)[0]

    def events(self) -> list[Event]:
        """All events so far."""
        return self.read(self.path)

    def knows(self, trial_id: str) -> bool:
        """True once the trial has been suggested in this journal."""
        return trial_id in self._suggested

    def append(self, kind: str, **fields: Any) -> Event:
        """Write one event and return it; when this returns, the event is on the disk.

        Raises:
            JournalWriteError: the disk refused twice (full, gone). The journal is as it was before and can be appended
                to again.
        """
        with self._mutex:
            if self._descriptor is None:
                self._open()
            now = max(time.time(), self._latest)
            event: Event = {"seq": self._next, "time": now, "kind": kind} | _plain(fields)
            event |= {name: redact(str(event[name])) for name in FREE_TEXT if event.get(name) is not None}
            reach("before_event", event=kind, seq=self._next)
            self._write(encode(event))
            self._next, self._latest = self._next + 1, now
            reach("after_event", event=kind, seq=event["seq"])
            if kind == "trial_suggested":
                self._suggested.add(str(event["trial_id"]))
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:  # a display must not stop a study
                    logger.exception("A listener of the journal failed on %s", kind)
            return event

    def subscribe(self, listener: Listener) -> None:
        """Call `listener(event)` after every event from now on, in the thread that appends; what it raises is logged
        and dropped. Subscribing twice changes nothing; listeners are not pickled."""
        if listener not in self._listeners:
            self._listeners.append(listener)

    def close(self) -> None:
        """Let go of the file; a later `append` opens it again."""
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
        except OSError:  # once more: what a cable or a server does for a moment must not cost an event
            try:
                self._try_to_write(line)
            except OSError as error:
                raise JournalWriteError(error.errno, error.strerror, str(self.path)) from error
        self._end += len(line)

    def _try_to_write(self, line: bytes) -> None:
        assert self._descriptor is not None
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):  # the original failure is the one to report
                os.ftruncate(self._descriptor, self._end)
            raise


def read_from(path: str | Path, offset: int, end: int | None = None) -> tuple[list[Event], int]:
    """Complete events that begin at byte `offset` or later and lie before `end` (None = the end of the file), and the
    byte after the last of them.

    A last line that is torn (no newline, or not JSON) is left out; the next call sees it once it is whole.

    Raises:
        FileNotFoundError: no such file.
        JournalError: a line other than the last is damaged.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        lines = file.read(-1 if end is None else end - offset).split(b"\n")[:-1]
    events: list[Event] = []
    for index, line in enumerate(lines):
        try:
            event = decode(line)
        except ValueError as error:  # covers JSONDecodeError and UnicodeDecodeError
            if index == len(lines) - 1:
                break
            raise JournalError(
                f"Every line of a journal is one JSON event, but the one at byte {offset} of {path} is damaged "
                f"({error}). Restore the file from a copy, or cut it off before that line."
            ) from None
        events.append(event)
        offset += len(line) + 1
    return events, offset


def _plain(value: Any) -> Any:
    """JSON values of `value`: numpy scalars unpacked, tuples as lists, non-finite numbers as null, the rest as text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
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
