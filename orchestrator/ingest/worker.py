"""A decoder process: `python -m orchestrator.ingest.worker`.

JSON lines on stdin and stdout, one reply per request. Untrusted images are decoded here and not in the driver: a crash
or a decompression bomb ends this process alone, its memory is limited, and no object is pickled. It imports neither
torch nor ray, and pyarrow for Parquet only.

First line in:  {"target": path or null, "side": 224, "interpolation": "bicubic", "crop": null, "translation": null}
                with side null only the sizes in the headers are read; with side 0 whole images are decoded;
                with a translation, masks are written as class indices, else they are summarised
Reply:          {"ready": true}
Each request:   {"reader": "files", "root": …, "items": [[path, offset or null], …]}
                {"reader": "parquet", "file": …, "column": …, "group": …, "items": [[row, offset or null], …]}
                items of pictures with masks: [path or row, offset, path or row of the mask, its offset, [height, width]
                or null]; Parquet requests have "mask_column", too
Reply:          {"outcomes": [[reason or null, sha256 hex, pixels' hex, width, height, format, [notes],
                               thumbnail's base64, summary of the mask or null], …]}
                or {"error": text}
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import resource
import stat
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from PIL import Image

from orchestrator.ingest.images import MAX_BYTES, MAX_PIXELS, BadImageError, decode, header_size, upright_size
from orchestrator.ingest.masks import Translation, decode_mask, summary

MEMORY_LIMIT = 4 * 2**30
"""Limit of the address space, in bytes: 50 megapixels of 32 bits twice, and the libraries."""

Encoded = bytes | BadImageError
"""The encoded bytes of an item, or why they cannot be read."""


@dataclass(frozen=True)
class Job:
    """What is done with every item."""

    target: int | None
    """Descriptor of the file for the pixels."""
    side: int | None
    """Of the decoded squares; 0 = whole images, None = sizes alone."""
    interpolation: str
    crop: int | None
    translation: Translation | None
    """Of masks that are written."""


@dataclass(frozen=True)
class Item:
    """One sample, and where its pixels are written."""

    image: Any
    """Path or row."""
    offset: int | None
    mask: Any = None
    mask_offset: int | None = None
    size: Sequence[int] | None = None
    """Height and width that the row of the store has room for; None = that of the squares."""


def main() -> None:
    """Serve requests until stdin ends."""
    # A hard limit: a decompression bomb gets a MemoryError here instead of triggering the machine's OOM killer.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    warnings.simplefilter("ignore")
    # Pillow only warns up to twice its limit of pixels.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    replies = sys.stdout
    sys.stdout = sys.stderr  # a library that prints must not garble the protocol
    job = _job(json.loads(sys.stdin.readline()))
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        items = [Item(*fields) for fields in request["items"]]
        try:
            outcomes = [
                _outcome(item, image, mask, job)
                for item, (image, mask) in zip(items, _contents(request, items), strict=True)
            ]
        except OSError as error:  # the store could not be written, which no image is to blame for
            _reply(replies, {"error": f"{type(error).__name__}: {error}"})
        else:
            _reply(replies, {"outcomes": outcomes})


def _job(fields: dict[str, Any]) -> Job:
    translation = fields["translation"]
    return Job(
        target=os.open(fields["target"], os.O_WRONLY) if fields["target"] is not None else None,
        side=fields["side"],
        interpolation=fields["interpolation"],
        crop=fields["crop"],
        translation=None if translation is None else Translation.from_json(translation),
    )


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at a byte offset of a file.

    Safe for concurrent writers of other offsets.

    Raises:
        OSError: the file system refused the write.
    """
    while data:
        # `pwrite` moves no shared file position, so that decoders may write concurrently.
        written = os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset += written


