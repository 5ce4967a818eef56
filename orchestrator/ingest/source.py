"""Interface of the kinds of source.

A list of samples, with pixels either encoded or as arrays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.ingest.label_map import LabelMap
from orchestrator.ingest.masks import MaskOutcome, Translation

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
    mask: Any = None
    """Key by which the source's reader finds the mask of the picture; None = no mask."""


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
    mask: MaskOutcome | None = None
    """None = the sample has no mask, or it was not summarised."""


@dataclass(frozen=True)
class MaskSurvey:
    """Classes, sizes and pixels of the masks of a source. Rows are positions in `samples`."""

    translation: Translation
    sizes: NDArray[np.int64]
    """(n, 2): height and width of each picture as shown; 0 where it cannot be read."""
    pixels: NDArray[np.int64]
    """(n, K + 1): pixels of each class, then ignored ones."""
    digests: tuple[str, ...]
    """Of the values of each mask; empty where it cannot be read."""
    positions: tuple[int, ...]
    """Position of each sample in the scan, of which splits without any labelled pixel were left out."""
    unreadable: Mapping[int, str]
    """Position → why the picture's header or the mask cannot be read."""

    @property
    def classes(self) -> list[str]:
        """Class names, by index."""
        return list(self.translation.classes)

    @property
    def labelled(self) -> NDArray[np.int64]:
        """(n,) pixels that are not ignored."""
        return np.asarray(self.pixels[:, :-1].sum(axis=1))


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
    label_map: LabelMap | None = None
    """Label map that was found beside the masks, or that the names of the masks tell."""
    declared_labels: bool = False
    """Whether classes of masks are declared or found, rather than one per value."""
    remarks: list[str] = field(default_factory=list)
    """What was decided about pictures with masks, one sentence each."""
    warnings: list[str] = field(default_factory=list)
    """What affects the numbers of a study on pictures with masks, one sentence each."""
    survey: MaskSurvey | None = None
    """What the masks hold; None = no masks, or not read yet."""


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
