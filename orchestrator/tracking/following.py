"""The follower of one study: where its record goes, how long its end waits, and what is said of what is left."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import redact
from orchestrator.tracking.client import sqlite_file
from orchestrator.tracking.follower import MlflowFollower
from orchestrator.tracking.outstanding import Amount, outstanding

if TYPE_CHECKING:
    from orchestrator.record.journal import Journal
    from orchestrator.study_file.schema import StudySpec

logger = logging.getLogger("luthier")

CLOSING_SECONDS = 20.0
"""How long the end of a study waits for a tracking server that is behind, and takes what it is told."""
INTERRUPTED_SECONDS = 4.0
"""The same after Ctrl-C or SIGTERM: a cloud that takes its machine back gives little time."""


def follower_of(spec: StudySpec, journal: Path, uri: str | None = None, **options: Any) -> MlflowFollower:
    """A follower that is not started yet, for what the study says (`tracking.uri`, `tracking.experiment`). A SQLite
    file keeps its artifacts in `mlartifacts` beside it.

    Args:
        uri: another tracking URI than the study's.
        options: of `MlflowFollower`.
    """
    uri = uri or spec.tracking_uri
    database = sqlite_file(uri)
    artifacts = None if database is None else (database.parent / "mlartifacts").as_uri()
    return MlflowFollower(journal, uri, spec.experiment, spec.name, artifacts, **options)


@contextlib.contextmanager
def follow(spec: StudySpec, journal: Journal | Path) -> Iterator[MlflowFollower]:
    """A follower for the block's duration. What could not be delivered at the end is said on the log."""
    path = journal if isinstance(journal, Path) else journal.path
    follower, seconds = follower_of(spec, path).start(), CLOSING_SECONDS
    try:
        yield follower
    except KeyboardInterrupt:
        seconds = INTERRUPTED_SECONDS
        raise
    finally:
        if follower.close(seconds):
            why = follower.problem or "it is slow"
            logger.warning("%s (%s). %s", lacking(follower.waiting()), why, how_to_sync(spec, path.parent))


def waiting(spec: StudySpec, folder: Path) -> Amount:
    """What of a study's journal its tracking server has not been told."""
    follower = follower_of(spec, folder / "journal.jsonl")
    _, offset = follower.position.load(follower.journal)
    return outstanding(follower.journal, offset, spec.name)


def lacking(amount: Amount) -> str:
    """The beginning of a sentence about what has not been delivered."""
    return f"MLflow lacks {amount or 'the latest states'} of this study"


def how_to_sync(spec: StudySpec, folder: Path) -> str:
    """What to do about it."""
    return f"Nothing is lost: the journal keeps them. Deliver them later: {sync_command(spec, folder)}"


def sync_command(spec: StudySpec, folder: Path) -> str:
    """The command that delivers a study. The copy of a study file in the study's folder has no passwords, so where the
    URI has one, only the study file itself will do."""
    uri = spec.tracking.uri
    if uri is not None and redact(uri) != uri:
        return "luthier sync STUDY.yaml (the study file: its tracking URI holds a password)"
    return f"luthier sync {shlex.quote(str(folder))}"
