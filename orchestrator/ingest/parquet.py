"""Parquet files: an image column (bytes, or Hugging Face's struct of `bytes` and `path`), a label column and, if they
are there, `domain` and `split`. Read with pyarrow alone; extension types are refused before their schema is parsed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from orchestrator.ingest.errors import OTHER, DataError, counted, few, shown
from orchestrator.ingest.parquet_table import Table
from orchestrator.ingest.source import DEFAULT_DOMAIN, SPLIT_NAMES, EncodedSource, Sample

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
