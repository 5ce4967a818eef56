"""Every file below a folder, once: links, loops, special and hidden files do not become samples, but are listed."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from orchestrator.ingest.errors import DataError, shown
from orchestrator.ingest.source import Left

NO_IMAGE = "no image file by its extension"
MAX_DEPTH = 6
"""Folders below the root; deeper ones are listed, not entered."""


class File(NamedTuple):
    """One candidate."""

    folders: tuple[str, ...]
    """Names of the folders from the root down."""
    name: str
    size: int
    """Bytes."""
    modified: int
    """Modification time, ns."""

    @property
    def path(self) -> str:
        """Relative to the root."""
        return "/".join((*self.folders, self.name))


@dataclass
class Tree:
    """What lies below a folder."""

    files: list[File] = field(default_factory=list)
    """Sorted by path."""
    folders: list[tuple[str, ...]] = field(default_factory=list)
    """Folders that were entered, sorted, without the root."""
    ignored: list[Left] = field(default_factory=list)


def walk(root: Path, suffixes: frozenset[str]) -> Tree:
    """List the files with one of `suffixes` (lower case, with the dot).

    A link that leads back into the root is not followed: what it points at is read where it is. Links to the outside
    are followed, each folder once.

    Raises:
        DataError: a folder that this user may not read.
    """
    tree = Tree()
    home = os.path.realpath(root)
    entered = set[tuple[int, int]]()
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        folders = waiting.pop()
        place = os.path.join(root, *folders)
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in entered:
            tree.ignored.append(Left(_name(folders), "a folder that was already read"))
            continue
        entered.add((status.st_dev, status.st_ino))
        if folders:
            tree.folders.append(folders)
        waiting += _list(tree, home, place, folders, suffixes)
    tree.files.sort()
    tree.folders.sort()
    tree.ignored.sort()
    return tree


def _list(
    tree: Tree, home: str, place: str, folders: tuple[str, ...], suffixes: frozenset[str]
) -> list[tuple[str, ...]]:
    """Sort the entries of one folder into files and ignored ones; returns the folders to enter."""
    inner = []
    try:
        entries = sorted(os.scandir(place), key=lambda entry: entry.name, reverse=True)
    except PermissionError as error:
        raise DataError(f"Data must be readable, but this user has no permission to read {shown(place)}.") from error
    for entry in entries:
        reason = _reason_to_skip(entry, home, suffixes)
        path = (*folders, entry.name)
        if reason is None and entry.is_dir():
            if len(path) <= MAX_DEPTH:
                inner.append(path)
                continue
            reason = f"more than {MAX_DEPTH} folders below the root"
        if reason is not None:
            tree.ignored.append(Left(_name(path), reason))
        else:
            status = entry.stat()
            tree.files.append(File(folders, entry.name, status.st_size, status.st_mtime_ns))
    return inner


def _reason_to_skip(entry: os.DirEntry[str], home: str, suffixes: frozenset[str]) -> str | None:
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_symlink():
        try:
            entry.stat()
        except OSError:
            return "a broken link"
        target = os.path.realpath(entry.path)
        if target == home or target.startswith(home + os.sep):
            return f"a link to {shown(os.path.relpath(target, home))}, which is read there"
    if entry.is_dir():
        return None
    if not stat.S_ISREG(entry.stat().st_mode):
        return "a special file (pipe, socket or device)"
    if os.path.splitext(entry.name)[1].lower() not in suffixes:
        return NO_IMAGE
    return None


def _name(path: tuple[str, ...]) -> str:
    return shown("/".join(path))
