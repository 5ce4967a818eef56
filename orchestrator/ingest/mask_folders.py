"""Folders of pictures and masks: VOC, Cityscapes, CVAT, pairs of folders, pairs in one folder.

Pairs are made by name (`orchestrator.ingest.mask_pairs`). The folders that tell no role are a split, `ood`, and a
domain, at any level: `train/images`, `images/train`, `photo/masks`.

In this order: lists of VOC; the scan.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.ingest.errors import DataError, first_few, printable
from orchestrator.ingest.folder import EXTENSIONS, File, FolderSource, walk
from orchestrator.ingest.label_map import LABEL_FILES, LabelMap, cityscapes_map, read_label_file
from orchestrator.ingest.mask_pairs import Entry, PairedFiles, is_picture_folder, paired_files
from orchestrator.ingest.source import DEFAULT_DOMAIN, SPLIT_NAMES, Sample, SkippedEntry
from orchestrator.wording import counted, listed

LAYOUTS = (
    "images/ and masks/ with equal names (below or above folders train, val, test or of a domain), VOC's JPEGImages/ "
    "and SegmentationClass/, Cityscapes' leftImg8bit/ and gtFine/, or pairs such as 1.jpg and 1_mask.png in one folder"
)
_LIST_FOLDER = ("ImageSets", "Segmentation")


def masks_of_folder(root: Path) -> str | None:
    """The layout of pictures with masks below a folder, in words; None = its names tell of none."""
    try:
        paired = paired_files(walk(root, EXTENSIONS).files, certain=True)
    except DataError:  # names that would pair, but for a file that is there twice
        return "pairs by name"
    return None if paired is None else paired.layout


# Lists of VOC.


def _apply_lists(root: Path, paired: PairedFiles) -> dict[File, str] | None:
    """File of a picture → split of its list; None = there are no lists.

    Pictures in no list are taken out of the pairs. A list that is the union of others is no split.

    Raises:
        DataError: a listed name without picture or mask, or a name in two splits.
    """
    splits: dict[File, str] = {}
    used: set[File] = set()
    folders = sorted({_above_role(picture) for picture, _ in paired.pairs})
    lists = {folder: _lists(root.joinpath(*folder, *_LIST_FOLDER)) for folder in folders}
    if not any(lists.values()):
        return None
    for folder in folders:
        names = lists[folder]
        if not names:
            raise DataError(
                f"Either all folders of pictures have lists ({'/'.join(_LIST_FOLDER)}/*.txt) or none, but "
                f"{printable('/'.join(folder)) or 'the root'} has none."
            )
        named = {key: SPLIT_NAMES[key.casefold()] for key in names if key.casefold() in SPLIT_NAMES}
        unions = [key for key in names if key not in named and _is_union(names[key], [names[n] for n in named])]
        chosen = named if "train" in named.values() else dict.fromkeys([key for key in names if key not in unions], "")
        _list_remarks(paired, names, chosen, unions)
        _assign_lists(paired, folder, {key: names[key] for key in chosen}, chosen, splits, used)
    unlisted = [(picture, mask) for picture, mask in paired.pairs if picture.file not in used]
    without_mask = [entry for entry in paired.pictures if entry.file not in used]
    if unlisted or without_mask:
        count = len(unlisted) + len(without_mask)
        paired.remarks.append(f"{counted(count, 'picture')} in no list {'is' if count == 1 else 'are'} not used.")
    paired.others += [SkippedEntry(e.file.path, "in no list") for e in (*(p for p, _ in unlisted), *without_mask)]
    paired.others += [SkippedEntry(entry.file.path, "the mask of no listed picture") for entry in paired.masks]
    paired.pairs = [pair for pair in paired.pairs if pair[0].file in used]
    paired.pictures = [entry for entry in paired.pictures if entry.file in used]
    paired.masks = []
    return splits


def _above_role(entry: Entry) -> tuple[str, ...]:
    """Folders above the one that tells the role of a file."""
    folders = entry.file.folders
    depth = next((i for i, name in enumerate(folders) if is_picture_folder(name)), len(folders))
    return folders[:depth]


def _lists(folder: Path) -> dict[str, list[str]]:
    """Name of each list → names in it, without endings."""
    lists = {}
    for path in sorted(folder.glob("*.txt")):
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        lists[path.stem] = [_listed_name(line) for line in lines if line.strip()]
    return lists


def _listed_name(line: str) -> str:
    """The picture of a line: alone, before a flag of VOC's lists of classes, or before the path of its mask."""
    words = line.split()
    alone = len(words) == 1 or not (words[1] in ("-1", "0", "1") or _without_ending(words[1]) != words[1])
    return _without_ending(line.strip() if alone else words[0])


def _without_ending(name: str) -> str:
    """The name without the ending of an image file; a stem may have dots of its own."""
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in EXTENSIONS else name


