"""Image folders: `root/<domain>/<class>/*`, `root/<class>/*`, `root/train|val|test/…`, `root/ood/<domain>/<class>/*`.

In this order: the walk over a folder, which lists every file once; domains, classes and splits from the folder names.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.ingest.errors import DataError, first_few, printable
from orchestrator.ingest.source import DEFAULT_DOMAIN, SPLIT_NAMES, EncodedSource, Sample, SkippedEntry

EXTENSIONS = frozenset(
    f".{extension}"
    for extension in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm"),
        # Formats that will be refused: as samples they are quarantined with a reason, instead of being skipped.
        *("eps", "ps", "svg", "heic", "heif", "avif", "jp2", "jxl", "psd", "tga", "ico", "raw", "dng", "cr2", "nef"),
    )
)
"""Files with these endings are samples; their format is recognised by content."""

LAYOUTS = (
    "<domain>/<class>/<image>, <class>/<image>, train|val|test/<class>/<image>, and beside any of them "
    "ood/<domain>/<class>/<image>"
)
MAX_DEPTH = 6
"""Folders below the root; deeper ones are listed as skipped."""
NO_IMAGE = "no image file by its extension"

_CHUNK = 64
"""Images per request to a decoder process."""


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
    """Contents of a folder."""

    files: list[File] = field(default_factory=list)
    """Sorted by path."""
    folders: list[tuple[str, ...]] = field(default_factory=list)
    """Folders that were entered, sorted, without the root."""
    ignored: list[SkippedEntry] = field(default_factory=list)


def walk(root: Path, suffixes: frozenset[str]) -> Tree:
    """List the files with one of `suffixes` (lower case, with the dot), each once.

    Hidden and special files are listed as skipped, and so is a link back into the root: its target is read where it
    lies. Links to the outside are followed, each folder once.

    Raises:
        DataError: a folder that this user may not read.
    """
    tree = Tree()
    real_root = os.path.realpath(root)
    entered = set[tuple[int, int]]()
    pending: list[tuple[str, ...]] = [()]
    while pending:
        folders = pending.pop()
        path = os.path.join(root, *folders)
        # Device and inode identify a folder whatever path leads to it, so that links cannot form a loop.
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in entered:
            tree.ignored.append(SkippedEntry(_joined(folders), "a folder that was already read"))
            continue
        entered.add((status.st_dev, status.st_ino))
        if folders:
            tree.folders.append(folders)
        pending += _list_folder(tree, real_root, path, folders, suffixes)
    # Sorted: the order of a directory differs between file systems, and seeds draw by position.
    tree.files.sort()
    tree.folders.sort()
    tree.ignored.sort()
    return tree


def _list_folder(
    tree: Tree, real_root: str, path: str, folders: tuple[str, ...], suffixes: frozenset[str]
) -> list[tuple[str, ...]]:
    """Add one folder's entries to the tree; returns the folders to enter.

    They become files or skipped entries.
    """
    to_enter = []
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name, reverse=True)
    except PermissionError as error:
        raise DataError(f"Data must be readable, but this user has no permission to read {printable(path)}.") from error
    for entry in entries:
        reason = _reason_to_skip(entry, real_root, suffixes)
        entry_path = (*folders, entry.name)
        if reason is None and entry.is_dir():
            if len(entry_path) <= MAX_DEPTH:
                to_enter.append(entry_path)
                continue
            reason = f"more than {MAX_DEPTH} folders below the root"
        if reason is not None:
            tree.ignored.append(SkippedEntry(_joined(entry_path), reason))
        else:
            status = entry.stat()
            tree.files.append(File(folders, entry.name, status.st_size, status.st_mtime_ns))
    return to_enter


def _reason_to_skip(entry: os.DirEntry[str], real_root: str, suffixes: frozenset[str]) -> str | None:
    """Why an entry is skipped.

    None = a folder, or a file with one of the suffixes.
    """
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_symlink():
        try:
            entry.stat()
        except OSError:
            return "a broken link"
        target = os.path.realpath(entry.path)
        if target == real_root or target.startswith(real_root + os.sep):
            return f"a link to {printable(os.path.relpath(target, real_root))}, which is read there"
    if entry.is_dir():
        return None
    if not stat.S_ISREG(entry.stat().st_mode):
        return "a special file (pipe, socket or device)"
    if os.path.splitext(entry.name)[1].lower() not in suffixes:
        return NO_IMAGE
    return None


def _joined(path: Sequence[str]) -> str:
    return printable("/".join(path))


@dataclass
class FolderSource(EncodedSource):
    """Images in folders; `Sample.location` is the path below `root`."""

    root: Path = Path()

    def chunks(self, positions: Sequence[int]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        for start in range(0, len(positions), _CHUNK):
            yield {"reader": "files", "root": str(self.root)}, list(positions[start : start + _CHUNK])


class _Placed(NamedTuple):
    """A file with the role of its top folder."""

    role: str
    """`train`, `val`, `test` or `ood`; `plain` = the top folder is a domain or class."""
    folders: tuple[str, ...]
    """Folder names below the role: (class,) or (domain, class)."""
    file: File


def scan_folder(root: Path) -> FolderSource:
    """List the images below a folder, with domains, classes and splits from the folder names.

    Raises:
        DataError: no images, images without a class folder, or an ambiguous layout.
    """
    tree = walk(root, EXTENSIONS)
    digest = hashlib.sha256()
    for file in tree.files:
        # Sizes and times, not contents: the scan reads no image.
        digest.update(f"{file.path}\0{file.size}\0{file.modified}\n".encode("utf-8", "surrogateescape"))
    placed = _place_files(root, tree)
    has_domains = _has_domains(root, placed)
    samples = [_sample(entry, has_domains) for entry in placed]
    _check_ood_domains(placed, samples)
    empty_domains = _empty_domains(tree, placed, has_domains)
    return FolderSource(
        kind="folder",
        layout=_describe_layout(placed, has_domains),
        samples=samples,
        digest=digest.hexdigest(),
        evaluation_domains=frozenset(
            sample.domain
            for sample, entry in zip(samples, placed, strict=True)
            if entry.role == "ood" or sample.domain.casefold() == "ood"
        ),
        empty_domains=tuple(map(printable, empty_domains)),
        ignored=sorted([*tree.ignored, *_files_without_class(tree), *_empty_folders(tree, empty_domains)]),
        root=root,
    )


def _place_files(root: Path, tree: Tree) -> list[_Placed]:
    """The files that lie in folders, each with the role of its top folder."""
    in_folders = [file for file in tree.files if file.folders]
    if not in_folders:
        raise _no_images(root, tree)
    roles = _roles_of_top_folders(in_folders)
    if "train" in roles.values() and "plain" in roles.values():
        others = [top for top, role in roles.items() if role == "plain"]
        raise DataError(
            f"Beside train, val and test there may only be ood/<domain>/<class>, but {printable(str(root))} also has "
            f"images in {first_few(map(printable, others))}. Move them away, or into ood/."
        )
    placed = []
    for file in in_folders:
        role = roles[file.folders[0]]
        folders = file.folders if role == "plain" else file.folders[1:]
        placed.append(_Placed(role, folders, file))
    return placed


def _no_images(root: Path, tree: Tree) -> DataError:
    if tree.files:
        problem = "they lie directly in the root"
    else:
        problem = "there is none"
        others = sorted(entry.name for entry in tree.ignored if entry.reason == NO_IMAGE)
        if others:
            problem += f", only {first_few(others)}"
    return DataError(
        f"Images must lie in folders named after their classes, but in {printable(str(root))} {problem}. "
        f"The layouts understood are {LAYOUTS}."
    )


def _roles_of_top_folders(files: Collection[File]) -> dict[str, str]:
    """Top folder → role.

    Folders called val or test are splits only beside one for training.
    """
    tops = sorted({file.folders[0] for file in files})
    splits = {top: SPLIT_NAMES[top.casefold()] for top in tops if top.casefold() in SPLIT_NAMES}
    if "train" not in splits.values():
        splits = {}
    # `ood/<class>/<image>` is a domain called ood; `ood/<domain>/<class>/<image>` is a folder of OOD domains.
    ood_depths = [len(file.folders) for file in files if file.folders[0].casefold() == "ood"]
    has_ood_domains = min(ood_depths, default=0) >= 3
    roles = {}
    for top in tops:
        if top.casefold() == "ood" and has_ood_domains:
            roles[top] = "ood"
        else:
            roles[top] = splits.get(top, "plain")
    return roles


def _has_domains(root: Path, placed: Collection[_Placed]) -> bool:
    """Whether the ID files lie in `<domain>/<class>` rather than in `<class>`."""
    id_depths = {len(entry.folders): entry.file for entry in placed if entry.role != "ood"}
    ood_depths = {len(entry.folders): entry.file for entry in placed if entry.role == "ood"}
    if set(id_depths) not in ({1}, {2}) or not set(ood_depths) <= {2}:
        examples = [printable(file.path) for file in (*id_depths.values(), *ood_depths.values())]
        raise DataError(
            f"All images must lie equally deep, as {LAYOUTS}, but in {printable(str(root))} there are "
            f"{first_few(examples)}."
        )
    return set(id_depths) == {2}


def _sample(entry: _Placed, has_domains: bool) -> Sample:
    domain = DEFAULT_DOMAIN
    if entry.role == "ood" or has_domains:
        domain = printable(entry.folders[0])
    split = entry.role if entry.role in ("train", "val", "test") else None
    path = entry.file.path
    return Sample(printable(path), printable(entry.folders[-1]), domain, split, path)


def _check_ood_domains(placed: Sequence[_Placed], samples: Sequence[Sample]) -> None:
    pairs = list(zip(samples, placed, strict=True))
    in_ood = {sample.domain for sample, entry in pairs if entry.role == "ood"}
    beside_ood = {sample.domain for sample, entry in pairs if entry.role != "ood"}
    both = sorted(in_ood & beside_ood)
    if both:
        raise DataError(f"A domain lies either in ood/ or beside it, but {first_few(both)} lies in both places.")


def _empty_domains(tree: Tree, placed: Collection[_Placed], has_domains: bool) -> list[str]:
    """Top folders without images, where top folders are domains."""
    if not has_domains or any(entry.role == "train" for entry in placed):
        return []
    filled = {entry.file.folders[0] for entry in placed}
    return [folders[0] for folders in tree.folders if len(folders) == 1 and folders[0] not in filled]


def _files_without_class(tree: Tree) -> list[SkippedEntry]:
    reason = "directly in the root, so it has no class"
    return [SkippedEntry(printable(file.name), reason) for file in tree.files if not file.folders]


def _empty_folders(tree: Tree, empty_domains: list[str]) -> list[SkippedEntry]:
    """Folders without an image below them, outermost only; empty domains are reported as such instead."""
    filled = {file.folders[:depth] for file in tree.files for depth in range(1, len(file.folders) + 1)}
    return [
        SkippedEntry(_joined(folders), "a folder without images")
        for folders in tree.folders
        if folders not in filled and folders[0] not in empty_domains and (len(folders) == 1 or folders[:-1] in filled)
    ]


def _describe_layout(placed: Collection[_Placed], has_domains: bool) -> str:
    layout = "<domain>/<class>/*" if has_domains else "<class>/*"
    roles = {entry.role for entry in placed}
    if "train" in roles:
        splits = "|".join(split for split in ("train", "val", "test") if split in roles)
        layout = f"{splits}/{layout}"
    if "ood" in roles:
        layout += " and ood/<domain>/<class>/*"
    return layout
