"""What every source yields: a listing of samples, each with a way to get its pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Decode = Callable[[int, str], NDArray[np.uint8]]
"""(side in pixels, interpolation) → uint8 (side, side, 3). Raises `BadImageError`."""


@dataclass(frozen=True)
class Sample:
    """One image of a source before it is read."""

    name: str
    """Path or row, for messages."""
    label: str
    domain: str
    decode: Decode
    split: str | None = None
    """`train`, `val` or `test` where the source decides, else None."""


@dataclass(frozen=True)
class Listing:
    """Everything that a source offers."""

    samples: list[Sample]
    layout: str
    """What was recognised, in words."""
    fingerprint: str
    """Changes when the source changes (names, sizes, times)."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Files that are no samples, by reason."""
    empty: list[str] = field(default_factory=list)
    """Class folders without an image."""
