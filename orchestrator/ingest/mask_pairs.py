"""Pairs of pictures and masks among the files of a folder, by name.

Of every file the folder names that tell its role (`images`, `masks`, `JPEGImages`, …) are taken away, and of its own
name what only tells the role (`_leftImg8bit`, `_mask`); picture and mask agree in the rest.

In this order: roles of folders; names; the pairing.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from orchestrator.ingest.errors import DataError, printable
from orchestrator.ingest.folder import File
from orchestrator.ingest.source import SPLIT_NAMES, SkippedEntry
from orchestrator.wording import listed

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
            if role != "instance":
                role = "mask" if masks else "picture"
            rest += [split for split in match.groups() if split]
        else:
            rest.append(name)
            if folders[:depth] in bare_splits:
                role = role or "picture"
    return role, tuple(rest)


def is_picture_folder(name: str) -> bool:
    """Whether a folder of this name holds pictures."""
    return _PICTURES.fullmatch(name) is not None


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
    kind = f"_{paired.cityscapes}" if paired.cityscapes else ""
    paired.layout = f"{folders[0]}/*{ends[0]} with {folders[1]}/*{ends[1]}{kind}"
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
        if match is None:
            kinds[""].append(entry)
        else:
            kinds[match.group(2)].append(entry._replace(stem=match.group(1)))
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
