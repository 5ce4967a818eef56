"""Writing a data store.

An Arrow file is laid out with blank pixels, then filled in place by the decoders. The whole file is written before
decoding begins, so that decoders write each row where it belongs, in any order, and a disk that is too small fails at
once. If images turn out unreadable, or a drawn split would divide equal or nearly equal ones, the splits are assigned
again and the decoded rows are copied into a new layout.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestrator.ingest.assign import Assignment, assign
from orchestrator.ingest.decoding import DecodeJob, DecodingProgress, decode_all
from orchestrator.ingest.errors import DataError, first_few
from orchestrator.ingest.manifest import describe, quarantine_list
from orchestrator.ingest.near_equal import ImageGroups, group_images
from orchestrator.ingest.request import IngestRequest
from orchestrator.ingest.source import Outcome, Source
from orchestrator.ingest.worker import write_at
from orchestrator.wording import counted
from trainables.data.store import DATA, FORMAT, MANIFEST
from trainables.storage.atomic_files import atomic_folder

log = logging.getLogger("luthier")

Offsets = NDArray[np.int64]
"""Byte offset of each sample's pixels in the data file; -1 = not used."""


def row_bytes(request: IngestRequest) -> int:
    """Bytes of one stored image."""
    return request.image_size**2 * 3


def write_store(
    source: Source,
    assignment: Assignment,
    request: IngestRequest,
    folder: Path,
    workers: int | None = None,
    progress: DecodingProgress | None = None,
) -> None:
    """Decode all used samples into a new store; the folder appears when it is complete.

    Args:
        source: the scan.
        assignment: the split of each sample.
        request: image size, interpolation, treatment of unreadable images.
        folder: of the store; the caller holds its lock.
        workers: decoder processes; None = one per CPU.
        progress: called from several threads, see `DecodingProgress`.

    Raises:
        DataError: all images are unreadable, or some are and the request or the smaller splits do not allow it.
        OSError: the disk refused a write.
    """
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of an ingest that was killed
        shutil.rmtree(leftover)
    started = time.perf_counter()
    with atomic_folder(folder) as partial:
        offsets = _lay_out(partial / DATA, source, request, assignment)
        job = DecodeJob(request.image_size, request.interpolation, partial / DATA, offsets, request.crop_size)
        outcomes = decode_all(source, assignment.used.tolist(), job, workers, progress)
        # Near-equal images are looked for in any case: splits of the source's own may divide them, which is reported.
        groups = group_images(outcomes)
        final = _assign_decoded(source, request, outcomes, groups)
        if not final.has_rows_of(assignment):
            _move_rows(partial, source, request, final, offsets)
        seconds = time.perf_counter() - started
        manifest = describe(source, request, final, outcomes, groups, partial, seconds)
        _write_manifest(partial, manifest)
    images = sum(manifest["counts"].values())
    log.info("%d images (%.0f/s) → %s", images, manifest["images_per_second"], folder)


def refuse_unreadable(quarantine: Sequence[Mapping[str, str]], request: IngestRequest) -> DataError:
    """The error for unreadable images that a request does not allow."""
    return DataError(
        f"All images must be readable, but {counted(len(quarantine), 'image')} cannot be read: "
        f"{describe_quarantined(quarantine)}. Replace or remove what `luthier data check {request.root}` lists."
    )


def describe_quarantined(quarantine: Sequence[Mapping[str, str]]) -> str:
    """The first quarantined images with their reasons, in a sentence."""
    return first_few([f"{entry['name']} ({entry['reason']})" for entry in quarantine])


def _assign_decoded(
    source: Source, request: IngestRequest, outcomes: Mapping[int, Outcome], groups: ImageGroups
) -> Assignment:
    """The assignment of what decoding has shown: unreadable samples are left out, copies lie in one split."""
    bad = [position for position, outcome in outcomes.items() if outcome.reason is not None]
    if not bad:
        return assign(source, request, groups=groups)
    quarantine = quarantine_list(source, outcomes)
    if request.on_bad == "fail" or len(bad) == len(outcomes):
        raise refuse_unreadable(quarantine, request)
    try:
        return assign(source, request, bad, groups)
    except DataError as error:
        raise DataError(f"{error} Unreadable: {describe_quarantined(quarantine)}.") from error


