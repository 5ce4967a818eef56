"""A decoder process: `python -m orchestrator.ingest.worker`.

JSON lines on stdin and stdout, one reply per request. Untrusted images are decoded here and not in the driver: a crash
or a decompression bomb ends this process alone, its memory is limited, and no object is pickled. It imports neither
torch nor ray, and pyarrow for Parquet only.

First line in:  {"target": path or null, "side": 224, "interpolation": "bicubic", "crop": null}
                with side null only the sizes in the headers are read
Reply:          {"ready": true}
Each request:   {"reader": "files", "root": …, "items": [[path, offset or null], …]}
                {"reader": "parquet", "file": …, "column": …, "group": …, "items": [[row, offset or null], …]}
Reply:          {"outcomes": [[reason or null, sha256 hex, pixels' hex, width, height, format, [notes],
                               thumbnail's base64], …]}
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
from typing import IO, Any

from PIL import Image

from orchestrator.ingest.images import MAX_BYTES, MAX_PIXELS, BadImageError, decode, header_size

MEMORY_LIMIT = 4 * 2**30
"""Limit of the address space, in bytes: 50 megapixels of 32 bits twice, and the libraries."""

Contents = Iterator[tuple[bytes | BadImageError, int | None]]
"""The encoded bytes of each item, or why they cannot be read, and the offset for its pixels."""


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
    job = json.loads(sys.stdin.readline())
    target = os.open(job["target"], os.O_WRONLY) if job["target"] is not None else None
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            outcomes = [
                _outcome(data, offset, target, (job["side"], job["interpolation"], job["crop"]))
                for data, offset in _contents(request)
            ]
        except OSError as error:  # the store could not be written, which no image is to blame for
            _reply(replies, {"error": f"{type(error).__name__}: {error}"})
        else:
            _reply(replies, {"outcomes": outcomes})


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


def _contents(request: dict[str, Any]) -> Contents:
    if request["reader"] == "parquet":
        yield from _parquet_contents(request)
        return
    for path, offset in request["items"]:
        try:
            yield _read_file(os.path.join(request["root"], path)), offset
        except BadImageError as error:
            yield error, offset
        except OSError as error:
            yield BadImageError(f"cannot be read: {error.strerror}"), offset


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


def _parquet_contents(request: dict[str, Any]) -> Contents:
    import pyarrow as pa

    from orchestrator.ingest.parquet import encoded_images

    items: Sequence[tuple[int, int | None]] = request["items"]
    images = encoded_images(request["file"], request["column"], request["group"], [row for row, _ in items])
    failure: BadImageError | None = None
    for _, offset in items:
        data = None
        # A generator that has raised is finished: one error costs all later rows of the group.
        if failure is None:
            try:
                data = next(images)
            except (pa.ArrowException, OSError, ValueError, StopIteration) as error:
                failure = BadImageError(f"row group {request['group']} is damaged: {error}")
        yield failure or data or BadImageError("the row has no image bytes (paths are not followed)"), offset


def _outcome(
    data: bytes | BadImageError, offset: int | None, target: int | None, square: tuple[int | None, str, int | None]
) -> list[Any]:
    """Decode one item and write its pixels; the fields of `orchestrator.ingest.source.Outcome` as JSON values."""
    if isinstance(data, BadImageError):
        return [str(data), "", "", 0, 0, "", [], ""]
    side, interpolation, crop = square
    if side is None:
        return _header_outcome(data)
    digest = hashlib.sha256(data).hexdigest()
    try:
        image = decode(data, side, interpolation, crop)
    except BadImageError as error:
        return [str(error), digest, "", 0, 0, "", [], ""]
    if target is not None and offset is not None:
        write_at(target, image.pixels.tobytes(), offset)
    thumbnail = base64.b64encode(image.thumbnail).decode()
    return [None, digest, image.digest.hex(), image.width, image.height, image.format, list(image.notes), thumbnail]


def _header_outcome(data: bytes) -> list[Any]:
    try:
        width, height = header_size(data)
    except BadImageError as error:
        return [str(error), "", "", 0, 0, "", [], ""]
    return [None, "", "", width, height, "", [], ""]


if __name__ == "__main__":
    main()
