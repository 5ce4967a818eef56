"""Layout of a store's data file: the Arrow columns with blank pixels, and the offsets at which decoders fill them.

The whole file is written before decoding begins, so that decoders write each row where it belongs, in any order, and a
disk that is too small fails at once. Images of one size are a column of fixed-size lists. Pictures with masks have
sizes of their own, known from their headers, and are two columns of binary values.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestrator.ingest.assign import Assignment
from orchestrator.ingest.request import IngestRequest
from orchestrator.ingest.source import Source
from trainables.data.store import FORMAT

Offsets = NDArray[np.int64]
"""Byte offset of each sample's pixels in the data file; -1 = not used."""


@dataclass(frozen=True)
class Layout:
    """Where the pixels of each sample lie in the data file."""

    images: Offsets
    image_bytes: NDArray[np.int64]
    """Bytes of each sample's image."""
    masks: Offsets | None = None
    mask_bytes: NDArray[np.int64] | None = None

    def spans(self, position: int) -> Iterator[tuple[int, int]]:
        """Offset and number of the bytes of a sample: its image, and its mask."""
        yield int(self.images[position]), int(self.image_bytes[position])
        if self.masks is not None and self.mask_bytes is not None:
            yield int(self.masks[position]), int(self.mask_bytes[position])


def sample_bytes(source: Source, request: IngestRequest) -> NDArray[np.int64]:
    """Bytes (n,) of the stored pixels of each sample: image, and mask."""
    if source.survey is None:
        return np.full(len(source.samples), request.image_size**2 * 3, np.int64)
    return np.asarray(source.survey.sizes.prod(axis=1) * 4, np.int64)


def lay_out(path: Path, source: Source, request: IngestRequest, assignment: Assignment) -> Layout:
    """Write the whole Arrow file with zeros for pixels, one record batch per split.

    The metadata of the schema repeats classes, domains, splits and size as JSON, so that the file's digest covers them.
    """
    if source.survey is not None:
        return _lay_out_pairs(path, source, assignment, source.survey.sizes)
    width = request.image_size**2 * 3
    fields = [pa.field("image", pa.list_(pa.uint8(), width), nullable=False)]
    schema = _schema(fields, {"image_size": request.image_size}, assignment)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for positions in assignment.splits.values():
            columns = _Columns.of(source, assignment, positions)
            with _zeros(len(positions) * width) as blank:
                values = pa.Array.from_buffers(pa.uint8(), len(positions) * width, [None, pa.py_buffer(blank)])
                pixels = [pa.FixedSizeListArray.from_arrays(values, width)]
                writer.write_batch(pa.RecordBatch.from_arrays([*pixels, *columns.arrays()], schema=schema))
                # The arrays are views of the mapping, which is closed here.
                del values, pixels

    first_pixel = _data_offsets(path, list(assignment.splits), "image")
    offsets = np.full(len(source.samples), -1, dtype=np.int64)
    for split, positions in assignment.splits.items():
        offsets[positions] = first_pixel[split] + np.arange(len(positions)) * width
    return Layout(offsets, np.full(len(source.samples), width, np.int64))


def _lay_out_pairs(path: Path, source: Source, assignment: Assignment, sizes: NDArray[np.int64]) -> Layout:
    """The file of pictures of their own sizes, with masks."""
    mask_bytes = np.asarray(sizes.prod(axis=1), np.int64)
    byte_counts = {"image": mask_bytes * 3, "mask": mask_bytes}
    fields = [pa.field(name, pa.large_binary(), nullable=False) for name in byte_counts]
    fields += [pa.field(name, pa.int64(), nullable=False) for name in ("height", "width")]
    schema = _schema(fields, {"image_size": 0, "targets": "masks"}, assignment)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for positions in assignment.splits.values():
            columns = _Columns.of(source, assignment, positions)
            with _zeros(int(byte_counts["image"][positions].sum())) as blank:
                pixels = [_blank_binary(counts[positions], blank) for counts in byte_counts.values()]
                sides = [_integer_array(sizes[positions, axis]) for axis in (0, 1)]
                writer.write_batch(pa.RecordBatch.from_arrays([*pixels, *sides, *columns.arrays()], schema=schema))
                del pixels

    offsets = {}
    for name, counts in byte_counts.items():
        first = _data_offsets(path, list(assignment.splits), name)
        offsets[name] = np.full(len(source.samples), -1, dtype=np.int64)
        for split, positions in assignment.splits.items():
            offsets[name][positions] = first[split] + np.cumsum(counts[positions]) - counts[positions]
    return Layout(offsets["image"], byte_counts["image"], offsets["mask"], byte_counts["mask"])


