"""Label maps: which values or colours of masks are which class, and which are ignored.

A map is declared in the study (`data.labels`), found in a file beside the masks, or the published table of a data set.
In this order: the map; maps from declared values; maps from files; Cityscapes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import did_you_mean
from orchestrator.ingest.errors import DataError, first_few, printable

MASK_SOURCES = ("folder", "parquet", "manifest", "digits_scenes")
"""Kinds of source that may hold pictures with masks."""
MAX_CLASSES = 255
"""Classes of a store with masks: indices 0 to 254, 255 is ignored."""
IGNORED_NAMES = frozenset({"ignore", "ignored", "void"})
"""Names in label files of what is no class."""
MAX_FILE_BYTES = 2**20
"""Maximum size of a label file."""

Declared = Mapping[str, "int | str | Sequence[int | str]"]
"""Class name → its value, its colour (`#rrggbb` or `r,g,b`), or several of them."""


@dataclass(frozen=True)
class LabelMap:
    """Meaning of the values and colours of masks."""

    classes: tuple[str, ...]
    """Names, by class index."""
    values: Mapping[int, int | None] = field(default_factory=dict)
    """Value of an index mask → class index; None = ignored."""
    colours: Mapping[int, int | None] = field(default_factory=dict)
    """Colour as 0xRRGGBB → class index; None = ignored."""
    origin: str = "data.labels"
    """Where it stands, in words."""


def colour_text(colour: int) -> str:
    """Red, green and blue of 0xRRGGBB.

    Example:
        >>> colour_text(0x307020)
        '48,112,32'
    """
    return f"{colour >> 16},{colour >> 8 & 255},{colour & 255}"


def parse_raw(text: int | str) -> tuple[bool, int]:
    """Whether a declared value is a colour, and the value or 0xRRGGBB.

    Raises:
        DataError: neither an integer from 0 nor a colour.

    Example:
        >>> parse_raw(7), parse_raw("48,112,32") == parse_raw("#307020") == (True, 0x307020)
        ((False, 7), True)
    """
    if isinstance(text, int):
        if not isinstance(text, bool) and 0 <= text < 2**16:
            return False, text
    elif re.fullmatch(r"#[0-9a-fA-F]{6}", text.strip()):
        return True, int(text.strip()[1:], 16)
    else:
        parts = [part.strip() for part in text.split(",")]
        if all(part.isdecimal() for part in parts):
            numbers = [int(part) for part in parts]
            if len(numbers) == 3 and max(numbers) < 256:
                return True, numbers[0] << 16 | numbers[1] << 8 | numbers[2]
            if len(numbers) == 1 and numbers[0] < 2**16:
                return False, numbers[0]
    raise DataError(
        f"A value of masks is an integer from 0 to {2**16 - 1} or a colour such as '48,112,32' or '#307020', but got "
        f"{text!r:.80}."
    )


def declared_map(labels: Declared, origin: str = "data.labels") -> LabelMap:
    """The map of class names with their values and colours; classes keep their order.

    Raises:
        DataError: a value of two classes, no value, too many classes.
    """
    names = [printable(name) for name in labels]
    raw_values = [[entry] if isinstance(entry, int | str) else list(entry) for entry in labels.values()]
    return _map_of(list(zip(names, raw_values, strict=True)), origin)


def _map_of(entries: Sequence[tuple[str, Sequence[int | str]]], origin: str, ignored: Sequence[str] = ()) -> LabelMap:
    """The map of (name, values) in the order of the classes; values of `ignored` names are no class."""
    classes = [name for name, _ in entries if name not in ignored]
    if len(classes) > MAX_CLASSES:
        raise DataError(f"Masks may have at most {MAX_CLASSES} classes, but {origin} has {len(classes)}.")
    index = {name: i for i, name in enumerate(classes)}
    if len(index) < len(classes):
        twice = sorted({name for name in classes if classes.count(name) > 1})
        raise DataError(f"Every class stands once in {origin}, but {first_few(twice)} is there twice.")
    values: dict[int, int | None] = {}
    colours: dict[int, int | None] = {}
    names_of: dict[tuple[bool, int], str] = {}
    for name, raw_values in entries:
        if not raw_values:
            raise DataError(f"Every class of {origin} needs a value or a colour, but {name} has none.")
        for raw in raw_values:
            key = parse_raw(raw)
            if names_of.setdefault(key, name) != name:
                raise DataError(
                    f"A value of masks is one class, but in {origin} {raw} is both {names_of[key]} and {name}."
                )
            is_colour, value = key
            (colours if is_colour else values)[value] = index.get(name)
    return LabelMap(tuple(classes), values, colours, origin)


def read_label_file(path: Path, origin: str) -> LabelMap:
    """The map of a label file, recognised by its name; classes are in the order of their names.

    - `labelmap.txt` of CVAT: `name:r,g,b:parts:actions` a line, `#` begins a comment;
    - `class_dict.csv`: columns name, r, g, b;
    - `_classes.csv` of Roboflow: columns Pixel Value, Class;
    - `label_colors.txt` of CamVid: `r g b name` a line.

    Other text files are read as one of these by their content. By name, because exports of one project list their
    classes in different orders.

    Raises:
        DataError: not readable, or none of these formats.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"A label file has at most {MAX_FILE_BYTES // 2**20} MiB, but {origin} is larger.")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The label file {origin} must be readable text, but it is not: {error}.") from error
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    for parse in (_cvat_lines, _csv_rows, _camvid_lines):
        entries = parse(lines)
        if entries:
            named = sorted((printable(name), values) for name, values in entries)
            ignored = [name for name, _ in named if name.casefold() in IGNORED_NAMES]
            return _map_of(named, origin, ignored)
    raise DataError(
        f"A label file has lines such as 'cat:48,112,32::' (CVAT), or columns name, r, g, b, but {origin} has "
        f"{lines[0] if lines else 'none'!r:.80}."
    )


