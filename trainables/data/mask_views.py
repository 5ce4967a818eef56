"""Views of pictures with masks, as an evaluation sees them.

A view is a square that the network takes. Resized evaluation shows a whole picture in one view; sliding windows show
it in several. Masks keep their own size: predictions are scaled to them, never they to predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A rectangle of whole pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.width)


@dataclass(frozen=True)
class MaskView:
    """What one view shows."""

    sample: int
    """Position of the picture among those that the evaluation goes through."""
    shown: Box
    """The part of the view that holds picture; the rest is padding."""
    region: Box
    """The part of the picture that it shows, in the picture's own pixels."""
    mask: Tensor
    """(H, W) uint8, of the whole picture, on the device of the view."""
    completes: bool
    """Whether the picture has no later view."""
    side: int
    """Side of the view in pixels."""


class MaskViews(Sequence[MaskView]):
    """Targets of a batch of views, one per row.

    A slice, or a list of rows, gives the targets of these rows.
    """

    def __init__(self, views: Sequence[MaskView]) -> None:
        self._views = list(views)

    def __len__(self) -> int:
        return len(self._views)

    @overload
    def __getitem__(self, rows: int) -> MaskView: ...

    @overload
    def __getitem__(self, rows: slice | list[int]) -> MaskViews: ...

    def __getitem__(self, rows: int | slice | list[int]) -> MaskView | MaskViews:
        if isinstance(rows, int):
            return self._views[rows]
        if isinstance(rows, slice):
            return MaskViews(self._views[rows])
        return MaskViews([self._views[row] for row in rows])

    @property
    def samples(self) -> list[int]:
        """Picture of every view, see `MaskView.sample`."""
        return [view.sample for view in self._views]