def _is_union(names: Collection[str], others: Sequence[Collection[str]]) -> bool:
    inside = [other for other in others if set(other) <= set(names)]
    return len(inside) > 1 and set(names) == {name for other in inside for name in other}


def _list_remarks(
    paired: PairedFiles, names: Mapping[str, Sequence[str]], chosen: Mapping[str, str], unions: Sequence[str]
) -> None:
    folder = "/".join(_LIST_FOLDER)
    for union in unions:
        paired.remarks.append(f"{union}.txt is the union of other lists, and no split.")
    others = [key for key in names if key not in chosen and key not in unions]
    if others:
        paired.remarks.append(f"Lists in {folder} that name no split are not read: {first_few(others)}.")
    if not any(chosen.values()):
        paired.remarks.append(f"{listed([f'{key}.txt' for key in chosen])} names no split: splits are drawn.")


def _assign_lists(
    paired: PairedFiles,
    folder: tuple[str, ...],
    names: Mapping[str, Sequence[str]],
    chosen: Mapping[str, str],
    splits: dict[File, str],
    used: set[File],
) -> None:
    """Note the split of every listed picture of one folder."""
    entries = [entry for entry in (*(p for p, _ in paired.pairs), *paired.pictures) if _above_role(entry) == folder]
    index: dict[str, Entry] = {}
    for entry in entries:
        below = entry.file.folders[len(folder) + 1 :]
        index[entry.stem] = entry
        index["/".join((*below, entry.stem))] = entry
        index["/".join((*entry.file.folders[len(folder) :], entry.stem))] = entry
    missing = [
        f"'{name}' ({key}.txt)" for key, listed_names in names.items() for name in listed_names if name not in index
    ]
    if missing:
        raise DataError(
            f"Every name in the lists needs a picture, but {counted(len(missing), 'name')} "
            f"{'has' if len(missing) == 1 else 'have'} none: {first_few(map(printable, missing))}."
        )
    for key, listed_names in names.items():
        for name in listed_names:
            entry = index[name]
            split = chosen[key]
            if splits.get(entry.file, split) != split:
                raise DataError(
                    f"A picture lies in one split, but the lists have '{printable(name)}' in {splits[entry.file]} and "
                    f"{split}. Take it out of one of them."
                )
            used.add(entry.file)
            if split:
                splits[entry.file] = split


# The scan.


def scan_mask_folder(root: Path) -> FolderSource:
    """List pictures with their masks below a folder; no file but lists and label files is opened.

    Raises:
        DataError: no masks, pictures without masks or masks without pictures, an ambiguous layout.
    """
    tree = walk(root, EXTENSIONS)
    paired = paired_files(tree.files)
    if paired is None:
        raise DataError(
            f"Pictures and masks must lie in {LAYOUTS}, but {printable(str(root))} has "
            f"{_contents(tree.files)}. Give the pairs in a manifest instead, a CSV file with columns image and mask."
        )
    digest = hashlib.sha256()
    listed_splits = _apply_lists(root, paired)
    warnings = _leave_out_splits_without_masks(paired, listed_splits)
    _check_partners(paired)
    places = _places([picture for picture, _ in paired.pairs], listed_splits, bool(paired.cityscapes))
    samples = []
    for (picture, mask), (domain, split) in zip(paired.pairs, places, strict=True):
        for file in (picture.file, mask.file):
            digest.update(f"{file.path}\0{file.size}\0{file.modified}\n".encode("utf-8", "surrogateescape"))
        # Which mask belongs to which picture, and to which split, is decided by lists and by these names.
        digest.update(f"{split}\0{domain}\n".encode("utf-8", "surrogateescape"))
        path = picture.file.path
        samples.append(Sample(printable(path), "", domain, split, path, mask.file.path))
    label_map = _label_file(root, paired, digest.update)
    others = [SkippedEntry(printable(entry.name), entry.reason) for entry in paired.others]
    return FolderSource(
        kind="folder",
        layout=paired.layout,
        samples=samples,
        digest=digest.hexdigest(),
        evaluation_domains=_evaluation_domains(paired, places),
        ignored=sorted([*tree.ignored, *others]),
        label_map=label_map,
        remarks=paired.remarks,
        warnings=warnings,
        root=root,
    )


def _contents(files: Sequence[File]) -> str:
    if not files:
        return "no image file"
    folders = sorted({"/".join(file.folders) or "its root" for file in files})
    return f"{counted(len(files), 'image file')} in {first_few(map(printable, folders))}"


