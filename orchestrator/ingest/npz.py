"""MedMNIST-style `.npz`: train_images, train_labels, val_…, test_…."""

from __future__ import annotations

import hashlib
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.ingest.errors import DataError
from orchestrator.ingest.folder import SINGLE
from orchestrator.ingest.images import resize
from orchestrator.ingest.samples import Listing, Sample


def list_npz(root: Path) -> Listing:
    """Samples of a `.npz` file; arrays are uint8 (n, H, W) or (n, H, W, 3), labels (n,) or (n, 1) integers.

    Raises:
        DataError: no file, not an `.npz`, pickled contents, or arrays of other shapes or types.
    """
    if not root.is_file():
        raise DataError(f"data.root must be a .npz file, but {root} is not there.")
    try:
        with np.load(root, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{root} must be a NumPy .npz of plain arrays, but could not be read: {error}") from None
    samples: list[Sample] = []
    for split in ("train", "val", "test"):
        if f"{split}_images" in arrays:
            samples += _samples(root, split, arrays)
    if not samples:
        raise DataError(f"{root} needs arrays train_images and train_labels, but has {', '.join(arrays) or 'none'}.")
    status = root.stat()
    digest = hashlib.sha256(f"{root.name} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    return Listing(samples, "NumPy archive: train_images, train_labels, …", digest)


def _samples(root: Path, split: str, arrays: dict[str, Any]) -> list[Sample]:
    images, labels = arrays[f"{split}_images"], arrays.get(f"{split}_labels")
    if labels is None or len(labels) != len(images):
        raise DataError(
            f"{root}: {split}_labels must have one label per image ({len(images)}), but has "
            f"{'none' if labels is None else len(labels)}."
        )
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(
            f"{root}: {split}_images must be uint8 (n, H, W) or (n, H, W, 3), but is {images.dtype} {images.shape}."
        )
    flat = labels.reshape(len(labels), -1)
    if flat.shape[1] != 1 or not np.issubdtype(labels.dtype, np.integer) or (len(flat) and flat.min() < 0):
        raise DataError(
            f"{root}: {split}_labels must be non-negative integers, one per image, but is {labels.dtype} "
            f"{labels.shape}. (Several labels per image are not supported.)"
        )
    width = len(str(int(flat.max()))) if len(flat) else 1
    return [
        Sample(f"{root.name}[{split} {i}]", f"{int(flat[i, 0]):0{width}d}", SINGLE, partial(_decode, images, i), split)
        for i in range(len(images))
    ]


def _decode(images: NDArray[np.uint8], row: int, side: int, interpolation: str) -> NDArray[np.uint8]:
    return resize(images[row], side, interpolation)
