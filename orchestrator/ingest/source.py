"""What every kind of source gives: a list of samples, and their pixels either encoded or as arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DEFAULT_DOMAIN = "id"
"""Name of the one domain of a source that knows no domains."""

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""How sources call their splits → how the store does."""


class Sample(NamedTuple):
    """One image of a source, before it is opened."""

    name: str
    """Unique within the source, fit to be shown: a relative path, or `file#row`."""
    label: str
    """Class name."""
    domain: str
    split: str | None
    """`train`, `val` or `test` where the source says so; None = to be drawn."""
    where: Any
    """What the source's reader needs to find it."""


class Left(NamedTuple):
    """Something that is not used, and why."""

    name: str
    reason: str


class Outcome(NamedTuple):
    """What became of one sample."""

    reason: str | None
    """Why it is in quarantine; None = it was decoded."""
    sha256: bytes
    """Of the encoded bytes (of the pixels, where a source has no encoded bytes)."""
    pixels: bytes
    """SHA-256 of the upright RGB image at its full size: the same for the same picture saved in another way."""
    width: int
    height: int
    format: str
    notes: tuple[str, ...]


@dataclass
class Source(ABC):
    """A source that has been listed, not yet read."""

    kind: str
    """`folder`, `parquet`, `npz` or `digits`."""
    layout: str
    """What was detected, in words."""
    samples: list[Sample]
    digest: str
    """SHA-256 over names, sizes and modification times of everything that would be read."""
    evaluation_domains: frozenset[str] = frozenset()
    """Domains that the source itself marks as OOD."""
    empty_domains: tuple[str, ...] = ()
    """Domains without a single image."""
    ignored: list[Left] = field(default_factory=list)
    """Files and folders that are no samples."""
    class_order: list[str] | None = None
    """Class names in the source's own order; None = by name, or by value where all are numbers."""


@dataclass
class EncodedSource(Source):
    """Samples are encoded images, which worker processes read and decode."""

    @abstractmethod
    def chunks(self, wanted: Sequence[int]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Work for the decoders: a JSON-able request without its items, and the positions in `samples` it is for.

        Args:
            wanted: positions in `samples`, rising.
        """


@dataclass
class ArraySource(Source):
    """Samples are rows of pixel arrays."""

    @abstractmethod
    def arrays(self) -> Iterator[tuple[int, NDArray[np.uint8] | NDArray[np.uint16]]]:
        """Runs of samples: position of the first in `samples`, and pixels (n, H, W) or (n, H, W, 3)."""
