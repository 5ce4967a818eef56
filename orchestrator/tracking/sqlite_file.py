"""MLflow's SQLite file: complete from the moment that it has its name, and never made by two at once.

MLflow's own way is dozens of migrations of the file in its place, unlocked: studies that start together run them twice
over each other, and a process that is killed among them leaves a file that no MLflow opens again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from trainables.storage.atomic_files import sync

LOCK_SECONDS = 60.0
"""How long a study waits for another one that makes the file; it takes seconds."""
SETTLED_SECONDS = 30.0
"""A file without all tables that nobody has written to for so long is not being made any more."""


class TrackingFileError(OSError):
    """The file cannot be used now; the message says what to do."""


class TrackingFile:
    """The SQLite file of one tracking URI, as one writer has opened it.

    Args:
        file: absolute path; its folder is made.
        uri: what MLflow is given for it.
    """

    def __init__(self, file: Path, uri: str) -> None:
        self.file, self._uri = file, uri
        self._opened: tuple[int, int] | None = None

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Make the file if there is none. In the block MLflow opens it, and adds what an older MLflow has left out.

        Raises:
            TrackingFileError: another MLflow is making it, or it is not whole.
            OSError: the disk refused.
        """
        _forget_connections(self._uri)
        if _whole(self.file):
            self._opened = _identity(self.file)
            yield
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.file}.lock", timeout=LOCK_SECONDS):
            ensure_tracking_file(self.file)
            self._opened = _identity(self.file)
            with _explained(self.file):
                yield

    def check(self) -> None:
        """Nobody has taken the file away or put another one in its place: MLflow would write on, to the old one.

        Raises:
            TrackingFileError: somebody has.
        """
        if _identity(self.file) != self._opened:
            raise TrackingFileError(f"{self.file} is not the file any more that was opened; it is opened again.")


def ensure_tracking_file(file: Path) -> None:
    """Make MLflow's tables in a file that does not exist yet, for a caller who holds its lock.

    They are made in a file of its own on this machine's disk, which is copied beside `file` and gets the name when it
    is whole: whoever else makes one, on another machine, too, has the one or the other.

    Raises:
        TrackingFileError: there is a file without all tables, and it is so new that somebody else may be making it.
        OSError: the disk refused.
    """
    if _whole(file):
        return
    with contextlib.suppress(FileNotFoundError):
        status = file.stat()
        # A file says when it was written by the clock on the wall; one from the future is of a clock that was set back.
        if abs(time.time() - status.st_mtime) < SETTLED_SECONDS:
            raise TrackingFileError(
                f"Another MLflow is making {file}, or was killed while it did; if that was so, move the file away."
            )
        if not status.st_size:  # somebody's empty file is filled, not replaced
            _migrate(file)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
        made = Path(folder) / file.name
        _migrate(made)
        draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.new")
        try:
            shutil.copyfile(made, draft)
            sync(draft)
            _publish(draft, file)
            sync(file.parent)
        finally:
            draft.unlink(missing_ok=True)


def _migrate(draft: Path) -> None:
    from mlflow.store.db import utils
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{draft}")
    try:
        utils._initialize_tables(engine)
    finally:
        engine.dispose()


def _publish(draft: Path, file: Path) -> None:
    try:
        os.link(draft, file)  # never over the file of an MLflow that was faster
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not file.exists():
            os.rename(draft, file)


def _whole(file: Path) -> bool:
    """Whether the installed MLflow's last migration has been done."""
    from mlflow.store.db import utils

    if not file.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("select version_num from alembic_version").fetchall()
    except sqlite3.Error:
        return False
    return found == [(utils._get_latest_schema_revision(),)]


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    from sqlalchemy.exc import DatabaseError

    try:
        yield
    except DatabaseError as error:
        raise TrackingFileError(
            f"MLflow cannot open {file} ({error.orig}): it was left half-made, or is no tracking file. Move it away: "
            "the next attempt makes a new one, and the journal has every number."
        ) from error


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _forget_connections(uri: str) -> None:
    """MLflow keeps connections of a URI for the life of the process, also to a file that is not there any more."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if (engine := getattr(SqlAlchemyStore, "_engine_map", {}).get(uri)) is not None:
        engine.dispose()
