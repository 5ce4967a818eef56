"""The Arrow store: pixels of all samples at the training resize, memory-mapped, shared by all trials of a machine.

A store is a folder with `data.arrow` (an Arrow IPC file: one record batch per split, so that each split is one
contiguous block) and `manifest.json` (what was read, counts, SHA-256). It is written by `orchestrator.ingest`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainables.data.splits import fraction_count

DATA, MANIFEST = "data.arrow", "manifest.json"


class StoreError(ValueError):
    """The folder is not a complete store."""


class Store:
    """An opened store. Opens its file on first use and pickles as its path.

    Raises:
        StoreError: no complete store lies at `path`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = self.path / MANIFEST
        if not manifest.is_file() or not (self.path / DATA).is_file():
            raise StoreError(
                f"A store is a folder with {DATA} and {MANIFEST}, but {self.path} is none. Run the study "
                "again to make it from the source."
            )
        self.manifest: dict[str, Any] = json.loads(manifest.read_text())
        size = (self.path / DATA).stat().st_size
        if size != self.manifest["bytes"]:
            raise StoreError(
                f"{self.path / DATA} must have {self.manifest['bytes']} bytes, but has {size}. Delete the "
                "folder; the next run makes it again."
            )
        self.classes: list[str] = list(self.manifest["classes"])
        self.domains: list[str] = list(self.manifest["domains"])
        self.splits: list[str] = list(self.manifest["splits"])
        self.digest: str = self.manifest["sha256"]
        self.image_size: int = int(self.manifest["image_size"])
        self._batches: dict[str, pa.RecordBatch] | None = None

    def images(self, split: str) -> NDArray[np.uint8]:
        """Pixels (n, H, W, 3) as a read-only view of the mapped file: nothing is copied."""
        flat = self._batch(split).column("image").flatten().to_numpy(zero_copy_only=True)
        return flat.reshape(-1, self.image_size, self.image_size, 3)

    def labels(self, split: str) -> NDArray[np.int64]:
        """Labels (n,), positions in `classes`."""
        return self._batch(split).column("label").to_numpy(zero_copy_only=True)

    def domain_ids(self, split: str) -> NDArray[np.int64]:
        """Domains (n,), positions in `domains`."""
        return self._batch(split).column("domain").to_numpy(zero_copy_only=True)

    def fraction(self, split: str, fraction: float) -> int:
        """How many of the first samples of a split are the fraction `fraction` of each class (for `train`, which lies
        in nested stratified order)."""
        return fraction_count(self.labels(split), fraction)

    def verify(self) -> None:
        """Compare the file with its digest (reads all of it).

        Raises:
            StoreError: the file was changed.
        """
        with open(self.path / DATA, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.digest:
            raise StoreError(
                f"{self.path / DATA} must have the SHA-256 {self.digest}, but has {found}. Delete the "
                "folder; the next run makes it again."
            )

    def _batch(self, split: str) -> pa.RecordBatch:
        if self._batches is None:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path / DATA)))
            self._batches = {name: reader.get_batch(i) for i, name in enumerate(self.splits)}
        if split not in self._batches:
            raise ValueError(f"A split is one of {', '.join(self.splits)}, but got {split!r}.")
        return self._batches[split]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def write_store(
    folder: Path,
    parts: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]],
    classes: list[str],
    domains: list[str],
    notes: Mapping[str, Any],
) -> Store:
    """Write a store into an existing folder, the manifest last.

    Args:
        parts: split → pixels (n, S, S, 3), labels (n,), domains (n,); pixels may be memory-mapped.
        notes: more fields of the manifest.
    """
    side = next(iter(parts.values()))[0].shape[1]
    schema = pa.schema(
        [("image", pa.list_(pa.uint8(), side * side * 3)), ("label", pa.int64()), ("domain", pa.int64())]
    )
    with pa.OSFile(str(folder / DATA), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for images, labels, domain_ids in parts.values():
            pixels = pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), side * side * 3)
            writer.write_batch(pa.record_batch([pixels, pa.array(labels), pa.array(domain_ids)], schema=schema))
    with open(folder / DATA, "rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    manifest = {
        "version": 1,
        "image_size": side,
        "classes": classes,
        "domains": domains,
        "splits": list(parts),
        "counts": {name: len(labels) for name, (_, labels, _) in parts.items()},
        "bytes": (folder / DATA).stat().st_size,
        "sha256": digest,
        **notes,
    }
    with open(folder / MANIFEST, "w", encoding="utf-8") as text:
        json.dump(manifest, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    return Store(folder)
