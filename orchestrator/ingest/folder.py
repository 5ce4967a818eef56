"""Image folders: `root/<domain>/<class>/*`, `root/<class>/*`, `root/train|val|test/…`, `root/ood/<domain>/<class>`.

Every file below a folder, once: links, loops, special and hidden files do not become samples, but are listed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.ingest.errors import DataError, few, shown
from orchestrator.ingest.source import DEFAULT_DOMAIN, SPLIT_NAMES, EncodedSource, Left, Sample

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


EXTENSIONS = frozenset(
    f".{e}"
    for e in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm"),
        # Pictures that will be refused: they are listed with the reason instead of being passed over.
        *("eps", "ps", "svg", "heic", "heif", "avif", "jp2", "jxl", "psd", "tga", "ico", "raw", "dng", "cr2", "nef"),
    )
)
"""Files with these endings are samples; what they hold is decided by their content."""

LAYOUTS = (
    "<domain>/<class>/<image>, <class>/<image>, train|val|test/<class>/<image>, and beside any of them "
    "ood/<domain>/<class>/<image>"
)
_CHUNK = 64


@dataclass
class FolderSource(EncodedSource):
    """Images in folders; `Sample.where` is the path below `root`."""

    root: Path = Path()

    def chunks(self, wanted: Sequence[int]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        for start in range(0, len(wanted), _CHUNK):
            yield {"reader": "files", "root": str(self.root)}, list(wanted[start : start + _CHUNK])


def open_folder(root: Path) -> FolderSource:
    """List the images below a folder and read domains, classes and splits from the folder names.

    Raises:
        DataError: no images, images without a class folder, or a layout that can be read in more than one way.
    """
    tree = walk(root, EXTENSIONS)
    digest = hashlib.sha256()
    for file in tree.files:
        digest.update(f"{file.path}\0{file.size}\0{file.modified}\n".encode("utf-8", "surrogateescape"))
    groups = _grouped(root, tree)
    samples, empty, domains = _samples(root, groups)
    tree.ignored += _empty_folders(tree, empty)
    return FolderSource(
        kind="folder",
        layout=_describe(groups, domains),
        samples=samples,
        digest=digest.hexdigest(),
        evaluation_domains=frozenset(
            s.domain for s, g in zip(samples, groups.order, strict=True) if g == "ood" or s.domain.casefold() == "ood"
        ),
        empty_domains=tuple(shown(d) for d in empty) if domains else (),
        ignored=sorted(tree.ignored),
        root=root,
    )


@dataclass
class _Groups:
    """Files by the kind of place they lie in: `plain`, `train`, `val`, `test` or `ood`."""

    files: list[tuple[str, tuple[str, ...], File]]
    """Kind of place, folder names below it, file."""
    tree: Tree

    @property
    def order(self) -> list[str]:
        return [kind for kind, _, _ in self.files]

    @property
    def has_splits(self) -> bool:
        return "train" in self.order


def _grouped(root: Path, tree: Tree) -> _Groups:
    tops = sorted({file.folders[0] for file in tree.files if file.folders})
    tree.ignored += [
        Left(shown(file.name), "directly in the root, so it has no class") for file in tree.files if not file.folders
    ]
    if not tops:
        others = sorted(left.name for left in tree.ignored if left.reason == NO_IMAGE)
        none = "there is none" + (f", only {few(others)}" if others else "")
        found = "they lie directly in the root" if tree.files else none
        raise DataError(
            f"Images must lie in folders named after their classes, but in {shown(str(root))} {found}. "
            f"The layouts understood are {LAYOUTS}."
        )
    splits = {top: SPLIT_NAMES[top.casefold()] for top in tops if top.casefold() in SPLIT_NAMES}
    if "train" not in splits.values():
        splits = {}
    deep = min((len(f.folders) for f in tree.files if f.folders and f.folders[0].casefold() == "ood"), default=0) >= 3
    places = {top: "ood" if top.casefold() == "ood" and deep else splits.get(top, "plain") for top in tops}
    if splits and "plain" in places.values():
        others = [top for top, place in places.items() if place == "plain"]
        raise DataError(
            f"Beside train, val and test there may only be ood/<domain>/<class>, but {shown(str(root))} also has "
            f"images in {few(map(shown, others))}. Move them away, or into ood/."
        )
    return _Groups(
        [
            (places[file.folders[0]], file.folders[0 if places[file.folders[0]] == "plain" else 1 :], file)
            for file in tree.files
            if file.folders
        ],
        tree,
    )


def _samples(root: Path, groups: _Groups) -> tuple[list[Sample], list[str], bool]:
    """Samples; top folders without images; whether the ID part has domains."""
    inner = {len(below): file for place, below, file in groups.files if place != "ood"}
    outer = {len(below): file for place, below, file in groups.files if place == "ood"}
    if set(inner) not in ({1}, {2}) or not set(outer) <= {2}:
        raise DataError(
            f"All images must lie equally deep, as {LAYOUTS}, but in {shown(str(root))} there are "
            f"{few([shown(file.path) for file in (*inner.values(), *outer.values())])}."
        )
    domains = set(inner) == {2}
    samples = []
    for place, below, file in groups.files:
        domain = shown(below[0]) if place == "ood" or domains else DEFAULT_DOMAIN
        split = place if place in ("train", "val", "test") else None
        samples.append(Sample(shown(file.path), shown(below[-1]), domain, split, file.path))
    twice = {s.domain for s, place in zip(samples, groups.order, strict=True) if place == "ood"} & {
        s.domain for s, place in zip(samples, groups.order, strict=True) if place != "ood"
    }
    if twice:
        raise DataError(f"A domain lies either in ood/ or beside it, but {few(sorted(twice))} lies in both places.")
    used = {file.folders[0] for _, _, file in groups.files}
    empty = [folders[0] for folders in groups.tree.folders if len(folders) == 1 and folders[0] not in used]
    return samples, [] if groups.has_splits or not domains else empty, domains


def _empty_folders(tree: Tree, empty_domains: list[str]) -> list[Left]:
    """Folders without an image below them, outermost only; empty domains are reported as such instead."""
    filled = {file.folders[:depth] for file in tree.files for depth in range(1, len(file.folders) + 1)}
    return [
        Left(shown("/".join(folders)), "a folder without images")
        for folders in tree.folders
        if folders not in filled and folders[0] not in empty_domains and (len(folders) == 1 or folders[:-1] in filled)
    ]


def _describe(groups: _Groups, domains: bool) -> str:
    inside = "<domain>/<class>/*" if domains else "<class>/*"
    places = set(groups.order)
    if groups.has_splits:
        names = "|".join(name for name in ("train", "val", "test") if name in places)
        inside = f"{names}/{inside}"
    return inside + (" and ood/<domain>/<class>/*" if "ood" in places else "")
