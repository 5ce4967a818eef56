"""The data store: uint8 pixels in one memory-mapped Arrow file, and a manifest.

A store is a folder with `data.arrow` (one record batch per split; columns `image`, `label`, `domain`, `name`, and
`group` where equal or nearly equal images lie in several ID domains) and `manifest.json`. The folder is renamed into
place when both are complete, so a store that exists is complete.
`StoreLike` is what training needs of it; tests and benchmarks implement it in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from trainables.data.splits import fraction_size
from trainables.storage.arrow_files import footer_problem

Indices = NDArray[np.int64]
Number = TypeVar("Number", np.uint8, np.int64)

DATA = "data.arrow"
MANIFEST = "manifest.json"
FORMAT = 1
"""Version of the layout; a store of another version is refused."""


class StoreLike(Protocol):
    """The part of `Store` that training uses."""

    @property
    def classes(self) -> list[str]: ...

    @property
    def domains(self) -> list[str]: ...

    @property
    def splits(self) -> list[str]: ...

    @property
    def digest(self) -> str: ...

    @property
    def image_size(self) -> int: ...

    def images(self, split: str) -> NDArray[np.uint8]: ...

    def labels(self, split: str) -> Indices: ...

    def domain_ids(self, split: str) -> Indices: ...

    def names(self, split: str) -> list[str]: ...

    def groups(self, split: str) -> Indices: ...

    def fraction(self, split: str, fraction: float, /) -> int: ...


@runtime_checkable
class MaskStoreLike(StoreLike, Protocol):
    """A store of pictures with masks, of different sizes."""

    def pictures(self, split: str) -> Sequence[NDArray[np.uint8]]:
        """Pictures (H, W, 3), read-only."""

    def masks(self, split: str) -> Sequence[NDArray[np.uint8]]:
        """Their masks (H, W), read-only."""

    def sizes(self, split: str) -> NDArray[np.int64]:
        """Height and width of each, (n, 2)."""


class StoreError(ValueError):
    """Not a data store, or a damaged one."""


class Store:
    """An ingested data set; files are opened at first use.

    It pickles as its path: each process maps the file itself, and all processes of a machine share its pages.

    Args:
        path: folder of the store.
    """

    def __init__(self, path: str | Path) -> None:
        # A store is pickled as its path, and Ray's workers have another working directory.
        self.path = Path(path).absolute()
        self._images: dict[str, NDArray[np.uint8]] = {}

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (str(self.path),)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest: source, splits, counts, quarantined images and statistics.

        Raises:
            StoreError: there is no complete store at the path, or one of another version.
        """
        try:
            manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            size = (self.path / DATA).stat().st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"A data store is a folder with {DATA} and {MANIFEST}, but {self.path} is none. Run the study again."
            ) from error
        except ValueError as error:
            raise StoreError(
                f"{self.path / MANIFEST} must be JSON, but it is not ({error}). Delete {self.path}: the next run reads "
                "the data again."
            ) from error
        if manifest.get("format") != FORMAT:
            raise StoreError(
                f"A data store of format {FORMAT} is needed, but {self.path} has format {manifest.get('format')!r}. "
                f"Delete {self.path}: the next run reads the data again."
            )
        # The size at every start; the digest, which takes a read of the whole file, in `verify` only.
        if size != manifest["bytes"]:
            raise StoreError(
                f"{self.path / DATA} must have {manifest['bytes']} bytes, but it has {size}. "
                f"Delete {self.path}: the next run reads the data again."
            )
        return manifest

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `data.arrow`, in hex; covers pixels, labels, domains, names, order and splits."""
        return str(self.manifest["sha256"])

    @cached_property
    def classes(self) -> list[str]:
        """Class names, by label."""
        return list(self.manifest["classes"])

    @cached_property
    def domains(self) -> list[str]:
        """Domain names, by domain id: the ID domains, then the OOD domains."""
        return list(self.manifest["domains"])

    @cached_property
    def splits(self) -> list[str]:
        """`train`, `val`, `test`, then `ood/<domain>` for every OOD domain."""
        return list(self.manifest["splits"])

    @cached_property
    def image_size(self) -> int:
        """Height and width of the stored images, in pixels."""
        return int(self.manifest["image_size"])

    def images(self, split: str) -> NDArray[np.uint8]:
        """Pixels (n, H, W, 3) uint8, a read-only view of the mapped file."""
        if split not in self._images:
            side = self.image_size
            pixels = _view(self._column(split, "image").values, np.uint8)
            self._images[split] = pixels.reshape(-1, side, side, 3)
        return self._images[split]

    def labels(self, split: str) -> NDArray[np.int64]:
        """Labels (n,) int64, indices into `classes`; read-only."""
        return _view(self._column(split, "label"), np.int64)

    def domain_ids(self, split: str) -> NDArray[np.int64]:
        """Domains (n,) int64, indices into `domains`; read-only."""
        return _view(self._column(split, "domain"), np.int64)

    def names(self, split: str) -> list[str]:
        """Origin of each sample: its path or row within the source, control characters escaped."""
        return list(self._column(split, "name").to_pylist())

    def groups(self, split: str) -> NDArray[np.int64]:
        """Group (n,) int64 of images that have equal or nearly equal ones in another ID domain; -1 for the others."""
        if "group" not in self._batches[split].schema.names:
            return np.full(len(self.labels(split)), -1, np.int64)
        return _view(self._column(split, "group"), np.int64)

    def fraction(self, split: str, f: float) -> int:
        """Length of the prefix with the share `f` of every class, see `splits.nested_order`."""
        return fraction_size(self.labels(split), f)

    def verify(self) -> None:
        """Compare the data file with the manifest, and the manifest with its metadata.

        Raises:
            StoreError: one of the two has changed since it was written.
        """
        with open(self.path / DATA, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != self.digest:
            raise StoreError(
                f"{self.path / DATA} must have the SHA-256 {self.digest}, but it has {actual}: the file is damaged. "
                f"Delete {self.path}: the next run reads the data again."
            )
        # The manifest has no digest of its own, and a flipped bit in the name of a class is still valid JSON.
        differing = [name for name, value in self._arrow_metadata().items() if self.manifest.get(name) != value]
        if differing:
            raise StoreError(
                f"{self.path / MANIFEST} must agree with {DATA}, but they differ in {', '.join(differing)}: the "
                f"manifest is damaged. Delete {self.path}: the next run reads the data again."
            )

    def _arrow_metadata(self) -> dict[str, Any]:
        """Classes, domains, splits and size from the schema of `data.arrow`.

        Empty if another program wrote the file.
        """
        import pyarrow as pa

        self._check_no_extension_types()
        with pa.memory_map(str(self.path / DATA)) as file:
            text = (pa.ipc.open_file(file).schema.metadata or {}).get(b"luthier", b"{}")
        metadata: dict[str, Any] = json.loads(text)
        return metadata

    @cached_property
    def _batches(self) -> dict[str, Any]:
        import pyarrow as pa

        names = self.splits
        self._check_no_extension_types()
        try:
            # Never closed: the columns are views of the mapped file.
            reader = pa.ipc.open_file(pa.memory_map(str(self.path / DATA)))
            return {name: reader.get_batch(index) for index, name in enumerate(names)}
        except pa.ArrowException as error:
            raise self._not_plain(f"cannot be read as one ({error})") from error

    def _check_no_extension_types(self) -> None:
        # Parsing a schema builds its extension types, and Ray registers one in every worker that unpickles its
        # metadata.
        problem = footer_problem(self.path / DATA)
        if problem is not None:
            raise self._not_plain(problem)

    def _not_plain(self, problem: str) -> StoreError:
        return StoreError(
            f"{self.path / DATA} must be an Arrow file of plain columns, but it {problem}. Delete {self.path}: the "
            "next run reads the data again."
        )

    def _column(self, split: str, name: str) -> Any:
        if split not in self._batches:
            raise ValueError(f"A split is one of {', '.join(self.splits)}, but got {split!r}.")
        return self._batches[split].column(name)


def _view(column: Any, kind: type[Number]) -> NDArray[Number]:
    """The values of an Arrow array without nulls, without a copy."""
    # Arrow's own `to_numpy` would import pandas, which takes longer than the rest of opening a store.
    return np.frombuffer(column.buffers()[1], kind, count=len(column), offset=column.offset * np.dtype(kind).itemsize)
