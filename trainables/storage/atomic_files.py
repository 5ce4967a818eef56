"""Atomic, durable writes of files and folders.

A reader sees the old content or the new one, never a part, and what has its final name survives a power cut. Written
under a unique hidden name in the same folder, synced, then renamed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def sync(path: str | Path) -> None:
    """Flush a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Replace a file atomically.

    Yields a temporary path to write, renamed to `path` at the end of the block.

    If the block raises, `path` is unchanged and the temporary file is removed.

    Raises:
        OSError: the disk refused a write; `path` is unchanged.
    """
    target = Path(path)
    temporary = _temporary_name(target)
    try:
        yield temporary
        # The bytes before the name: after a power cut a name without its bytes would be a valid, empty file.
        sync(temporary)
        os.replace(temporary, target)
        # The rename itself is an entry of the folder, and is lost with the power until that is synced.
        sync(target.parent)
    except BaseException:
        # On an interrupt, too: a temporary file is of no use to a later attempt.
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Replace a file's content by `text` (UTF-8) atomically, see `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Create a folder atomically.

    Yields an empty temporary folder to fill with files, renamed to `path` at the end.

    If the block raises, the temporary folder is removed. Its name begins with `.<name of path>-`, by which the
    leftovers of killed processes can be found.

    Raises:
        OSError: the disk refused a write, or `path` exists and is not empty.
    """
    target = Path(path)
    temporary = _temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
        # Files, folder, name, in this order: after a power cut a folder with its final name is complete.
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        os.replace(temporary, target)  # replaces an empty folder, fails on any other
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary_name(target: Path) -> Path:
    """A unique hidden name beside `target`: a rename is atomic within one file system only."""
    return target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")
