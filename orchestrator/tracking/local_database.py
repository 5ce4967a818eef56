"""MLflow's SQLite database: created atomically, safe with concurrent creators.

MLflow itself runs dozens of migrations on the file in place, without a lock: studies that start together run them over
each other, and a process that is killed between two of them leaves a file that no MLflow opens again.
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

from orchestrator.tracking.client import configure_client
from orchestrator.tracking.mlflow_internals import dispose_engine, latest_schema_revision
from trainables.storage.atomic_files import sync

LOCK_TIMEOUT_S = 60.0
"""Wait for another study that creates the file, which takes seconds."""
SETTLED_AGE_S = 30.0
"""An incomplete file that was not written to for so long is not being created any more."""


class TrackingFileError(OSError):
    """The file cannot be used now; the message gives the way out."""


class TrackingFile:
    """The SQLite file of a tracking URI, as one writer has opened it.

    Args:
        file: absolute path; its folder is created.
        uri: MLflow's URI of the file.
    """

    def __init__(self, file: Path, uri: str) -> None:
        self.file = file
        self._uri = uri
        self._opened: tuple[int, int] | None = None

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Create the file if there is none; MLflow opens it inside the block.

        Raises:
            TrackingFileError: another MLflow is creating it, or it is incomplete.
            OSError: the disk refused.
        """
        dispose_engine(self._uri)
        if _is_complete(self.file):
            self._opened = _file_id(self.file)
            yield
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.file}.lock", timeout=LOCK_TIMEOUT_S):
            ensure_tracking_file(self.file)
            self._opened = _file_id(self.file)
            with _database_errors_explained(self.file):
                yield

    def check(self) -> None:
        """Check that the file was neither removed nor replaced, since MLflow would keep writing to the old one.

        Raises:
            TrackingFileError: it was.
        """
        if _file_id(self.file) != self._opened:
            raise TrackingFileError(f"{self.file} is not the file any more that was opened; it is opened again.")


def ensure_tracking_file(file: Path) -> None:
    """Create MLflow's tables in a file that does not exist yet. The caller holds the file's lock.

    The tables are created in a draft on this machine's disk, which is copied beside `file` and renamed once it is
    complete. Concurrent creators, also on other machines, end up with one of their files.

    Raises:
        TrackingFileError: there is an incomplete file, so new that another process may be creating it.
        OSError: the disk refused.
    """
    if _is_complete(file):
        return
    with contextlib.suppress(FileNotFoundError):
        status = file.stat()
        # Absolute value: a modification time in the future means that the clock was set back.
        if abs(time.time() - status.st_mtime) < SETTLED_AGE_S:
            raise TrackingFileError(
                f"Another MLflow is making {file}, or was killed while it did; if that was so, move the file away."
            )
        if not status.st_size:  # an empty file was created on purpose, perhaps with permissions: fill it in place
            _create_tables(file)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
        local_draft = Path(folder) / file.name
        _create_tables(local_draft)
        draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.new")
        try:
            shutil.copyfile(local_draft, draft)
            sync(draft)
            _publish(draft, file)
            sync(file.parent)
        finally:
            draft.unlink(missing_ok=True)


def _create_tables(file: Path) -> None:
    from mlflow import MlflowClient

    configure_client()
    uri = f"sqlite:///{file}"
    MlflowClient(uri, uri)  # the constructor creates the tables
    dispose_engine(uri)


def _publish(draft: Path, file: Path) -> None:
    try:
        os.link(draft, file)  # unlike a rename, fails if another process was faster
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not file.exists():
            os.rename(draft, file)


def _is_complete(file: Path) -> bool:
    """Whether the last migration of the installed MLflow has run."""
    if not file.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
            revisions = connection.execute("select version_num from alembic_version").fetchall()
    except sqlite3.Error:
        return False
    return revisions == [(latest_schema_revision(),)]


@contextlib.contextmanager
def _database_errors_explained(file: Path) -> Iterator[None]:
    from sqlalchemy.exc import DatabaseError

    try:
        yield
    except DatabaseError as error:
        raise TrackingFileError(
            f"MLflow cannot open {file} ({error.orig}): it was left half-made, or is no tracking file. Move it away: "
            "the next attempt makes a new one, and the journal has every number."
        ) from error


def _file_id(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
