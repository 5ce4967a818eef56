"""A disk that is full or fails under a study: many may meet it first, each with an error of its own; one is shown."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOM = 64 * 2**20
"""Bytes: with more than these free, it is another disk that is full."""

_FULL = ("database or disk is full", "No space left on device", "Disk quota exceeded")
_FAILING = ("disk I/O error", "Input/output error", "readonly database", "Read-only file system")
_NUMBERS = {
    errno.ENOSPC: True, errno.EDQUOT: True, errno.EFBIG: True,
    errno.EIO: False, errno.EROFS: False, errno.ESTALE: False,
}  # fmt: skip


class DiskError(OSError):
    """The study's folder takes no more data, fails, or has gone."""


@contextlib.contextmanager
def disk_explained(folder: Path) -> Iterator[None]:
    """Turn whatever a full or failing disk, or a journal that was removed, made of the block into a `DiskError`;
    everything else passes.

    Args:
        folder: the study's.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and str(error.filename) == str(folder / "journal.jsonl"):
            raise DiskError(
                f"A study writes its record to {folder}, but the journal there has gone: it was removed or moved while "
                "the study ran. Put it back and run the same command again; without it the study begins anew."
            ) from error
        full = _is_full(error)
        free = shutil.disk_usage(folder).free if full else 0
        if full is None or free > ROOM:
            raise
        raise DiskError(_message(folder, full, free)) from error


def _is_full(error: BaseException) -> bool | None:
    """True = no room, False = the disk fails, None = neither, for an error or what it came from."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is None or found in seen:
            continue
        seen.append(found)
        waiting += [found.__cause__, found.__context__]
        if isinstance(found, OSError) and found.errno in _NUMBERS:
            return _NUMBERS[found.errno]
        for known, full in ((_FULL, True), (_FAILING, False)):
            if any(text in str(found) for text in known):
                return full
    return None


def _message(folder: Path, full: bool, free: int) -> str:
    if full:
        return (
            f"A study writes its record to {folder}, but that disk is full ({free / 2**20:.0f} MiB free). What was "
            "recorded is kept. Free some space and run the same command again."
        )
    return (
        f"A study writes its record to {folder}, but that disk fails or is read-only. What was recorded is kept. Look "
        "at the disk (its mount, the system's log), then run the same command again."
    )
