"""Parquet: an image column (HF struct {bytes, path} or raw bytes), a label column, optional domain and split columns."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestrator.ingest.errors import DataError
from orchestrator.ingest.folder import SINGLE, SPLITS
from orchestrator.ingest.images import BadImageError, decode
from orchestrator.ingest.samples import Listing, Sample


def list_parquet(root: Path) -> Listing:
    """Rows of one Parquet file, or of all `*.parquet` in a folder (a file name that starts with `train`, `val` or
    `test` gives the split, as the Hugging Face hub has it).

    Raises:
        DataError: no file, not Parquet, or columns that are missing or of an unusable type.
    """
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
    if not files or not all(f.is_file() for f in files):
        raise DataError(f"data.root must be a .parquet file or a folder of them, but none is at {root}.")
    samples: list[Sample] = []
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        samples += _rows(file, _split_of(file.stem))
    return Listing(samples, f"Parquet, {len(files)} file{'s' if len(files) > 1 else ''}", digest.hexdigest())


def _rows(file: Path, split: str | None) -> list[Sample]:
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} must be a Parquet file, but could not be read: {error}") from None
    for name in table.column_names:
        if isinstance(table.schema.field(name).type, pa.ExtensionType):
            raise DataError(
                f"{file}: column {name!r} has the extension type {table.schema.field(name).type}, whose reader may run "
                "code. Write it as a plain struct {bytes, path} or as binary."
            )
    image, label = _column(table, file, ("image", "img")), _column(table, file, ("label", "labels", "class"))
    labels = _labels(table, label, file)
    images = table.column(image).combine_chunks()
    if pa.types.is_struct(images.type):
        names = [images.type.field(i).name for i in range(images.type.num_fields)]
        if "bytes" not in names:
            raise DataError(f"{file}: the struct column {image!r} needs a field 'bytes', but has {', '.join(names)}.")
        images = images.field("bytes")
    if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise DataError(
            f"{file}: column {image!r} must hold encoded images (binary or a struct with 'bytes'), but has "
            f"the type {images.type}."
        )
    domains = table.column("domain").to_pylist() if "domain" in table.column_names else [SINGLE] * len(table)
    splits = table.column("split").to_pylist() if "split" in table.column_names else [split] * len(table)
    return [
        Sample(f"{file.name}[{i}]", labels[i], str(domains[i]), partial(_decode, images, i), SPLITS.get(str(splits[i])))
        for i in range(len(table))
    ]


def _decode(images: Any, row: int, side: int, interpolation: str) -> NDArray[np.uint8]:
    value = images[row].as_py()
    if value is None:
        raise BadImageError("the cell is empty (null)")
    return decode(value, side, interpolation)


def _column(table: pa.Table, file: Path, names: tuple[str, ...]) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise DataError(
        f"{file} needs a column named {' or '.join(map(repr, names))}, but has {', '.join(table.column_names)}."
    )


def _labels(table: pa.Table, name: str, file: Path) -> list[str]:
    column = table.column(name)
    if not (
        pa.types.is_integer(column.type)
        or pa.types.is_string(column.type)
        or pa.types.is_large_string(column.type)
        or pa.types.is_dictionary(column.type)
    ):
        raise DataError(f"{file}: labels must be integers or strings, but column {name!r} has the type {column.type}.")
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(f"{file}: every row needs a label, but column {name!r} is null in row {row}.")
    values = column.to_pylist()
    if pa.types.is_integer(column.type):
        if min(values, default=0) < 0:
            raise DataError(f"{file}: integer labels start at 0, but column {name!r} has {min(values)}.")
        names = _hugging_face_names(table, name)
        width = len(str(max(values, default=0)))
        values = [names[v] if v < len(names) else f"{v:0{width}d}" for v in values]
    if len(values) > 20 and len(set(values)) == len(values):
        raise DataError(
            f"{file}: column {name!r} has a different value in each of its {len(values)} rows: it looks like "
            "an identifier or a regression target, not a class label."
        )
    return [str(v) for v in values]


def _hugging_face_names(table: pa.Table, name: str) -> list[str]:
    """Class names that `datasets` keeps in the schema's metadata."""
    import json

    metadata = (table.schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return []
    feature = json.loads(metadata).get("info", {}).get("features", {}).get(name, {})
    return [str(n) for n in feature.get("names", [])]


def _split_of(stem: str) -> str | None:
    return next((split for start, split in SPLITS.items() if stem.startswith(start)), None)