def _check_partners(paired: PairedFiles) -> None:
    """Raise DataError for pictures without masks and masks without pictures."""
    if not paired.pictures and not paired.masks:
        return
    parts = []
    for entries, lacks in ((paired.pictures, "mask"), (paired.masks, "picture")):
        if entries:
            names = first_few([f"'{printable(entry.file.name)}'" for entry in entries])
            parts.append(f"{names} {'has' if len(entries) == 1 else 'have'} no {lacks}")
    raise DataError(
        f"Every picture needs a mask of its name, and every mask a picture, but {', and '.join(parts)} "
        f"({counted(len(paired.pictures), 'picture')} and {counted(len(paired.masks), 'mask')} without a partner, "
        f"{counted(len(paired.pairs), 'pair')}). Add what is missing, or remove what has no partner."
    )


def _leave_out_splits_without_masks(paired: PairedFiles, listed_splits: Mapping[File, str] | None) -> list[str]:
    """Take pictures out whose whole split (val or test) has no masks; returns a warning for each."""

    def split_of(entry: Entry) -> str | None:
        return _split_of(entry.context) if listed_splits is None else listed_splits.get(entry.file)

    with_masks = {split_of(picture) for picture, _ in paired.pairs}
    bare = {split_of(entry) for entry in paired.pictures} - with_masks
    warnings = []
    for split in sorted(split for split in bare if split is not None and split != "train"):
        dropped = [entry for entry in paired.pictures if split_of(entry) == split]
        paired.pictures = [entry for entry in paired.pictures if split_of(entry) != split]
        reason = f"no picture of the split {split} has a mask"
        paired.others += [SkippedEntry(entry.file.path, reason) for entry in dropped]
        warnings.append(f"{counted(len(dropped), 'picture')} of the split {split} left out: none of them has a mask.")
    return warnings


def _split_of(context: Sequence[str]) -> str | None:
    return next((SPLIT_NAMES[name.casefold()] for name in context if name.casefold() in SPLIT_NAMES), None)


def _places(
    pictures: Sequence[Entry], listed_splits: Mapping[File, str] | None, cities: bool
) -> list[tuple[str, str | None]]:
    """Domain and split of each picture."""
    has_training = any(_split_of(picture.context) == "train" for picture in pictures)
    # `VOCdevkit/VOC2012` above everything is no domain; one domain alone keeps its name.
    cut = _shared_depth(pictures) if listed_splits is not None else 0
    places = []
    for picture in pictures:
        rest = list(picture.context[cut:])
        split = None
        if listed_splits is not None:
            split = listed_splits.get(picture.file) or None
        elif has_training:
            split = _split_of(rest)
            rest = _without_split(rest)
        if rest and rest[0].casefold() == "ood" and len(rest) > 1:
            rest = rest[1:]
        if cities and rest and picture.stem.startswith(f"{rest[-1]}_"):
            rest = rest[:-1]
        domain = printable(rest[0]) if rest else DEFAULT_DOMAIN
        places.append((domain, split))
    return places


def _shared_depth(pictures: Sequence[Entry]) -> int:
    """Number of leading folders that all pictures share."""
    depth = 0
    for names in zip(*(picture.context for picture in pictures), strict=False):
        if len(set(names)) > 1:
            break
        depth += 1
    return depth


def _without_split(names: list[str]) -> list[str]:
    """The names without the first that is a split."""
    for i, name in enumerate(names):
        if name.casefold() in SPLIT_NAMES:
            return names[:i] + names[i + 1 :]
    return names


def _evaluation_domains(paired: PairedFiles, places: Sequence[tuple[str, str | None]]) -> frozenset[str]:
    """Domains below a folder called ood, or called so."""
    return frozenset(
        domain
        for (picture, _), (domain, _) in zip(paired.pairs, places, strict=True)
        if any(name.casefold() == "ood" for name in picture.context)
    )


def _label_file(root: Path, paired: PairedFiles, update: Callable[[bytes], None]) -> LabelMap | None:
    """The label map beside the masks: Cityscapes' table by the names of the masks, or a label file.

    Args:
        root: of the data.
        paired: its pairs.
        update: takes the contents of label files, for the digest of the source.

    Raises:
        DataError: a label file that cannot be read, or several that differ.
    """
    if paired.cityscapes is not None:
        return cityscapes_map(paired.cityscapes == "labelTrainIds")
    folders = {file.folders[:depth] for _, (_, _, file) in paired.pairs for depth in range(len(file.folders) + 1)}
    files = [
        (folder, name) for folder in sorted(folders) for name in LABEL_FILES if root.joinpath(*folder, name).is_file()
    ]
    maps = []
    for folder, name in files:
        origin = printable("/".join((*folder, name)))
        maps.append(read_label_file(root.joinpath(*folder, name), origin))
        update(root.joinpath(*folder, name).read_bytes())
    if not maps:
        return None
    first = maps[0]
    for other in maps[1:]:
        if replace(other, origin=first.origin) != first:
            raise DataError(
                f"The label files beside the masks must agree, but {first.origin} and {other.origin} differ. Remove "
                "one, or name the one to use in data.labels."
            )
    return first
