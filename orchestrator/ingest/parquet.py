"""Parquet files: an image column (bytes, or Hugging Face's struct of `bytes` and `path`), a label column and, if they
are there, `domain` and `split`. Read with pyarrow alone; extension types are refused before their schema is parsed.

The columns of one Parquet file: found by name and type, checked, read as text; and the images of some rows.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.ingest.errors import OTHER, DataError, counted, did_you_mean, few, shown
from orchestrator.ingest.source import DEFAULT_DOMAIN, SPLIT_NAMES, EncodedSource, Sample

IMAGE_COLUMNS = ("image", "img", "images", "picture", "image_bytes", "bytes")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "fine_label", "coarse_label")
DOMAIN_COLUMNS = ("domain", "environment", "env")
SPLIT_COLUMN = "split"


class Table:
    """The columns of one file, without its images.

    Args:
        file: the file.
        name: how messages call it.
        label: the column with the classes; None = the first of `LABEL_COLUMNS` that is there.

    Raises:
        DataError: see `open_checked`; or a column is missing.
    """

    def __init__(self, file: Path, name: str, label: str | None = None) -> None:
        self.name = name
        self.reader = open_checked(file, name)
        self.schema = self.reader.schema_arrow
        self.image = self._image_column()
        self.label = self._label_column() if label is None else self._declared(label)
        self.class_names = self._class_names()

    @property
    def group_sizes(self) -> list[int]:
        """Rows of each row group."""
        metadata = self.reader.metadata
        return [int(metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]

    def labels(self) -> list[str]:
        """Class name of each row."""
        labels = self._values(self.label)
        return labels if self.class_names is None else self._named_labels(labels, self.class_names)

    def domains(self) -> list[str] | None:
        """Domain of each row; None = there is no such column."""
        found = [name for name in DOMAIN_COLUMNS if name in self.schema.names]
        return self._values(found[0]) if found else None

    def splits(self) -> list[str] | None:
        """`train`, `val` or `test` of each row; None = there is no such column."""
        if SPLIT_COLUMN not in self.schema.names:
            return None
        values = self._values(SPLIT_COLUMN)
        unknown = sorted({v for v in values if v.casefold() not in SPLIT_NAMES})
        if unknown:
            raise DataError(
                f"The column 'split' must hold {', '.join(SPLIT_NAMES)}, but in {self.name} it also holds "
                f"{few(unknown)}."
            )
        return [SPLIT_NAMES[v.casefold()] for v in values]

    def _image_column(self) -> str:
        images = [f.name for f in self.schema if _is_image(f.type)]
        known = [name for name in IMAGE_COLUMNS if name in images]
        if known or len(images) == 1:
            return (known or images)[0]
        raise DataError(
            f"A Parquet file needs an image column (binary, or a struct with a binary field 'bytes'), called "
            f"{' or '.join(IMAGE_COLUMNS)} if there are several; but {self.name} has {self._schema_text()}. "
            "Paths are not followed: save the encoded images."
        )

    def _label_column(self) -> str:
        for name in LABEL_COLUMNS:
            if name in self.schema.names and name != self.image:
                return name
        raise DataError(
            f"A Parquet file needs a label column, called {' or '.join(LABEL_COLUMNS)}, but {self.name} has "
            f"{self._schema_text()}. Name yours in data.label (in commands: --label)."
        )

    def _declared(self, label: str) -> str:
        if label in self.schema.names and label != self.image:
            return label
        near = did_you_mean(label, [name for name in self.schema.names if name != self.image])
        raise DataError(f"The label column is {label!r} (data.label), but {self.name} has {self._schema_text()}.{near}")

    def _schema_text(self) -> str:
        return ", ".join(f"{shown(f.name)} ({f.type})" for f in self.schema)

    def _values(self, column: str) -> list[str]:
        """A column of names or non-negative whole numbers, as text."""
        kind = self.schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        textual = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (textual or pa.types.is_integer(kind)):
            way = " Name another column in data.label, or save names." if column == self.label else ""
            raise DataError(
                f"The column {column!r} must hold names or whole numbers from 0, but in {self.name} it holds {kind}."
                f"{way}"
            )
        values = self._column(column)
        wrong = [i for i, v in enumerate(values) if v is None or v == "" or (not textual and v < 0)]
        if wrong:
            raise DataError(
                f"The column {column!r} must have a value of its own in every row, whole numbers from 0 or a name, but "
                f"in {self.name} row {few([f'{i} has {values[i]!r}' for i in wrong])}."
            )
        return [shown(str(v)) for v in values]

    def _column(self, column: str) -> list[Any]:
        try:
            values = list(self.reader.read(columns=[column]).column(0).to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"The column {column!r} of {self.name} is damaged: {error}") from error
        rows = sum(self.group_sizes)
        if len(values) != rows:  # the counts stand in the footer, which has no checksum
            raise DataError(f"The column {column!r} of {self.name} is damaged: {len(values)} values for {rows} rows.")
        return values

    def _class_names(self) -> list[str] | None:
        """Names that Hugging Face's `datasets` notes for integer labels, or None."""
        try:
            features = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
            names = features[self.label]["names"]
        except (ValueError, KeyError, TypeError):
            return None
        ok = isinstance(names, list) and names and all(isinstance(n, str) for n in names)
        return [shown(n) for n in names] if ok and pa.types.is_integer(self.schema.field(self.label).type) else None

    def _named_labels(self, labels: list[str], names: list[str]) -> list[str]:
        over = [i for i, label in enumerate(labels) if int(label) >= len(names)]
        if over:
            raise DataError(
                f"The column {self.label!r} of {self.name} names {len(names)} classes, so labels must be below "
                f"{len(names)}, but row {few([f'{i} has {labels[i]}' for i in over])}."
            )
        return [names[int(label)] for label in labels]