LABEL_FILES = ("labelmap.txt", "class_dict.csv", "_classes.csv", "label_colors.txt")
"""Names under which a label file beside the masks is recognised."""


def _cvat_lines(lines: Sequence[str]) -> list[tuple[str, list[int | str]]] | None:
    entries: list[tuple[str, list[int | str]]] = []
    for line in lines:
        match = re.fullmatch(r"(.+?):(\d{1,3},\s*\d{1,3},\s*\d{1,3}):.*", line)
        if match is None:
            return None
        entries.append((match.group(1), [match.group(2)]))
    return entries


def _csv_rows(lines: Sequence[str]) -> list[tuple[str, list[int | str]]] | None:
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO("\n".join(lines)))]
    if not rows:
        return None
    header = [cell.casefold() for cell in rows[0]]
    entries: list[tuple[str, list[int | str]]] = []
    for row in rows[1:]:
        cells = dict(zip(header, row, strict=False))
        if {"name", "r", "g", "b"} <= cells.keys():
            entries.append((cells["name"], [f"{cells['r']},{cells['g']},{cells['b']}"]))
        elif {"pixel value", "class"} <= cells.keys() and cells["pixel value"].isdecimal():
            entries.append((cells["class"], [int(cells["pixel value"])]))
        else:
            return None
    return entries


def _camvid_lines(lines: Sequence[str]) -> list[tuple[str, list[int | str]]] | None:
    entries: list[tuple[str, list[int | str]]] = []
    for line in lines:
        match = re.fullmatch(r"(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})\s+(.+)", line)
        if match is None:
            return None
        red, green, blue, name = match.groups()
        entries.append((name, [f"{red},{green},{blue}"]))
    return entries


_CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
"""Train class → label id (Cordts et al., 2016, "The Cityscapes Dataset for Semantic Urban Scene Understanding")."""


def cityscapes_map(train_ids: bool = False) -> LabelMap:
    """The 19 train classes of Cityscapes.

    Args:
        train_ids: the masks hold train ids 0 to 18 and 255; otherwise label ids, of which 15 are ignored.
    """
    classes = tuple(_CITYSCAPES)
    if train_ids:
        values: dict[int, int | None] = dict(enumerate(range(len(classes))))
        return LabelMap(classes, {**values, 255: None}, origin="Cityscapes' train ids")
    values = dict.fromkeys(range(34))
    values.update({label: i for i, label in enumerate(_CITYSCAPES.values())})
    # The licence plate has the label id -1, which a file of bytes holds as 255.
    return LabelMap(classes, {**values, 255: None}, origin="Cityscapes' table of label ids")


BUILT_IN = {"cityscapes": cityscapes_map(), "cityscapes-train-ids": cityscapes_map(train_ids=True)}
"""Published tables by name, for `data.labels`."""


def map_named(name: str) -> LabelMap:
    """A published table, or the map of a label file.

    Raises:
        DataError: neither.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(
            f"data.labels is a map, a label file or one of {', '.join(BUILT_IN)}, but there is no file "
            f"{printable(name)}.{did_you_mean(name, BUILT_IN)}"
        )
    return read_label_file(path, printable(path.name))


@dataclass(frozen=True)
class MaskRequest:
    """What the values of masks mean, as far as the study declares it."""

    labels: LabelMap | None = None
    """Classes and their values; None = those found beside the masks, else a class per value."""
    ignore: tuple[int | str, ...] | None = None
    """Values and colours that count nowhere; None = 255, unless it is the value of a class."""
    column: str | None = None
    """Column with the masks of a Parquet source or a manifest; None = the first with a usual name."""


def mask_request(
    labels: Declared | str | None, ignore: Sequence[int | str] | int | str | None, column: str | None = None
) -> MaskRequest:
    """The request of a study's keys `data.labels`, `data.ignore` and `data.mask`.

    Raises:
        DataError: values that are none, a label file that cannot be read.
    """
    label_map = map_named(labels) if isinstance(labels, str) else None
    if labels is not None and not isinstance(labels, str):
        label_map = declared_map(labels)
    if ignore is not None:
        ignore = (ignore,) if isinstance(ignore, int | str) else tuple(ignore)
        for value in ignore:
            parse_raw(value)
    return MaskRequest(label_map, ignore, column)


def mask_request_of_text(labels: str | None, ignore: str | None, column: str | None) -> MaskRequest | None:
    """The request of a command's options; None = none of them was given.

    Args:
        labels: `name=value,…`, where a name may occur several times; a label file; or the name of a published table.
        ignore: `value,…`, or `none`.
        column: of the masks.

    Raises:
        DataError: see `mask_request`.

    Example:
        >>> mask_request_of_text("background=0,object=255,object=#307020", None, None).labels.classes
        ('background', 'object')
    """
    if labels is None and ignore is None and column is None:
        return None
    declared: Declared | str | None = labels
    if labels is not None and "=" in labels and not Path(labels).exists():
        values: dict[str, list[int | str]] = {}
        for part in labels.split(","):
            name, _, value = part.rpartition("=")
            values.setdefault(name.strip(), []).append(value.strip())
        declared = dict(values)
    values_ignored: list[int | str] | None = None
    if ignore is not None:
        values_ignored = [] if ignore == "none" else [*ignore.split(",")]
    return mask_request(declared, values_ignored, column)
