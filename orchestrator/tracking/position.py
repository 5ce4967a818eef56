"""How far a follower of a journal has come: one small JSON file beside the journal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from orchestrator.record.journal import Event, read_from
from trainables.storage.atomic_files import write_text


@dataclass(frozen=True)
class PositionFile:
    """Replaced atomically. It may be lost or old: what is delivered again from an earlier place changes nothing.

    Args:
        path: the file.
        target: names whom the events were delivered to; a position for another target does not count.
    """

    path: Path
    target: str

    def load(self, journal: Path) -> tuple[list[Event], int]:
        """The events delivered so far and the byte after them; none if the position is missing, damaged, for another
        target or not that of this journal."""
        try:
            position = json.loads(self.path.read_text())
            offset, seq = int(position["offset"]), int(position["seq"])
            events, end = read_from(journal, 0, end=offset)
        except (OSError, ValueError, KeyError, TypeError):
            return [], 0
        fits = position["target"] == self.target and end == offset and bool(events) and events[-1]["seq"] == seq
        return (events, offset) if fits else ([], 0)

    def save(self, offset: int, seq: int, run: str | None) -> None:
        """Remember that the event `seq`, which ends before byte `offset`, was delivered.

        Args:
            run: the server's id of the study's run, which no other server has.
        """
        write_text(self.path, json.dumps({"target": self.target, "offset": offset, "seq": seq, "run": run}))

    def forget(self) -> None:
        """Begin again with the first event."""
        self.path.unlink(missing_ok=True)

    def run(self) -> str | None:
        """The server's id of the study's run; None if it is not known."""
        try:
            return str(json.loads(self.path.read_text())["run"] or "") or None
        except (OSError, ValueError, KeyError, TypeError):
            return None
