"""Parquet files as a source of images.

An image column (bytes, or Hugging Face's struct of `bytes` and `path`), a label column, and optional columns `domain`
and `split`. Read with pyarrow alone.

In this order: opening a file without running code from it; images of some rows, for decoder processes; the columns of
one file; the scan of all files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.errors import did_you_mean
from orchestrator.ingest.errors import SOURCE_HINT, DataError, first_few, printable
from orchestrator.ingest.label_map import MaskRequest
from orchestrator.ingest.source import DEFAULT_DOMAIN, SPLIT_NAMES, EncodedSource, Sample
from orchestrator.wording import counted

IMAGE_COLUMNS = ("image", "img", "images", "picture", "image_bytes", "bytes")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "fine_label", "coarse_label")
MASK_COLUMNS = ("mask", "masks", "label", "labels", "annotation", "segmentation", "segmentation_mask", "target")
DOMAIN_COLUMNS = ("domain", "environment", "env")
SPLIT_COLUMN = "split"

_CHUNK = 256
"""Rows per request to a decoder process."""
_SHARD = re.compile(r"(?i)^([a-z]+)(?:-\d+-of-\d+|-\d+)?$")
"""Names of Hugging Face's shards of a split, without `.parquet`: `train-00000-of-00002`."""


def open_checked(file: Path, name: str) -> Any:
    """Open a Parquet file, verifying page checksums.

    After a check that it has no extension type.

    Returns:
        A `pyarrow.parquet.ParquetFile`.

    Raises:
        DataError: no Parquet file, a damaged one, or one with extension types.
    """
    try:
        # Searched for in the raw footer: opening the file parses its schema, and parsing an extension type that another
        # library has registered may run that library's code on the file's bytes (Ray Data unpickled them:
        # CVE-2026-41486).
        footer = _footer(file)
        if any(mark in footer for mark in _EXTENSION_MARKS):
            raise DataError(
                f"Parquet columns must be plain Arrow types, but {name} has an extension type, which could run code "
                "when it is read. Save images as encoded bytes."
            )
        return pq.ParquetFile(file, page_checksum_verification=True)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{name} must be a Parquet file, but it cannot be read as one: {str(error).rstrip('.')}. Give an undamaged "
            "Parquet file."
        ) from error


def _footer(file: Path) -> bytes:
    """The metadata at the end of a Parquet file: <footer> <length, 4 bytes> PAR1."""
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 8))
        tail = stream.read(8)
        if size < 12 or tail[4:] != b"PAR1":
            if not size:
                raise ValueError("it is empty")
            raise ValueError("it does not end with PAR1, so it was cut or is another kind of file")
        length = int.from_bytes(tail[:4], "little")
        if length > size - 12:
            raise ValueError("its footer is longer than the file")
        stream.seek(size - 8 - length)
        return stream.read(length)


