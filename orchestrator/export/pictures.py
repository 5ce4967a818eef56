"""Pictures to predict: which there are, in which order, and their pixels as the training data store would hold them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orchestrator.ingest.decoding import DecodeJob, decode_all
from orchestrator.ingest.errors import DataError, existing, first_few, printable
from orchestrator.ingest.folder import EXTENSIONS, FolderSource, walk
from orchestrator.ingest.images import BadImageError, upright_rgb
from orchestrator.ingest.source import Sample, SkippedEntry
from trainables.models.backbone import DataConfig

CHUNK_BYTES = 2**28
"""Pixels that are decoded at a time, in a temporary file."""

HEADERS = 4096
"""Pictures whose headers are read at a time."""

Progress = Callable[[int, int, int], None]
"""Called with (pictures done, pictures in all, unreadable pictures)."""


@dataclass(frozen=True)
class Picture:
    """One picture that was asked for."""

    name: str
    """Its path below the folder that was given, or as it was given."""
    location: str
    """Absolute path."""


def images_or_files(
    pictures: str | Path | Sequence[str | Path | Image.Image],
) -> tuple[list[Image.Image], list[Path]]:
    """The Pillow images that were given to a model, or the files and folders; the other list is empty.

    Raises:
        ValueError: both were given.
    """
    if isinstance(pictures, str | Path):
        pictures = [pictures]
    images = [picture for picture in pictures if isinstance(picture, Image.Image)]
    if images and len(images) < len(pictures):
        raise ValueError("Pictures are either all files or folders, or all Pillow images, but got both.")
    return images, [Path(picture) for picture in pictures if not isinstance(picture, Image.Image)]


def upright_picture(image: Image.Image) -> Image.Image:
    """An image as RGB and upright, as the training data store would read it.

    Raises:
        ValueError: the image's mode has no declared range of values.
    """
    try:
        return upright_rgb(image)
    except BadImageError as error:
        raise ValueError(f"A picture must be one that training could read, but this one is not: {error}.") from error


@dataclass
class Listing:
    """The pictures of a command, each once, in their order."""

    pictures: list[Picture] = field(default_factory=list)
    ignored: list[SkippedEntry] = field(default_factory=list)
    """Files in folders that are no pictures by their name."""


@dataclass(frozen=True)
class DecodedChunk:
    """Pictures that were decoded together."""

    names: list[str]
    """Of the readable ones, in order."""
    pixels: NDArray[np.uint8]
    """(n, H, H, 3), of the readable ones."""
    unreadable: list[SkippedEntry]


@dataclass
class WholeChunk:
    """Whole pictures that were decoded together."""

    names: list[str] = field(default_factory=list)
    """Of the readable ones, in order."""
    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    """(H, W, 3) each, of the readable ones."""
    unreadable: list[SkippedEntry] = field(default_factory=list)


def list_pictures(paths: Sequence[Path]) -> Listing:
    """The pictures of files and folders.

    Files are taken in the order given, whatever their names end in. A folder's pictures (by the endings of
    `orchestrator.ingest.folder.EXTENSIONS`) come in the order of their paths, compared folder by folder and code point
    by code point, which is the same on every system. With one folder alone names are relative to it; else they begin
    with the path as it was given. A file that is named twice is taken once.

    Raises:
        DataError: nothing at a path, no permission to list a folder, or a folder without pictures.
    """
    listing = Listing()
    taken: set[str] = set()
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                existing(path)
            _add(listing, taken, os.fspath(path), path)
            continue
        tree = walk(existing(path), EXTENSIONS)
        if not tree.files:
            others = first_few(entry.name for entry in tree.ignored) or "nothing"
            raise DataError(
                f"A folder to predict must hold pictures, but {printable(str(path))} holds none (only {others}). "
                f"Pictures end in {first_few(sorted(EXTENSIONS), 8)}; name other files one by one."
            )
        prefix = "" if len(paths) == 1 else f"{os.fspath(path).rstrip(os.sep)}/"
        for file in tree.files:
            _add(listing, taken, f"{prefix}{file.path}", path / file.path)
        listing.ignored += [SkippedEntry(f"{prefix}{entry.name}", entry.reason) for entry in tree.ignored]
    return listing


def decoded(
    pictures: Sequence[Picture], preprocessing: DataConfig, progress: Progress | None = None
) -> Iterator[DecodedChunk]:
    """Decode pictures as training's data were decoded, in processes of their own, a chunk at a time.

    Raises:
        OSError: the temporary file cannot be written.
    """
    side = preprocessing.stored_size
    row_bytes = side * side * 3
    size = max(1, CHUNK_BYTES // row_bytes)
    unreadable = 0
    for start in range(0, len(pictures), size):
        chunk = _decode(pictures[start : start + size], preprocessing)
        unreadable += len(chunk.unreadable)
        if progress is not None:
            progress(min(start + size, len(pictures)), len(pictures), unreadable)
        yield chunk


def decoded_whole(pictures: Sequence[Picture], progress: Progress | None = None) -> Iterator[WholeChunk]:
    """Decode whole pictures at their own sizes, upright, in processes of their own, a chunk at a time.

    Raises:
        OSError: the temporary file cannot be written.
    """
    unreadable = 0
    done = 0
    for chunk in _of_equal_bytes(pictures):
        decoded = _decode_whole(chunk)
        unreadable += len(decoded.unreadable)
        done += len(chunk)
        if progress is not None:
            progress(done, len(pictures), unreadable)
        yield decoded


def _decode(pictures: Sequence[Picture], preprocessing: DataConfig) -> DecodedChunk:
    side = preprocessing.stored_size
    row_bytes = side * side * 3
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(len(pictures) * row_bytes)
        offsets = np.arange(len(pictures), dtype=np.int64) * row_bytes
        job = DecodeJob(side, preprocessing.interpolation, Path(file.name), offsets, preprocessing.image_size)
        outcomes = decode_all(_source(pictures), range(len(pictures)), job)
        readable = [position for position, outcome in outcomes.items() if outcome.reason is None]
        pixels = np.fromfile(file.name, np.uint8).reshape(-1, side, side, 3)[readable]
    failures = [
        SkippedEntry(pictures[position].name, outcome.reason)
        for position, outcome in outcomes.items()
        if outcome.reason is not None
    ]
    return DecodedChunk([pictures[position].name for position in readable], pixels, failures)


def _of_equal_bytes(pictures: Sequence[Picture]) -> Iterator[list[tuple[Picture, int]]]:
    """Chunks of pictures with the bytes of their pixels by their headers; 0 = the header cannot be read."""
    chunk: list[tuple[Picture, int]] = []
    total = 0
    for start in range(0, len(pictures), HEADERS):
        part = pictures[start : start + HEADERS]
        headers = decode_all(_source(part), range(len(part)), DecodeJob(None, "nearest"))
        for picture, header in zip(part, headers.values(), strict=True):
            size = 0 if header.reason is not None else header.width * header.height * 3
            if chunk and total + size > CHUNK_BYTES:
                yield chunk
                chunk = []
                total = 0
            chunk.append((picture, size))
            total += size
    if chunk:
        yield chunk


def _decode_whole(chunk: Sequence[tuple[Picture, int]]) -> WholeChunk:
    result = WholeChunk()
    sizes = np.array([size for _, size in chunk], np.int64)
    # Without room in the file a picture is decoded all the same: that gives the reason why it cannot be read.
    offsets = np.where(sizes > 0, np.cumsum(sizes) - sizes, -1)
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(int(sizes.sum()))
        source = _source([picture for picture, _ in chunk])
        outcomes = decode_all(source, range(len(chunk)), DecodeJob(0, "nearest", Path(file.name), offsets))
        for (picture, size), offset, outcome in zip(chunk, offsets.tolist(), outcomes.values(), strict=True):
            problem = outcome.reason
            if problem is None and outcome.width * outcome.height * 3 != size:
                problem = "the file has changed while it was read"
            if problem is not None:
                result.unreadable.append(SkippedEntry(picture.name, problem))
                continue
            values = np.fromfile(file.name, np.uint8, count=size, offset=offset)
            result.names.append(picture.name)
            result.pixels.append(values.reshape(outcome.height, outcome.width, 3))
    return result


def _source(pictures: Sequence[Picture]) -> FolderSource:
    return FolderSource(
        kind="folder",
        layout="",
        samples=[Sample(picture.name, "", "", None, picture.location) for picture in pictures],
        digest="",
        root=Path("/"),
    )


def _add(listing: Listing, taken: set[str], name: str, path: Path) -> None:
    location = os.path.abspath(path)
    if location not in taken:
        taken.add(location)
        listing.pictures.append(Picture(_encodable(name), location))


def _encodable(name: str) -> str:
    """The name itself, escaped only where it is no valid Unicode text and no file could hold it."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return printable(name)
    return name
