"""Folders of pictures and masks: VOC, Cityscapes, CVAT, pairs of folders, pairs in one folder.

Pairs are made by name: of every file the folder names that tell its role (`images`, `masks`, `JPEGImages`, …) are taken
away, and of its own name what only tells the role (`_leftImg8bit`, `_mask`); picture and mask agree in the rest. The
folders that remain are a split, `ood`, and a domain, at any level: `train/images`, `images/train`, `photo/masks`.

In this order: roles of folders; names; the pairing; lists of VOC; the scan.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from orchestrator.ingest.errors import DataError, first_few, printable
from orchestrator.ingest.folder import EXTENSIONS, File, FolderSource, walk
from orchestrator.ingest.label_map import LABEL_FILES, LabelMap, cityscapes_map, read_label_file
from orchestrator.ingest.source import DEFAULT_DOMAIN, SPLIT_NAMES, Sample, SkippedEntry
from orchestrator.wording import counted, listed

LAYOUTS = (
    "images/ and masks/ with equal names (below or above folders train, val, test or of a domain), VOC's JPEGImages/ "
    "and SegmentationClass/, Cityscapes' leftImg8bit/ and gtFine/, or pairs such as 1.jpg and 1_mask.png in one folder"
)

_SPLIT = "|".join(SPLIT_NAMES)
_PICTURES = re.compile(
    rf"(?i)(?:({_SPLIT})[_-]?)?(?:images?|imgs?|jpegimages|pictures?|leftimg8bit(?:_trainvaltest)?|inputs?)"
    rf"(?:[_-]?({_SPLIT}))?"
)
_MASKS = re.compile(
    rf"(?i)(?:({_SPLIT})[_-]?)?(?:masks?|labels?|annot(?:ation)?s?|segmentationclass|segmentations?|"
    rf"segmentation_masks?|gtfine(?:_trainvaltest)?|gtcoarse|gts?|ground_?truths?|trimaps?)(?:[_-]?({_SPLIT}))?"
)
_INSTANCES = frozenset({"segmentationobject"})
"""Folders beside the masks that number objects, not classes."""

_CITYSCAPES = re.compile(r"^(.+)_gt(?:Fine|Coarse)_(labelIds|labelTrainIds|instanceIds|instanceTrainIds|color)$")
_LIST_FOLDER = ("ImageSets", "Segmentation")

_SEPARATORS = "_-. "
_MASK_WORDS = re.compile(
    r"(?i)^(?:masks?|labels?|seg|segm|segmentation|gt|groundtruth|ground_truth|annotation|annot|anno|labelids)$"
)
"""Ends and beginnings of names that tell a mask, without separators."""
_PICTURE_AFFIXES = ("_image", "_img", "_rgb", "_sat", "_leftImg8bit", "image_", "img_", "im_")
_MASK_PREFIXES = ("mask_", "label_", "seg_", "gt_", "annotation_")
ONE_FOLDER_SHARE = 0.8
"""Share of the files of a folder that are pairs by name, above which the folder holds masks beside pictures."""


class Affix(NamedTuple):
    """What a name has beside the part that picture and mask share."""

    prefix: str = ""
    suffix: str = ""

    def strip(self, stem: str) -> str | None:
        """The stem without the affix; None = it does not have it."""
        if len(stem) <= len(self.prefix) + len(self.suffix):
            return None
        if not (stem.startswith(self.prefix) and stem.endswith(self.suffix)):
            return None
        return stem[len(self.prefix) : len(stem) - len(self.suffix)]

    def __str__(self) -> str:
        return self.prefix or self.suffix


class Entry(NamedTuple):
    """A file with the folders that tell no role."""

    context: tuple[str, ...]
    stem: str
    file: File


@dataclass
class PairedFiles:
    """Pictures and masks of a folder, paired by name."""

    pairs: list[tuple[Entry, Entry]] = field(default_factory=list)
    pictures: list[Entry] = field(default_factory=list)
    """Without a mask."""
    masks: list[Entry] = field(default_factory=list)
    """Without a picture."""
    others: list[SkippedEntry] = field(default_factory=list)
    layout: str = ""
    remarks: list[str] = field(default_factory=list)
    cityscapes: str | None = None
    """`labelIds` or `labelTrainIds`, where the masks are named so."""


# Roles of folders.


def _role(folders: Sequence[str], bare_splits: Collection[tuple[str, ...]]) -> tuple[str, tuple[str, ...]]:
    """`picture`, `mask`, `instance` or nothing, and the folders that tell no role.

    Args:
        folders: of a file, from the root down.
        bare_splits: folders called after a split that hold pictures because masks lie beside them (`train` beside
            `train_labels` or `trainannot`).
    """
    role = ""
    rest: list[str] = []
    for depth, name in enumerate(folders, 1):
        pictures = _PICTURES.fullmatch(name)
        masks = _MASKS.fullmatch(name)
        if name.casefold() in _INSTANCES:
            role = "instance"
        elif pictures or masks:
            match = masks or pictures
            assert match is not None
            # Of `images/masks/1.png` the inner folder counts; objects are no classes wherever they lie.
            role = role if role == "instance" else ("mask" if masks else "picture")
            rest += [split for split in match.groups() if split]
        else:
            rest.append(name)
            if folders[:depth] in bare_splits:
                role = role or "picture"
    return role, tuple(rest)


def _bare_splits(files: Iterable[File]) -> set[tuple[str, ...]]:
    """Folders `…/train` beside a folder `…/train_masks`."""
    folders = {file.folders[:depth] for file in files for depth in range(1, len(file.folders) + 1)}
    beside = set()
    for path in folders:
        match = _MASKS.fullmatch(path[-1])
        split = match and (match.group(1) or match.group(2))
        if split:
            beside.add((*path[:-1], split))
    return folders & beside


def _by_role(files: Sequence[File]) -> dict[str, list[Entry]]:
    bare = _bare_splits(files)
    roles: dict[str, list[Entry]] = defaultdict(list)
    for file in files:
        role, context = _role(file.folders, bare)
        roles[role].append(Entry(context, os.path.splitext(file.name)[0], file))
    return roles


# Names.


def _affixes(pictures: Sequence[Entry], masks: Sequence[Entry]) -> tuple[Affix, Affix]:
    """The affixes of pictures and masks that pair most files; the shortest of them."""
    of_pictures = [Affix()] + [_affix(text) for text in _PICTURE_AFFIXES]
    of_masks = [Affix()] + [_affix(text) for text in (*_PICTURE_AFFIXES, *_MASK_PREFIXES, *_suffixes(pictures, masks))]
    cores = {affix: _cores(pictures, affix) for affix in of_pictures}
    best = (Affix(), Affix())
    most = 0
    for mask_affix in dict.fromkeys(of_masks):
        mask_cores = _cores(masks, mask_affix)
        for affix in of_pictures:
            count = len(cores[affix] & mask_cores)
            # Strictly more: names that agree as they are stay as they are.
            if count > most:
                best = (affix, mask_affix)
                most = count
    return best


def _affix(text: str) -> Affix:
    return Affix(suffix=text) if text[0] in _SEPARATORS else Affix(prefix=text)


def _cores(entries: Iterable[Entry], affix: Affix) -> set[tuple[tuple[str, ...], str]]:
    stripped = ((entry.context, affix.strip(entry.stem)) for entry in entries)
    return {(context, core) for context, core in stripped if core is not None}


def _suffixes(pictures: Sequence[Entry], masks: Sequence[Entry]) -> list[str]:
    """Ends of names of masks that follow the name of a picture, the most frequent ones."""
    stems = {(entry.context, core) for entry in pictures for core in (entry.stem, _without_picture_affix(entry.stem))}
    ends: Counter[str] = Counter()
    for mask in masks:
        for cut in range(len(mask.stem) - 1, 0, -1):
            # The longest name: `img_1_2_mask` belongs to `img_1_2`, not to `img_1`.
            if mask.stem[cut] in _SEPARATORS and (mask.context, mask.stem[:cut]) in stems:
                ends[mask.stem[cut:]] += 1
                break
    return [end for end, _ in ends.most_common(3)]


def _without_picture_affix(stem: str) -> str:
    cores = (_affix(text).strip(stem) for text in _PICTURE_AFFIXES)
    return next((core for core in cores if core is not None), stem)


# The pairing.


def paired_files(files: Sequence[File], certain: bool = False) -> PairedFiles | None:
    """Pictures and masks among the files of a folder.

    Args:
        files: sorted by path.
        certain: only where names leave no doubt, because nobody has asked for masks.

    Returns:
        None = there are no masks.

    Raises:
        DataError: two pictures or two masks of one name.
    """
    roles = _by_role(files)
    if roles["picture"] and roles["mask"]:
        paired = _pairs_of_folders(roles["picture"], roles["mask"])
        if certain and 2 * len(paired.pairs) < len(paired.masks) + len(paired.pairs):
            return None
        if paired.pairs or not certain:
            paired.others += [
                SkippedEntry(entry.file.path, "numbers of objects (SegmentationObject), not classes")
                for entry in roles["instance"]
            ]
            paired.others += [
                SkippedEntry(entry.file.path, "neither in a folder of pictures nor in one of masks")
                for entry in roles[""]
            ]
            if roles["instance"]:
                paired.remarks.append("SegmentationObject, which numbers objects, is not read.")
            return paired
    entries = sorted((entry for group in roles.values() for entry in group), key=lambda entry: entry.file)
    return _pairs_in_one_folder(entries, certain)


def _pairs_of_folders(pictures: Sequence[Entry], masks: Sequence[Entry]) -> PairedFiles:
    paired = PairedFiles()
    masks = _cityscapes_masks(masks, paired)
    picture_affix, mask_affix = _affixes(pictures, masks)
    _pair(paired, pictures, masks, picture_affix, mask_affix)
    folders = [Counter(_role_folder(entry) for entry in entries).most_common(1)[0][0] for entries in (pictures, masks)]
    ends = [str(affix) for affix in (picture_affix, mask_affix)]
    paired.layout = f"{folders[0]}/*{ends[0]} with {folders[1]}/*{ends[1]}"
    if mask_affix != Affix() or picture_affix != Affix():
        names = " and ".join(f"'{end}' of {what}" for end, what in zip(ends, ("pictures", "masks"), strict=True) if end)
        paired.remarks.append(f"Pairs are made by name without {names}.")
    return paired


def _role_folder(entry: Entry) -> str:
    """The name of the folder that tells the role, in the writing of the data."""
    names = [name for name in entry.file.folders if name not in entry.context]
    return printable(names[-1] if names else entry.file.folders[-1])


def _cityscapes_masks(masks: Sequence[Entry], paired: PairedFiles) -> list[Entry]:
    """Of several files for a picture, the one with class ids, named without the kind of file."""
    kinds: dict[str, list[Entry]] = defaultdict(list)
    for entry in masks:
        match = _CITYSCAPES.match(entry.stem)
        kinds[match.group(2) if match else ""].append(entry._replace(stem=match.group(1) if match else entry.stem))
    chosen = next((kind for kind in ("labelIds", "labelTrainIds") if kinds.get(kind)), None)
    if chosen is None or len(kinds[""]) > len(kinds[chosen]):
        return list(masks)
    paired.cityscapes = chosen
    others = sorted(kind for kind in kinds if kind not in ("", chosen))
    for kind in others:
        paired.others += [SkippedEntry(entry.file.path, f"{kind} beside {chosen}") for entry in kinds[kind]]
    not_read = f"; {listed(others)} are not read" if others else ""
    paired.remarks.append(f"Of the files of a picture *_{chosen} is its mask{not_read}.")
    return sorted([*kinds[""], *kinds[chosen]], key=lambda entry: entry.file)


def _pair(
    paired: PairedFiles, pictures: Sequence[Entry], masks: Sequence[Entry], picture_affix: Affix, mask_affix: Affix
) -> None:
    """Add pairs and what has no partner."""
    by_core = _by_core(masks, mask_affix, "masks")
    of_pictures = _by_core(pictures, picture_affix, "pictures")
    for entry in pictures:
        core = picture_affix.strip(entry.stem)
        mask = by_core.get((entry.context, core)) if core is not None else None
        if mask is None:
            paired.pictures.append(entry)
        else:
            paired.pairs.append((entry, mask))
    paired.masks += [
        entry for entry in masks if (entry.context, mask_affix.strip(entry.stem)) not in of_pictures
    ]  # fmt: skip


def _by_core(entries: Iterable[Entry], affix: Affix, what: str) -> dict[tuple[tuple[str, ...], str | None], Entry]:
    index: dict[tuple[tuple[str, ...], str | None], Entry] = {}
    for entry in entries:
        core = affix.strip(entry.stem)
        if core is None:
            continue
        other = index.setdefault((entry.context, core), entry)
        if other is not entry:
            raise DataError(
                f"Pictures and masks are paired by name, but there are two {what} of one name: "
                f"'{printable(other.file.path)}' and '{printable(entry.file.path)}'. Remove one of them."
            )
    return index


def _pairs_in_one_folder(entries: Sequence[Entry], certain: bool) -> PairedFiles | None:
    """Masks beside their pictures, told by the end of their names, or by their format."""
    in_folders = [entry._replace(context=entry.file.folders) for entry in entries]
    ends = _suffixes(in_folders, in_folders)
    words = [end for end in ends if _is_mask_word(end, in_folders)]
    # `123_mask` and `123_sat` both follow the name 123: the usual word for masks comes first.
    suffix = next(iter(words if certain else [*words, *ends]), None)
    masks: list[Entry] = []
    how = ""
    if suffix is not None:
        masks = [entry for entry in in_folders if entry.stem.endswith(suffix)]
        how = f"*{suffix}"
    if len(masks) * 2 < ONE_FOLDER_SHARE * len(in_folders) and not certain:
        suffix = ""
        masks = _png_beside_jpeg(in_folders)
        how = "*.png beside *.jpg"
    if not masks or len(masks) * 2 < ONE_FOLDER_SHARE * len(in_folders):
        return None
    mask_files = {entry.file for entry in masks}
    pictures = [entry for entry in in_folders if entry.file not in mask_files]
    bare = _bare_splits([entry.file for entry in entries])

    def without_roles(entry: Entry) -> Entry:
        return entry._replace(context=_role(entry.file.folders, bare)[1])

    paired = PairedFiles(layout=f"pictures and masks in one folder ({how})")
    pictures = [without_roles(entry) for entry in pictures]
    masks = [without_roles(entry) for entry in masks]
    _pair(paired, pictures, masks, *_affixes(pictures, masks))
    if 2 * len(paired.pairs) < ONE_FOLDER_SHARE * len(in_folders):
        return None
    paired.remarks.append(f"Masks lie beside their pictures and are told by their names ({how}).")
    return paired


def _is_mask_word(end: str, entries: Sequence[Entry]) -> bool:
    word = end.strip(_SEPARATORS)
    if word == "L":
        # CamVid's masks; of photographs `_L.jpg` is a larger copy.
        return all(entry.file.name.lower().endswith(".png") for entry in entries if entry.stem.endswith(end))
    return bool(_MASK_WORDS.fullmatch(word))


def _png_beside_jpeg(entries: Sequence[Entry]) -> list[Entry]:
    """PNG files with the name of a JPEG in the same folder."""
    jpeg = {
        (entry.context, entry.stem)
        for entry in entries
        if os.path.splitext(entry.file.name)[1].lower() in (".jpg", ".jpeg")
    }
    return [
        entry
        for entry in entries
        if entry.file.name.lower().endswith(".png") and (entry.context, entry.stem) in jpeg
    ]  # fmt: skip


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
    depth = next((i for i, name in enumerate(folders) if _PICTURES.fullmatch(name)), len(folders))
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