def _encodings(text: bytes) -> tuple[bytes, ...]:
    """`text` itself, and as it appears within base64 at each of the three alignments."""
    # Parquet stores the Arrow schema in base64.
    encodings = [text]
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + text)
        # Without the characters that also depend on the bytes before and after the text.
        encodings.append(encoded[(shift * 8 + 5) // 6 : (shift + len(text)) * 8 // 6])
    return tuple(encodings)


_EXTENSION_MARKS = _encodings(b"ARROW:extension:name")


def encoded_images(file: str, column: str, group: int, rows: Sequence[int]) -> Iterator[bytes | None]:
    """The encoded images of some rows of a row group.

    None where a row has none. A few at a time are in memory.

    Args:
        file: path of the file.
        column: the image column.
        group: number of the row group.
        rows: within the group, ascending.
    """
    selected = set(rows)
    first = 0
    reader = open_checked(Path(file), file)
    # One thread: there is a decoder process per CPU.
    for batch in reader.iter_batches(batch_size=32, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(0)
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, "bytes")
        for offset in range(len(values)):
            if first + offset in selected:
                yield values[offset].as_py()
        first += len(values)
        if first > rows[-1]:
            return


class Table:
    """Labels or masks, domains and splits of one file.

    Args:
        file: the file.
        name: its name in messages.
        label: the column with the classes; None = the first of `LABEL_COLUMNS` that the file has.
        masks: the file has masks instead of classes, in the column that this names.

    Raises:
        DataError: see `open_checked`; or a column is missing.
    """

    def __init__(self, file: Path, name: str, label: str | None = None, masks: MaskRequest | None = None) -> None:
        self.name = name
        self.reader = open_checked(file, name)
        self.schema = self.reader.schema_arrow
        self.mask: str | None = None
        if masks is not None:
            self.mask = self._mask_column(masks.column)
            self.image = self._image_column(besides=self.mask)
            return
        self.image = self._image_column()
        self._refuse_masks(label)
        self.label = self._default_label_column() if label is None else self._given_label_column(label)
        self.class_names = self._class_names()

    @property
    def group_sizes(self) -> list[int]:
        """Rows of each row group."""
        metadata = self.reader.metadata
        return [int(metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]

    def labels(self) -> list[str]:
        """Class name of each row."""
        labels = self._values(self.label)
        if self.class_names is None:
            return labels
        return self._named_labels(labels, self.class_names)

    def domains(self) -> list[str] | None:
        """Domain of each row; None = the file has no such column."""
        for name in DOMAIN_COLUMNS:
            if name in self.schema.names:
                return self._values(name)
        return None

    def splits(self) -> list[str] | None:
        """`train`, `val` or `test` of each row; None = the file has no such column."""
        if SPLIT_COLUMN not in self.schema.names:
            return None
        values = self._values(SPLIT_COLUMN)
        unknown = sorted({value for value in values if value.casefold() not in SPLIT_NAMES})
        if unknown:
            raise DataError(
                f"The column 'split' must hold {', '.join(SPLIT_NAMES)}, but in {self.name} it also holds "
                f"{first_few(unknown)}."
            )
        return [SPLIT_NAMES[value.casefold()] for value in values]

    def _mask_column(self, given: str | None) -> str:
        images = [column.name for column in self.schema if _is_image(column.type)]
        if given is not None and given in images:
            return given
        if given is not None:
            raise DataError(
                f"The mask column is {given!r} (data.mask), but {self.name} has {self._schema_text()}."
                f"{did_you_mean(given, images)}"
            )
        for name in MASK_COLUMNS:
            if name in images:
                return name
        raise DataError(
            f"A Parquet file of pictures with masks needs a mask column (binary, or a struct with a binary field "
            f"'bytes'), called {' or '.join(MASK_COLUMNS)}, but {self.name} has {self._schema_text()}. Name yours in "
            "data.mask (in commands: --mask)."
        )

    def _refuse_masks(self, label: str | None) -> None:
        """Raise DataError where a file of a classification study has masks and no classes."""
        masks = mask_columns(self.schema)
        named = [name for name in LABEL_COLUMNS if name in self.schema.names and name not in (self.image, *masks)]
        if masks and not named and label is None:
            raise DataError(
                f"A Parquet file of a classification has a label column, but {self.name} has pictures with masks "
                f"(columns {self.image} and {masks[0]}). Set task: segmentation in the study file."
            )

    def _image_column(self, besides: str | None = None) -> str:
        images = [column.name for column in self.schema if _is_image(column.type) and column.name != besides]
        if besides is None:
            # A file of a classification may have masks, too, which are not its pictures.
            images = [name for name in images if name not in mask_columns(self.schema)]
        for name in IMAGE_COLUMNS:
            if name in images:
                return name
        if len(images) == 1:
            return str(images[0])
        raise DataError(
            f"A Parquet file needs an image column (binary, or a struct with a binary field 'bytes'), called "
            f"{' or '.join(IMAGE_COLUMNS)} if there are several; but {self.name} has {self._schema_text()}. "
            "Paths are not followed: save the encoded images."
        )

    def _default_label_column(self) -> str:
        for name in LABEL_COLUMNS:
            if name in self.schema.names and name != self.image:
                return name
        raise DataError(
            f"A Parquet file needs a label column, called {' or '.join(LABEL_COLUMNS)}, but {self.name} has "
            f"{self._schema_text()}. Name yours in data.label (in commands: --label)."
        )

    def _given_label_column(self, label: str) -> str:
        if label in self.schema.names and label != self.image:
            return label
        hint = did_you_mean(label, [name for name in self.schema.names if name != self.image])
        raise DataError(f"The label column is {label!r} (data.label), but {self.name} has {self._schema_text()}.{hint}")

    def _schema_text(self) -> str:
        return ", ".join(f"{printable(column.name)} ({column.type})" for column in self.schema)

    def _values(self, column: str) -> list[str]:
        """A column of names or non-negative integers, as strings."""
        value_type = self.schema.field(column).type
        if pa.types.is_dictionary(value_type):
            value_type = value_type.value_type
        is_string = pa.types.is_string(value_type) or pa.types.is_large_string(value_type)
        if not (is_string or pa.types.is_integer(value_type)):
            hint = " Name another column in data.label, or save names." if column == self.label else ""
            raise DataError(
                f"The column {column!r} must hold names or integers from 0, but in {self.name} it holds {value_type}."
                f"{hint}"
            )
        values = self._column(column)
        invalid = [i for i, value in enumerate(values) if value is None or value == "" or (not is_string and value < 0)]
        if invalid:
            raise DataError(
                f"The column {column!r} must have a value in every row, an integer from 0 or a name, but "
                f"in {self.name} row {first_few([f'{i} has {values[i]!r}' for i in invalid])}."
            )
        return [printable(str(value)) for value in values]

    def _column(self, column: str) -> list[Any]:
        try:
            values = list(self.reader.read(columns=[column]).column(0).to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"The column {column!r} of {self.name} is damaged: {error}") from error
        rows = sum(self.group_sizes)
        if len(values) != rows:  # the row counts are in the footer, which has no checksum
            raise DataError(f"The column {column!r} of {self.name} is damaged: {len(values)} values for {rows} rows.")
        return values

    def _class_names(self) -> list[str] | None:
        """Names of integer labels, as Hugging Face's `datasets` stores them; None = there are none."""
        try:
            features = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
            names = features[self.label]["names"]
        except (ValueError, KeyError, TypeError):
            return None
        are_names = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        if not are_names or not pa.types.is_integer(self.schema.field(self.label).type):
            return None
        return [printable(name) for name in names]

    def _named_labels(self, labels: list[str], names: list[str]) -> list[str]:
        too_large = [i for i, label in enumerate(labels) if int(label) >= len(names)]
        if too_large:
            raise DataError(
                f"The column {self.label!r} of {self.name} names {len(names)} classes, so labels must be below "
                f"{len(names)}, but row {first_few([f'{i} has {labels[i]}' for i in too_large])}."
            )
        return [names[int(label)] for label in labels]


def has_mask_column(file: Path) -> bool:
    """Whether a file has pictures and masks by the names of its columns, and no classes.

    Raises:
        DataError: see `open_checked`.
    """
    schema = open_checked(file, printable(file.name)).schema_arrow
    masks = mask_columns(schema)
    return bool(masks) and not [name for name in LABEL_COLUMNS if name in schema.names and name not in masks]


def mask_columns(schema: Any) -> list[str]:
    """Columns of a schema with several image columns that hold masks by their names."""
    images = [column.name for column in schema if _is_image(column.type)]
    return [name for name in MASK_COLUMNS if name in images] if len(images) > 1 else []


def _is_image(kind: Any) -> bool:
    """Whether an Arrow type is binary, or a struct with a binary field `bytes`."""
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return any(field.name == "bytes" and _is_image(field.type) for field in fields)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@dataclass
class ParquetSource(EncodedSource):
    """Rows of Parquet files; `Sample.location` is (file, row group, row in the group)."""

    files: list[Path] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    """The image column of each file."""
    mask_columns: list[str] = field(default_factory=list)
    """The mask column of each file; empty = no masks."""

    def chunks(self, positions: Sequence[int]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        # Positions ascend, so that each row group is one run.
        by_row_group = groupby(positions, key=lambda i: self.samples[i].location[:2])
        for (file, group), members in by_row_group:
            rows = list(members)
            request = {"reader": "parquet", "file": str(self.files[file]), "column": self.columns[file], "group": group}
            if self.mask_columns:
                request["mask_column"] = self.mask_columns[file]
            for start in range(0, len(rows), _CHUNK):
                yield request, rows[start : start + _CHUNK]


def parquet_files(root: Path) -> list[Path]:
    """The file itself, or all Parquet files below a folder."""
    return [root] if root.is_file() else sorted(path for path in root.rglob("*.parquet") if path.is_file())


def scan_parquet(root: Path, label: str | None = None, masks: MaskRequest | None = None) -> ParquetSource:
    """List the rows of one Parquet file, or of all files below a folder.

    The split comes from a column `split`, or else from the names of the files where all are named after one
    (`train-00000-of-00002.parquet`).

    Args:
        root: file or folder.
        label: the column with the classes; None = the first of `LABEL_COLUMNS` that the file has.
        masks: the rows are pictures with masks.

    Raises:
        DataError: no or damaged files, extension types, missing columns, labels that are no classes.
    """
    files = parquet_files(root)
    if not files:
        raise DataError(
            f"A Parquet source needs files that end in .parquet, but {printable(str(root))} holds none. {SOURCE_HINT}"
        )
    base = root.parent if root.is_file() else root
    file_splits = _splits_of_names(files)
    digest = hashlib.sha256()
    samples: list[Sample] = []
    image_columns: list[str] = []
    label_columns: set[str] = set()
    mask_names: list[str] = []
    class_order: list[str] | None = None
    for number, file in enumerate(files):
        name = printable(str(file.relative_to(base)))
        status = file.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        table = Table(file, name, label, masks)
        image_columns.append(table.image)
        if table.mask is not None:
            mask_names.append(table.mask)
        else:
            label_columns.add(table.label)
            class_order = table.class_names or class_order
        samples += _samples(table, number, file_splits[number] if file_splits else None)
    return ParquetSource(
        kind="parquet",
        layout=f"{counted(len(files), 'Parquet file')}, image column {_listed(image_columns)}, "
        + (f"mask column {_listed(mask_names)}" if mask_names else f"label column {_listed(label_columns)}"),
        samples=samples,
        digest=digest.hexdigest(),
        class_order=class_order,
        files=files,
        columns=image_columns,
        mask_columns=mask_names,
    )


def _listed(columns: Collection[str]) -> str:
    return first_few(map(printable, sorted(set(columns))))


def _samples(table: Table, file_number: int, file_split: str | None) -> list[Sample]:
    """One sample per row of a file; `file_split` is the split of the file's name."""
    labels = table.labels() if table.mask is None else [""] * sum(table.group_sizes)
    domains = table.domains()
    splits = table.splits()
    samples: list[Sample] = []
    for group, size in enumerate(table.group_sizes):
        for row_in_group in range(size):
            row = len(samples)
            domain = domains[row] if domains else DEFAULT_DOMAIN
            split = splits[row] if splits else file_split
            location = (file_number, group, row_in_group)
            mask = None if table.mask is None else location
            samples.append(Sample(f"{table.name}#{row}", labels[row], domain, split, location, mask))
    return samples


def _splits_of_names(files: Sequence[Path]) -> list[str] | None:
    """The split that each file is named after.

    None unless all are and one of them is for training.
    """
    splits = []
    for file in files:
        match = _SHARD.match(file.stem)
        split = SPLIT_NAMES.get(match.group(1).casefold()) if match else None
        if split is None:
            return None
        splits.append(split)
    return splits if "train" in splits else None
