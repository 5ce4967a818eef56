"""The Arrow file of a store: laid out first, with blank pixels, so that decoders can write each row into its place."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestrator.ingest.worker import write_at
from trainables.data.store import DATA, MANIFEST

_COPY_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Rows:
    """The small columns of one split, in order."""

    labels: NDArray[np.int64]
    domain_ids: NDArray[np.int64]
    names: list[str]


def lay_out(path: Path, side: int, splits: Mapping[str, Rows], notes: Mapping[str, Any]) -> dict[str, int]:
    """Write the whole file with zeros for pixels, one record batch per split.

    All space is taken here: a disk that is too small fails now, not while decoders write.

    Args:
        path: file to write.
        side: of the images, in pixels.
        splits: the other columns.
        notes: kept as JSON in the schema's metadata, so that the file's digest covers it.

    Returns:
        Byte offset of the first pixel of each split.
    """
    width = side * side * 3
    schema = pa.schema(
        [
            pa.field("image", pa.list_(pa.uint8(), width), nullable=False),
            pa.field("label", pa.int64(), nullable=False),
            pa.field("domain", pa.int64(), nullable=False),
            pa.field("name", pa.string(), nullable=False),
        ],
        metadata={"luthier": json.dumps(notes, sort_keys=True)},
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for rows in splits.values():
            with _zeros(len(rows.labels) * width) as blank:
                writer.write_batch(_batch(schema, rows, blank, width))
    return _pixel_offsets(path, list(splits))


def _zeros(size: int) -> mmap.mmap:
    """Zero bytes that take no memory: they are mapped, and only read."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _batch(schema: Any, rows: Rows, pixels: mmap.mmap, width: int) -> Any:
    """One record batch, made of buffers: `pa.array` would import pandas, which takes longer than a small ingest."""
    count = len(rows.labels)
    values = pa.Array.from_buffers(pa.uint8(), count * width, [None, pa.py_buffer(pixels)])
    names = [name.encode() for name in rows.names]
    ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
    if ends[-1] >= 2**31:
        raise ValueError(f"The names of a split must have less than 2 GiB in all, but they have {ends[-1]} bytes.")
    columns = [
        pa.FixedSizeListArray.from_arrays(values, width),
        *(
            pa.Array.from_buffers(pa.int64(), count, [None, pa.py_buffer(np.ascontiguousarray(column, np.int64))])
            for column in (rows.labels, rows.domain_ids)
        ),
        pa.Array.from_buffers(
            pa.string(), count, [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(names))]
        ),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _pixel_offsets(path: Path, splits: list[str]) -> dict[str, int]:
    """Where Arrow put the pixels: the distance of their mapped address from that of the file's first byte."""
    with pa.memory_map(str(path)) as mapped:
        whole = mapped.read_buffer()
        reader = pa.ipc.open_file(pa.BufferReader(whole))
        return {
            name: reader.get_batch(i).column("image").values.buffers()[1].address - whole.address
            for i, name in enumerate(splits)
        }


def copy_rows(source: Path, target: Path, old: NDArray[np.int64], new: NDArray[np.int64], row_bytes: int) -> None:
    """Copy rows of `row_bytes` from offsets `old` of one file to offsets `new` of another, in the order of `new`."""
    order = np.argsort(new)
    with open(source, "rb") as readable, open(target, "r+b") as writable:
        for i in order:
            write_at(writable.fileno(), os.pread(readable.fileno(), row_bytes, int(old[i])), int(new[i]))


def finish(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Take the data file's SHA-256 and write the manifest, last.

    Args:
        folder: with `data.arrow`.
        manifest: everything but `bytes` and `sha256`.
    """
    with open(folder / DATA, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
    text = json.dumps({**manifest, "bytes": size, "sha256": digest}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
