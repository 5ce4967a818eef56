"""Random numbers of a batch of pictures, each from a stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


class ImageStreams:
    """Generators of each picture's own, so that its numbers depend on no other picture of the batch.

    Drawn on the CPU, so that they are the same on every device.

    Args:
        count: B, the number of pictures.
        seeds: gives the seeds of their streams; called at the first draw.
        device: of the numbers.
    """

    def __init__(self, count: int, seeds: Callable[[], Sequence[int]], device: torch.device) -> None:
        self._count = count
        self._make_seeds = seeds
        self.device = device

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _seeds(self) -> Sequence[int]:
        return self._make_seeds()

    # Two kinds of generators, because each is the faster one: torch's for normal, NumPy's for uniform numbers.

    @cached_property
    def _normal(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in self._seeds]

    @cached_property
    def _uniform(self) -> list[np.random.Generator]:
        return [np.random.Generator(np.random.SFC64(seed)) for seed in self._seeds]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers (B, *shape) float32."""
        values = torch.empty(len(self), *shape)
        for row, generator in zip(values, self._normal, strict=True):
            row.normal_(generator=generator)
        return values.to(self.device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers (B, *shape) float32."""
        values = torch.empty(len(self), *shape)
        for row, generator in zip(values.numpy(), self._uniform, strict=True):
            generator.random(out=row, dtype=np.float32)
        if (low, high) != (0.0, 1.0):
            values.mul_(high - low).add_(low)
        return values.to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform integers (B, *shape) int64 of `low` to `high - 1`, within one byte."""
        drawn = [generator.integers(low, high, shape, dtype=np.int8) for generator in self._uniform]
        return torch.from_numpy(np.stack(drawn)).to(self.device).long()
