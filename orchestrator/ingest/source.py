"""Interface of the kinds of source.

A list of samples, with pixels either encoded or as arrays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DEFAULT_DOMAIN = "id"
"""Name of the only domain of a source without domains."""

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Split names of sources → split names of the store."""


class Sample(NamedTuple):
    """One image of a source, before it is opened."""

    name: str
    """Unique within the source, printable: a relative path, or `file#row`."""
    label: str
    """Class name."""
    domain: str
    split: str | None
    """`train`, `val` or `test` if the source has splits; None = to be drawn."""
    location: Any
    """Key by which the source's reader finds it."""


class SkippedEntry(NamedTuple):
    """A file or folder that is not a sample."""

    name: str
    reason: str


class Outcome(NamedTuple):
    """Result of decoding one sample."""

    reason: str | None
    """Why it is quarantined; None = decoded."""
    sha256: bytes
    """Of the encoded bytes; of the pixels, where a source has no encoded bytes."""
    pixels: bytes
    """SHA-256 of the upright RGB image at full size: equal for the same picture in another file format."""
    width: int
    height: int
    format: str
    notes: tuple[str, ...]
    thumbnail: bytes = b""
    """See `orchestrator.ingest.images.thumbnail`; empty where the image was not decoded."""


@dataclass
class Source(ABC):
    """A scanned source: all samples are listed, no image is opened."""

    kind: str
    """`folder`, `parquet`, `npz` or `digits`."""
    layout: str
    """The detected layout, in words."""
    samples: list[Sample]
    digest: str
    """SHA-256 over names, sizes and modification times of all files that would be read."""
    evaluation_domains: frozenset[str] = frozenset()
    """Domains that the source itself marks as OOD."""
    empty_domains: tuple[str, ...] = ()
    """Domains without any image."""
    ignored: list[SkippedEntry] = field(default_factory=list)
    """Files and folders that are not samples."""
    class_order: list[str] | None = None
    """Class names in the source's own order; None = by name, or by value where all are numbers."""


@dataclass
class EncodedSource(Source):
    """A source of encoded images, which decoder processes read."""

    @abstractmethod
    def chunks(self, positions: Sequence[int]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Requests to decoder processes, with the positions that each is for.

        Requests are JSON values, without the items.

        Args:
            positions: in `samples`, ascending.
        """


@dataclass
class ArraySource(Source):
    """A source of pixel arrays."""

    @abstractmethod
    def arrays(self) -> Iterator[tuple[int, NDArray[np.uint8] | NDArray[np.uint16]]]:
        """Blocks of samples: position of the first, and pixels.

        The position is in `samples`; pixels are (n, H, W) or (n, H, W, 3).
        """

    def shapes(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Number of samples, and their height and width in pixels, in the order of `samples`."""
        for _, pixels in self.arrays():
            yield len(pixels), (pixels.shape[1], pixels.shape[2])
