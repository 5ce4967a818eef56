"""MedMNIST-style `.npz`: `train_images`, `train_labels`, `val_…`, `test_…`; in a folder, each file is a domain."""

from __future__ import annotations

import contextlib
import hashlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.ingest.errors import SOURCE_HINT, DataError, first_few, printable
from orchestrator.ingest.source import DEFAULT_DOMAIN, ArraySource, Sample

SPLITS = ("train", "val", "test")
_BLOCK_BYTES = 16 * 2**20
"""Pixels that are read at a time."""
_DAMAGED = (
    OSError, ValueError, EOFError, KeyError, TypeError, NotImplementedError, RuntimeError, SyntaxError, MemoryError,
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
)  # fmt: skip
"""Exceptions that a damaged archive, or the header of an array in it, can raise."""
_PIXEL_TYPES = (np.dtype(np.uint8), np.dtype("<u2"))


@dataclass(frozen=True)
class _Part:
    """One array `<split>_images` of one file."""

    file: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass
class NpzSource(ArraySource):
    """Image arrays, read from the archive a few megabytes at a time.

    No pickle is loaded.
    """

    parts: list[_Part] = field(default_factory=list)

    def arrays(self) -> Iterator[tuple[int, NDArray[np.uint8] | NDArray[np.uint16]]]:
        first = 0
        for part in self.parts:
            row_bytes = int(np.prod(part.shape[1:])) * part.dtype.itemsize
            rows = max(1, _BLOCK_BYTES // row_bytes)
            with _readable(part), zipfile.ZipFile(part.file) as archive, archive.open(f"{part.member}.npy") as stream:
                _header(stream)
                for start in range(0, part.shape[0], rows):
                    count = min(rows, part.shape[0] - start)
                    # With the last block zipfile compares the member's CRC.
                    data = stream.read(count * row_bytes)
                    if len(data) < count * row_bytes:
                        raise EOFError("it ends too early")
                    pixels = np.frombuffer(data, part.dtype).reshape(count, *part.shape[1:])
                    if pixels.ndim == 4 and pixels.shape[3] == 1:
                        pixels = pixels[..., 0]
                    yield first + start, pixels
            first += part.shape[0]

    def shapes(self) -> Iterator[tuple[int, tuple[int, int]]]:
        for part in self.parts:
            yield part.shape[0], (part.shape[1], part.shape[2])


@contextlib.contextmanager
def _readable(part: _Part) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(
            f"{part.member} in {printable(str(part.file))} is damaged ({error}). Give an undamaged file."
        ) from error


def scan_npz(root: Path) -> NpzSource:
    """List the images of one `.npz` file, or of all files directly in a folder.

    Raises:
        DataError: no or damaged files; arrays missing or of other types or shapes; labels that are no classes.
    """
    files = [root] if root.is_file() else sorted(p for p in root.glob("*.npz") if p.is_file())
    if not files:
        raise DataError(
            f"An npz source needs files that end in .npz, but {printable(str(root))} holds none. {SOURCE_HINT}"
        )
    digest = hashlib.sha256()
    parts: list[_Part] = []
    samples: list[Sample] = []
    for file in files:
        status = file.stat()
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        domain = DEFAULT_DOMAIN if len(files) == 1 else printable(file.stem)
        for split, part, labels in _parts(file):
            parts.append(part)
            samples += [
                Sample(f"{printable(file.name)}/{part.member}#{row}", label, domain, split, None)
                for row, label in enumerate(labels)
            ]
    present = {sample.split for sample in samples}
    splits = "|".join(split for split in SPLITS if split in present)
    return NpzSource(
        kind="npz",
        layout=f"{len(files)} .npz file{'s' * (len(files) > 1)} with {splits} arrays",
        samples=samples,
        digest=digest.hexdigest(),
        parts=parts,
    )


def _parts(file: Path) -> Iterator[tuple[str, _Part, list[str]]]:
    """Split, images and labels of one file."""
    name = printable(file.name)
    try:
        if not zipfile.is_zipfile(file):  # NumPy would suggest to load it as a pickle
            raise ValueError("it is no zip archive")
        with np.load(file, allow_pickle=False) as archive, zipfile.ZipFile(file) as members:
            if "train_images" not in archive.files or "train_labels" not in archive.files:
                raise DataError(
                    "An .npz file needs the arrays train_images and train_labels, and may have val_ and test_ ones, "
                    f"but {name} has {first_few(map(printable, archive.files)) or 'none'}."
                )
            for split in SPLITS:
                if f"{split}_images" not in archive.files:
                    continue
                with members.open(f"{split}_images.npy") as stream:
                    shape, dtype = _header(stream)
                part = _Part(file, f"{split}_images", shape, dtype)
                _check_images(part, name)
                labels = _labels(archive, f"{split}_labels", shape[0], name)
                yield split, part, labels
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(
            f"{name} must be an .npz file of plain arrays, but it cannot be read as one: {str(error).rstrip('.')}. "
            "Give an undamaged file, as numpy.savez writes it."
        ) from error


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if fortran and len(shape) > 1:
        raise ValueError("its images are in column-major order; save np.ascontiguousarray(images)")
    return shape, dtype


def _check_images(part: _Part, name: str) -> None:
    shape = part.shape
    is_image_shape = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    if not is_image_shape or part.dtype not in _PIXEL_TYPES or min(shape[1:3], default=0) < 1:
        raise DataError(
            f"{part.member} must be uint8 or uint16 of shape (n, H, W), (n, H, W, 1) or (n, H, W, 3), but in {name} "
            f"it is {part.dtype} of shape {shape}."
        )


def _labels(archive: Any, key: str, count: int, name: str) -> list[str]:
    """One class name per image, from integers of shape (n,) or (n, 1)."""
    if key not in archive.files:
        raise DataError(f"Every array of images needs one of labels, but {name} has no {key}.")
    labels = archive[key]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{key} must hold one integer per image, shape ({count},) or ({count}, 1), but in {name} it is "
            f"{labels.dtype} of shape {labels.shape}."
        )
    negative = np.flatnonzero(labels < 0)
    if len(negative):
        listed = first_few([f"{i} has {labels[i]}" for i in negative])
        raise DataError(f"{key} must hold numbers from 0, but in {name} row {listed}.")
    return [str(int(label)) for label in labels]
