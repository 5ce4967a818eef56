"""Files and folders that appear whole or not at all, and survive a power cut.

Whatever others may read while it is written, or must find intact after a crash, goes through here: it is written under
a hidden name of its own in the same folder, synced, and renamed into place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def sync(path: str | Path) -> None:
    """Return when a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(place: str | Path) -> Iterator[Path]:
    """A path to write a file to, which replaces `place` when the block ends; a block that raises leaves no trace.

    Raises:
        OSError: the disk refused; `place` is as it was.
    """
    target = Path(place)
    written = _hidden(target)
    try:
        yield written
        sync(written)
        os.replace(written, target)
        sync(target.parent)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def write_text(place: str | Path, text: str) -> None:
    """Replace the file `place` by this text (UTF-8); see `atomic_file`."""
    with atomic_file(place) as written:
        written.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(place: str | Path) -> Iterator[Path]:
    """An empty folder to fill with files, which becomes `place` when the block ends; a block that raises leaves no
    trace. Its hidden name begins with `.<name of place>-`, by which those of killed processes are found.

    Raises:
        OSError: the disk refused, or `place` exists and is not empty.
    """
    target = Path(place)
    written = _hidden(target)
    written.mkdir()
    try:
        yield written
        for path in written.iterdir():
            sync(path)
        sync(written)
        os.replace(written, target)  # replaces an empty folder, fails on any other
        sync(target.parent)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise


def _hidden(place: Path) -> Path:
    """Beside `place`, since only within one file system is a rename atomic; unique, since threads may write too."""
    return place.with_name(f".{place.name}-{uuid.uuid4().hex[:12]}")