def _move_rows(
    folder: Path, source: Source, request: IngestRequest, assignment: Assignment, old_offsets: Offsets
) -> None:
    """Replace the data file by one for another assignment, with the pixels copied."""
    old = folder / "as-decoded.arrow"
    # Both files are complete at once: the move needs the disk space twice.
    os.replace(folder / DATA, old)
    new_offsets = _lay_out(folder / DATA, source, request, assignment)
    positions = assignment.used[np.argsort(new_offsets[assignment.used])]  # written in ascending order
    with open(old, "rb") as readable, open(folder / DATA, "r+b") as writable:
        for i in positions:
            pixels = os.pread(readable.fileno(), row_bytes(request), int(old_offsets[i]))
            write_at(writable.fileno(), pixels, int(new_offsets[i]))
    old.unlink()


@dataclass(frozen=True)
class _Columns:
    """The columns of one split beside the pixels, in the order of the store."""

    labels: NDArray[np.int64]
    domain_ids: NDArray[np.int64]
    names: list[str]
    groups: NDArray[np.int64] | None
    """See `trainables.data.store.Store.groups`; None = no column."""


def _lay_out(path: Path, source: Source, request: IngestRequest, assignment: Assignment) -> Offsets:
    """Write the whole Arrow file with zeros for pixels, one record batch per split.

    The metadata of the schema repeats classes, domains, splits and size as JSON, so that the file's digest covers them.
    """
    width = row_bytes(request)
    metadata = {
        "format": FORMAT,
        "classes": assignment.classes,
        "domains": assignment.domains,
        "splits": list(assignment.splits),
        "image_size": request.image_size,
    }
    fields = [
        pa.field("image", pa.list_(pa.uint8(), width), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("domain", pa.int64(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
    ]
    across = assignment.across_domains
    # Without such groups a store has the bytes, and so the digest, that it had before there was the column.
    if across:
        fields.append(pa.field("group", pa.int64(), nullable=False))
    schema = pa.schema(fields, metadata={"luthier": json.dumps(metadata, sort_keys=True)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for positions in assignment.splits.values():
            names = [source.samples[i].name for i in positions]
            groups = np.array([across.get(i, -1) for i in positions.tolist()], np.int64) if across else None
            columns = _Columns(assignment.labels[positions], assignment.domain_ids[positions], names, groups)
            with _zeros(len(positions) * width) as blank:
                writer.write_batch(_record_batch(schema, columns, blank, width))

    first_pixel = _pixel_offsets(path, list(assignment.splits))
    offsets = np.full(len(source.samples), -1, dtype=np.int64)
    for split, positions in assignment.splits.items():
        offsets[positions] = first_pixel[split] + np.arange(len(positions)) * width
    return offsets


def _zeros(size: int) -> mmap.mmap:
    """Zero bytes that take no memory: an anonymous mapping that is only read."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _record_batch(schema: Any, columns: _Columns, pixels: mmap.mmap, width: int) -> Any:
    """One record batch, built from buffers."""
    # `pa.array` would import pandas, which takes longer than a small ingest.
    count = len(columns.labels)
    values = pa.Array.from_buffers(pa.uint8(), count * width, [None, pa.py_buffer(pixels)])
    names = [name.encode() for name in columns.names]
    ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
    if ends[-1] >= 2**31:  # Arrow's string columns have 32-bit offsets
        raise ValueError(f"The names of a split must have less than 2 GiB in all, but they have {ends[-1]} bytes.")
    name_buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(names))]
    arrays = [
        pa.FixedSizeListArray.from_arrays(values, width),
        _integer_array(columns.labels),
        _integer_array(columns.domain_ids),
        pa.Array.from_buffers(pa.string(), count, name_buffers),
    ]
    if columns.groups is not None:
        arrays.append(_integer_array(columns.groups))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _integer_array(values: NDArray[np.int64]) -> Any:
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values, np.int64))])


def _pixel_offsets(path: Path, splits: list[str]) -> dict[str, int]:
    """Byte offset of each split's first pixel in the file."""
    # Arrow does not tell offsets: the distance of the mapped pixels from the file's first mapped byte is the same.
    with pa.memory_map(str(path)) as mapped:
        whole = mapped.read_buffer()
        reader = pa.ipc.open_file(pa.BufferReader(whole))
        return {
            name: reader.get_batch(i).column("image").values.buffers()[1].address - whole.address
            for i, name in enumerate(splits)
        }


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, with size and SHA-256 of the data file.

    Last, since it marks the store as complete.
    """
    with open(folder / DATA, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
    text = json.dumps({**manifest, "bytes": size, "sha256": digest}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
