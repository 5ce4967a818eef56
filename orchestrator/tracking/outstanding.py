"""How much of a study a tracking server has been told, and how much of its journal waits."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.record.journal import Event, read_from
from orchestrator.tracking.run_fields import RunUpdate
from orchestrator.tracking.run_updates import Projection

logger = logging.getLogger("luthier")


@dataclass(frozen=True)
class Amount:
    """So many things of a tracking server."""

    runs: int = 0
    points: int = 0
    artifacts: int = 0

    def __bool__(self) -> bool:
        return bool(self.runs or self.points or self.artifacts)

    def __str__(self) -> str:
        return f"{_count(self.runs, 'run')}, {_count(self.points, 'point')} and {_count(self.artifacts, 'artifact')}"

    def to_dict(self) -> dict[str, int]:
        """JSON values."""
        return {"runs": self.runs, "points": self.points, "artifacts": self.artifacts}


@dataclass
class Additions:
    """What was found missing on the server and sent. One that an answer was lost of is sent again and counted once."""

    runs: set[str] = field(default_factory=set)
    points: set[tuple[str, str, int, int]] = field(default_factory=set)
    """(uid of the run, metric, time, step)."""
    artifacts: set[tuple[str, str]] = field(default_factory=set)

    def amount(self, waiting: Iterable[RunUpdate] = ()) -> Amount:
        """How much that is, without what is still waiting to be sent again."""
        points, artifacts = set(self.points), set(self.artifacts)
        for update in waiting:
            points -= {(update.uid, key, time, step) for key, _, time, step in update.points}
            artifacts -= {(update.uid, name) for name in (*update.texts, *update.drawn)}
        return Amount(len(self.runs), len(points), len(artifacts))


def outstanding(journal: Path, offset: int, study: str = "study") -> Amount:
    """What the events from byte `offset` on would add to a server that has been told of those before it: at most, for
    what was on the way when a server failed may have arrived."""
    if not journal.exists():
        return Amount()
    projection, known = Projection(study), set[str]()
    for event in read_from(journal, 0, end=offset)[0]:
        known |= {update.uid for update in updates_of(projection, event, journal)}
    runs, points, artifacts = set[str](), 0, set[tuple[str, str]]()
    for event in read_from(journal, offset)[0]:
        for update in updates_of(projection, event, journal):
            runs.add(update.uid)
            points += len(update.points)
            artifacts |= {(update.uid, name) for name in (*update.texts, *update.drawn)}
    return Amount(len(runs - known), points, len(artifacts))


def updates_of(projection: Projection, event: Event, journal: Path) -> list[RunUpdate]:
    """What an event changes; one that makes no sense is said on the log and must not hold back all others."""
    try:
        return projection.apply(event)
    except Exception:
        logger.exception("MLflow is not told of event %s of %s", event["seq"], journal)
        return []


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
