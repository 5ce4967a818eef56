"""Who delivers a journal: one process at a time, and the others can say which one.

One for all servers, since the same server may have several names, and two that make runs on it at once make them twice.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout


class DeliveryError(ValueError):
    """Another process delivers this journal."""


class DeliveryLock:
    """Held by a process, gone with it.

    Args:
        journal: what is delivered.
        copy: the lock of those who copy it to another server while the study's driver holds the first one.
    """

    def __init__(self, journal: Path, copy: bool = False) -> None:
        name = "mlflow-copy" if copy else "mlflow.json"
        self.path, self._journal = journal.with_name(f"{journal.name}.{name}.lock"), journal
        self._lock = FileLock(str(self.path), timeout=0, thread_local=False)

    def claim(self, refuse: bool = False) -> None:
        """Take the lock; does nothing if it is held here already.

        Args:
            refuse: do not take it; somebody who has more right to it is about to.

        Raises:
            DeliveryError: another process holds it, or `refuse`.
        """
        if self._lock.is_locked:
            return
        try:
            if refuse:
                raise Timeout(str(self.path))
            self._lock.acquire(blocking=False)
        except Timeout:
            raise DeliveryError(
                f"One process at a time delivers a journal, but {self._holder()} is delivering {self._journal}. "
                "Nothing has to be done; or wait until it ends."
            ) from None
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        self.path.write_text(json.dumps(mine))

    def release(self) -> None:
        """Let go of it."""
        self._lock.release()

    def _holder(self) -> str:
        try:
            held = json.loads(self.path.read_text())
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["since"]))
            return f"process {held['pid']} on {held['host']} (since {since})"
        except (OSError, ValueError, KeyError, TypeError):  # it has only just taken the lock
            return "another process"
