"""Gradient accumulation over micro-batches where memory runs out; the batch stays what it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

log = logging.getLogger("luthier")

Result = TypeVar("Result")


class MicroBatch:
    """Number of images that go through the network at once.

    Unlimited at first, halved whenever memory runs out.

    BatchNorm in training mode normalises each piece by its own statistics, so that a halved batch is not the same
    training for such networks; everywhere else it is, to rounding.

    Example:
        >>> micro_batch = MicroBatch()
        >>> micro_batch.size = 3
        >>> list(micro_batch.pieces(7))
        [slice(0, 3, None), slice(3, 6, None), slice(6, 7, None)]
    """

    def __init__(self) -> None:
        self.size: int | None = None
        """None = memory has always sufficed."""

    def pieces(self, count: int) -> Iterator[slice]:
        """Slices of a batch of `count` images, each of at most `size`."""
        size = count if self.size is None else min(self.size, count)
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def attempt(self, work: Callable[[], Result], count: int, what: str) -> Result:
        """Do `work`, with half the micro-batch size as long as memory runs out.

        `work` cuts a batch of `count` images into `pieces`.

        Raises:
            torch.OutOfMemoryError: not even one image at a time fits.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                size = min(count, self.size or count)
                if size == 1:
                    raise
                self.size = (size + 1) // 2
            # Outside of `except`, whose traceback keeps the failed pass's tensors alive.
            if torch.cuda.is_available():
                # Cached blocks of the size that failed leave no room for others.
                torch.cuda.empty_cache()
            log.warning("Memory ran out while %s %d images at once; going on with %d at a time.", what, size, self.size)
