"""What has been read from a journal and not been delivered yet, one update per run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from orchestrator.tracking.run_fields import RunUpdate

if TYPE_CHECKING:
    from orchestrator.tracking.writer import MlflowWriter


class Pending:
    """Updates in the order of their runs. Numbers go first: an artifact store that is down holds none back."""

    def __init__(self) -> None:
        self.progress = float("-inf")
        """When the server last took something (`time.monotonic`)."""
        self._numbers: dict[str, RunUpdate] = {}
        self._artifacts: dict[str, RunUpdate] = {}

    def __bool__(self) -> bool:
        return bool(self._numbers or self._artifacts)

    def __iter__(self) -> Iterator[RunUpdate]:
        return iter([*self._numbers.values(), *self._artifacts.values()])

    def add(self, updates: Iterable[RunUpdate]) -> None:
        """Add later updates."""
        for update in updates:
            _add(self._numbers, update)

    def clear(self) -> None:
        """Forget everything."""
        self._numbers.clear()
        self._artifacts.clear()

    def deliver(self, writer: MlflowWriter, study_uid: str) -> None:
        """Write everything, and keep what could not be written (raises what the writer raises)."""
        while self._numbers:
            uid = next(iter(self._numbers))
            try:
                writer.write(self._numbers[uid])
            except Exception:
                if uid != study_uid:  # the others first, next time: it may be this run alone that fails
                    self._numbers[uid] = self._numbers.pop(uid)
                raise
            _add(self._artifacts, self._numbers.pop(uid))
            self.progress = time.monotonic()
        while self._artifacts:
            uid = next(iter(self._artifacts))
            writer.attach(self._artifacts[uid])
            del self._artifacts[uid]
            self.progress = time.monotonic()


def _add(updates: dict[str, RunUpdate], update: RunUpdate) -> None:
    if update.uid in updates:
        updates[update.uid].absorb(update)
    else:
        updates[update.uid] = update