def open_checked(file: Path, name: str) -> Any:
    """A `pyarrow.parquet.ParquetFile` that verifies page checksums and is known to hold no extension type.

    Extension types are looked for in the raw bytes of the footer: whatever opens the file parses its schema, and to
    parse a type that another library has registered may run that library's code on the file's bytes (Ray Data
    unpickled: CVE-2026-41486).

    Raises:
        DataError: no Parquet file, a damaged one, or one with extension types.
    """
    try:
        footer = _footer(file)
        if any(mark in footer for mark in _EXTENSION_MARKS):
            raise DataError(
                f"Parquet columns must be plain Arrow types, but {name} has an extension type, which could run code "
                "when it is read. Save images as encoded bytes."
            )
        return pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
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
            raise ValueError(
                "it does not end with PAR1, so it was cut or is another kind of file" if size else "it is empty"
            )
        length = int.from_bytes(tail[:4], "little")
        if length > size - 12:
            raise ValueError("its footer is longer than the file")
        stream.seek(size - 8 - length)
        return stream.read(length)


def _encodings(text: bytes) -> tuple[bytes, ...]:
    """How `text` looks in a stream of base64 (Parquet keeps the Arrow schema so), at each of the three alignments."""
    found = [text]
    for shift in range(3):
        whole = base64.b64encode(bytes(shift) + text)
        # Characters that also depend on what stands before or after the text are left out.
        found.append(whole[(shift * 8 + 5) // 6 : (shift + len(text)) * 8 // 6])
    return tuple(found)


_EXTENSION_MARKS = _encodings(b"ARROW:extension:name")


def encoded_images(file: str, column: str, group: int, rows: Sequence[int]) -> Iterator[bytes | None]:
    """The encoded images of some rows (rising) of a row group, a few at a time in memory; None where a row has none."""
    wanted, at = set(rows), 0
    reader = open_checked(Path(file), file)
    for batch in reader.iter_batches(batch_size=32, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(0)
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, "bytes")
        for offset in range(len(values)):
            if at + offset in wanted:
                yield values[offset].as_py()
        at += len(values)
        if at > rows[-1]:
            return


def _is_image(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _is_image(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


_CHUNK = 256
_SHARD = re.compile(r"(?i)^([a-z]+)(?:-\d+-of-\d+|-\d+)?$")
"""File names that Hugging Face gives to the shards of a split, without `.parquet`."""


@dataclass
class ParquetSource(EncodedSource):
    """Rows of Parquet files; `Sample.where` is (file, row group, row in the group)."""

    files: list[Path] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    """The image column of each file."""

    def chunks(self, wanted: Sequence[int]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        for (file, group), positions in groupby(wanted, key=lambda i: self.samples[i].where[:2]):
            rows = list(positions)
            request = {"reader": "parquet", "file": str(self.files[file]), "column": self.columns[file], "group": group}
            for start in range(0, len(rows), _CHUNK):
                yield request, rows[start : start + _CHUNK]


def open_parquet(root: Path, label: str | None = None) -> ParquetSource:
    """List the rows of one Parquet file, or of all below a folder.

    The split comes from a column `split`, or from the names of the files where all are called after one
    (`train-00000-of-00002.parquet`).

    Args:
        label: the column with the classes; None = the first of `LABEL_COLUMNS`.

    Raises:
        DataError: no or damaged files, extension types, missing columns, labels that are no classes.
    """
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*.parquet") if p.is_file())
    if not files:
        raise DataError(
            f"A Parquet source needs files that end in .parquet, but {shown(str(root))} holds none. {OTHER}"
        )
    base = root.parent if root.is_file() else root
    names = [shown(str(file.relative_to(base))) for file in files]
    by_file = _splits_by_name(files)
    digest, samples, columns, labels = hashlib.sha256(), list[Sample](), list[str](), list[str]()
    order: list[str] | None = None
    for number, (file, name) in enumerate(zip(files, names, strict=True)):
        status = file.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        table = Table(file, name, label)
        columns.append(table.image)
        labels.append(table.label)
        order = table.class_names or order
        samples += _samples(table, number, by_file[number] if by_file else None)
    image_column, label_column = (few(map(shown, sorted(set(found)))) for found in (columns, labels))
    return ParquetSource(
        kind="parquet",
        layout=f"{counted(len(files), 'Parquet file')}, image column {image_column}, label column {label_column}",
        samples=samples,
        digest=digest.hexdigest(),
        class_order=order,
        files=files,
        columns=columns,
    )


def _samples(table: Table, number: int, split: str | None) -> list[Sample]:
    """One sample per row of file `number`; `split` is what the file's name says."""
    labels, domains, splits = table.labels(), table.domains(), table.splits()
    samples = list[Sample]()
    for group, size in enumerate(table.group_sizes):
        for inside in range(size):
            row = len(samples)
            domain = domains[row] if domains else DEFAULT_DOMAIN
            given = splits[row] if splits else split
            samples.append(Sample(f"{table.name}#{row}", labels[row], domain, given, (number, group, inside)))
    return samples


def _splits_by_name(files: list[Path]) -> list[str] | None:
    """The split that each file is called after, if all are and one of them is for training."""
    found = [_SHARD.match(file.stem) for file in files]
    splits = [SPLIT_NAMES.get(m.group(1).casefold()) if m else None for m in found]
    named = [s for s in splits if s is not None]
    return named if len(named) == len(files) and "train" in named else None