def _reply(out: IO[str], message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _contents(request: dict[str, Any], items: Sequence[Item]) -> Iterator[tuple[Encoded, Encoded | None]]:
    """Image and mask of each item; the mask is None where there is none."""
    if request["reader"] == "parquet":
        yield from _parquet_contents(request, items)
        return
    for item in items:
        image = _file_content(request["root"], item.image)
        yield image, None if item.mask is None else _file_content(request["root"], item.mask)


def _file_content(root: str, path: str) -> Encoded:
    try:
        return _read_file(os.path.join(root, path))
    except BadImageError as error:
        return error
    except OSError as error:
        return BadImageError(f"cannot be read: {error.strerror}")


def _read_file(path: str) -> bytes:
    # A pipe that has replaced the file since the scan must not block, and a huge file must not fill the memory.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadImageError(f"{status.st_size / 2**20:.0f} MiB is over the limit of {MAX_BYTES // 2**20} MiB")
        return file.read()


def _parquet_contents(request: dict[str, Any], items: Sequence[Item]) -> Iterator[tuple[Encoded, Encoded | None]]:
    images = _column_contents(request, request["column"], items)
    mask_column = request.get("mask_column")
    if mask_column is None:
        yield from ((image, None) for image in images)
    else:
        yield from zip(images, _column_contents(request, mask_column, items), strict=True)


def _column_contents(request: dict[str, Any], column: str, items: Sequence[Item]) -> Iterator[Encoded]:
    import pyarrow as pa

    from orchestrator.ingest.parquet import encoded_images

    images = encoded_images(request["file"], column, request["group"], [item.image for item in items])
    failure: BadImageError | None = None
    for _ in items:
        data = None
        # A generator that has raised is finished: one error costs all later rows of the group.
        if failure is None:
            try:
                data = next(images)
            except (pa.ArrowException, OSError, ValueError, StopIteration) as error:
                failure = BadImageError(f"row group {request['group']} is damaged: {error}")
        yield failure or data or BadImageError("the row has no image bytes (paths are not followed)")


def _outcome(item: Item, data: Encoded, mask: Encoded | None, job: Job) -> list[Any]:
    """Decode one item and write its pixels; the fields of `orchestrator.ingest.source.Outcome` as JSON values."""
    if isinstance(data, BadImageError):
        return _failed(data)
    digest = "" if job.side is None else hashlib.sha256(data).hexdigest()
    try:
        if job.side is None and mask is None:
            width, height = header_size(data)
            return [None, "", "", width, height, "", [], "", None]
        if job.side is None:
            width, height, turned = upright_size(data)
            notes = ["rotated_by_exif"] if turned else []
            return [None, "", "", width, height, "", notes, "", _mask_outcome(item, mask, job)]
        image = decode(data, job.side or None, job.interpolation, job.crop)
        if item.size is not None and list(image.pixels.shape[:2]) != list(item.size):
            raise BadImageError(f"{image.width} x {image.height} is not the size that its header had before")
        fields = _mask_outcome(item, mask, job) if mask is not None else None
    except BadImageError as error:
        return _failed(error, digest)
    if job.target is not None and item.offset is not None:
        write_at(job.target, image.pixels.tobytes(), item.offset)
    thumbnail = base64.b64encode(image.thumbnail).decode()
    return [
        None, digest, image.digest.hex(), image.width, image.height, image.format, list(image.notes), thumbnail, fields
    ]  # fmt: skip


def _mask_outcome(item: Item, data: Encoded | None, job: Job) -> list[Any] | None:
    """Write a mask as class indices, or summarise it; `MaskOutcome.to_json` of a summary.

    Raises:
        BadImageError: the mask cannot be used.
    """
    try:
        if data is None or isinstance(data, BadImageError):
            raise data or BadImageError("missing")
        mask = decode_mask(data)
        if job.translation is None:
            return summary(mask).to_json()
        indices = job.translation.apply(mask)
    except BadImageError as error:
        raise BadImageError(f"mask {item.mask}: {error}") from error
    if item.size is not None and list(indices.shape) != list(item.size):
        raise BadImageError(f"mask {item.mask}: {indices.shape[1]} x {indices.shape[0]} is not the size of its picture")
    if job.target is not None and item.mask_offset is not None:
        write_at(job.target, indices.tobytes(), item.mask_offset)
    return None


def _failed(error: BadImageError, digest: str = "") -> list[Any]:
    return [str(error), digest, "", 0, 0, "", [], "", None]


if __name__ == "__main__":
    main()
