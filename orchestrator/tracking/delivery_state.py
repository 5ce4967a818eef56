"""Durable state of a delivery: its lock, and its read offset in the journal."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.record.journal import Event, read_from
from trainables.storage.atomic_files import write_text


class DeliveryError(ValueError):
    """Another process delivers this journal."""


class DeliveryLock:
    """Advisory lock of the one process that delivers a journal; released when the process ends.

    There is one for all servers: the same server may have several names, and two processes that create runs on it at
    once would create them twice.

    Args:
        journal: the journal that is delivered.
        copy: the lock of copies to another server, for while the study's driver holds the first one.
        pid: process to name to others; default: this one. (A tracking process names the driver.)
    """

    def __init__(self, journal: Path, copy: bool = False, pid: int | None = None) -> None:
        suffix = "mlflow-copy.lock" if copy else "mlflow.json.lock"
        self.path = journal.with_name(f"{journal.name}.{suffix}")
        self._journal = journal
        self._pid = pid if pid is not None else os.getpid()
        self._lock = FileLock(str(self.path), timeout=0, thread_local=False)

    def acquire(self) -> None:
        """Take the lock; does nothing if this object holds it.

        Raises:
            DeliveryError: another process holds it.
        """
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise self.refusal() from None
        holder = {"pid": self._pid, "host": socket.gethostname(), "since": time.time()}
        self.path.write_text(json.dumps(holder))

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        self._lock.release()

    def refusal(self) -> DeliveryError:
        """Error for a process that must not take the lock, with the name of its holder."""
        return DeliveryError(
            f"One process at a time delivers a journal, but {self._holder()} is delivering {self._journal}. "
            "Nothing has to be done; or wait until it ends."
        )

    def _holder(self) -> str:
        try:
            holder = json.loads(self.path.read_text())
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
            return f"process {holder['pid']} on {holder['host']} (since {since})"
        except (OSError, ValueError, KeyError, TypeError):  # the holder has not written its name yet
            return "another process"


@dataclass(frozen=True)
class Position:
    """Read offset of a delivery."""

    offset: int = 0
    """Byte after the last delivered event."""
    events: list[Event] = field(default_factory=list)
    """Delivered events."""
    run: str | None = None
    """The server's id of the study's run; no other server has it."""


@dataclass(frozen=True)
class PositionFile:
    """Durable read offset, replaced atomically.

    It may be lost or out of date: events that are delivered again change nothing.

    Args:
        path: the file.
        target: identifies the server and experiment; a position for another target is not valid.
    """

    path: Path
    target: str

    def load(self, journal: Path) -> Position:
        """The stored position, or the start if it is missing, damaged, for another target or another journal."""
        try:
            stored = json.loads(self.path.read_text())
            offset = int(stored["offset"])
            seq = int(stored["seq"])
            events, end = read_from(journal, 0, end=offset)
        except (OSError, ValueError, KeyError, TypeError):
            return Position()
        # The event at the offset must be the stored one: a journal restored from an older copy is another one there.
        is_valid = stored["target"] == self.target and end == offset and bool(events) and events[-1]["seq"] == seq
        return Position(offset, events, self.run()) if is_valid else Position()

    def save(self, offset: int, seq: int, run: str | None) -> None:
        """Store that the event `seq`, which ends before byte `offset`, is delivered.

        Args:
            run: the server's id of the study's run.
        """
        write_text(self.path, json.dumps({"target": self.target, "offset": offset, "seq": seq, "run": run}))

    def reset(self) -> None:
        """Start again with the first event."""
        self.path.unlink(missing_ok=True)

    def run(self) -> str | None:
        """The server's id of the study's run; None if it is not stored."""
        try:
            return str(json.loads(self.path.read_text())["run"] or "") or None
        except (OSError, ValueError, KeyError, TypeError):
            return None