def _schema(pixels: list[Any], extra: Mapping[str, Any], assignment: Assignment) -> Any:
    metadata = {
        "format": FORMAT,
        "classes": assignment.classes,
        "domains": assignment.domains,
        "splits": list(assignment.splits),
        **extra,
    }
    fields = [
        *pixels,
        pa.field("label", pa.int64(), nullable=False),
        pa.field("domain", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
    ]
    # Without such groups a store has the bytes, and so the digest, that it had before there was the column.
    if assignment.across_domains:
        fields.append(pa.field("group", pa.int64(), nullable=False))
    return pa.schema(fields, metadata={"luthier": json.dumps(metadata, sort_keys=True)})


def _zeros(size: int) -> mmap.mmap:
    """Zero bytes that take no memory: an anonymous mapping that is only read."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@dataclass(frozen=True)
class _Columns:
    """The columns of one split beside the pixels, in the order of the store."""

    labels: NDArray[np.int64]
    domain_ids: NDArray[np.int64]
    names: list[str]
    groups: NDArray[np.int64] | None
    """See `trainables.data.store.Store.groups`; None = no column."""

    @classmethod
    def of(cls, source: Source, assignment: Assignment, positions: NDArray[np.int64]) -> _Columns:
        """The columns of some samples."""
        across = assignment.across_domains
        names = [source.samples[i].name for i in positions]
        groups = np.array([across.get(i, -1) for i in positions.tolist()], np.int64) if across else None
        return cls(assignment.labels[positions], assignment.domain_ids[positions], names, groups)

    def arrays(self) -> list[Any]:
        """Arrow arrays, built from buffers."""
        # `pa.array` would import pandas, which takes longer than a small ingest.
        names = [name.encode() for name in self.names]
        ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        if ends[-1] >= 2**31:  # Arrow's string columns have 32-bit offsets
            raise ValueError(f"The names of a split must have less than 2 GiB in all, but they have {ends[-1]} bytes.")
        name_buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(names))]
        arrays = [
            _integer_array(self.labels),
            _integer_array(self.domain_ids),
            pa.Array.from_buffers(pa.string(), len(names), name_buffers),
        ]
        if self.groups is not None:
            arrays.append(_integer_array(self.groups))
        return arrays


def _integer_array(values: NDArray[np.int64]) -> Any:
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values, np.int64))])


def _blank_binary(counts: NDArray[np.int64], blank: mmap.mmap) -> Any:
    """A binary column with `counts` zero bytes a row."""
    ends = np.cumsum([0, *counts.tolist()], dtype=np.int64)
    data = pa.py_buffer(blank).slice(0, int(ends[-1]))
    return pa.Array.from_buffers(pa.large_binary(), len(counts), [None, pa.py_buffer(ends), data])


def _data_offsets(path: Path, splits: list[str], column: str) -> dict[str, int]:
    """Byte offset in the file of each split's first pixel of a column."""
    # Arrow does not tell offsets: the distance of the mapped pixels from the file's first mapped byte is the same.
    with pa.memory_map(str(path)) as mapped:
        whole = mapped.read_buffer()
        reader = pa.ipc.open_file(pa.BufferReader(whole))
        offsets = {}
        for i, name in enumerate(splits):
            values = reader.get_batch(i).column(column)
            # A list column keeps its pixels in the array of its values, a binary column in its last buffer.
            buffer = values.values.buffers()[1] if pa.types.is_fixed_size_list(values.type) else values.buffers()[2]
            offsets[name] = buffer.address - whole.address
        return offsets
