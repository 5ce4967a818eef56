"""Gaussian, shot and impulse noise."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.data.corruptions.filters import truncated
from trainables.data.corruptions.parameters import Parameters
from trainables.data.corruptions.streams import ImageStreams


def gaussian_noise(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """Normal noise of each value."""
    deviation = 255 * parameters.gaussian_noise[severity - 1]
    return truncated(streams.normal(*pixels.shape[1:]).mul_(deviation).add_(pixels))


def impulse_noise(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """Salt and pepper: a share of the values becomes 0 or 255."""
    share = parameters.impulse_noise[severity - 1]
    drawn = streams.uniform(*pixels.shape[1:])
    # All bits of a byte or none: several times as fast as filling by a mask on a CPU.
    salt = (drawn < share / 2).view(torch.uint8) * 255
    kept = (drawn < 1 - share / 2).view(torch.uint8) * 255
    return (pixels | salt) & kept


def shot_noise(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """Poisson noise: photons of a pixel that expects `photons` where it is white."""
    photons = parameters.shot_noise[severity - 1]
    table = _poisson_table(photons)
    probability = torch.from_numpy(table.probability).to(pixels.device)
    outcomes = torch.from_numpy(table.outcomes).to(pixels.device)
    # One draw chooses a column, and by its fraction between the column's two outcomes.
    drawn = streams.uniform(*pixels.shape[1:]).mul_(table.columns).flatten()
    column = drawn.to(torch.int32)
    cell = pixels.flatten().to(torch.int32).mul_(table.columns).add_(column)
    is_own = drawn.sub_(column) < probability.index_select(0, cell)
    chosen = torch.where(is_own, column, cell.add_(table.columns))
    return outcomes.index_select(0, chosen).view_as(pixels)


class _PoissonTable:
    """Alias table (Vose, 1991) of the noisy value for each of the 256 values of a pixel.

    Args:
        photons: expected number of a white pixel.
    """

    def __init__(self, photons: float) -> None:
        # Seven standard deviations, and more where the distribution is skewed.
        limit = int(photons + 7 * math.sqrt(photons)) + 10
        self.columns = 1 << limit.bit_length()
        """Number of outcomes, a power of two."""
        counts = np.arange(self.columns)
        rates = np.arange(1, 256)[:, None] / 255.0 * photons
        log_factorials = np.concatenate(([0.0], np.cumsum(np.log(counts[1:]))))
        probabilities = np.zeros((256, self.columns))
        probabilities[0, 0] = 1.0
        probabilities[1:] = np.exp(counts * np.log(rates) - rates - log_factorials)
        values = (np.clip(counts / photons, 0, 1) * 255).astype(np.uint8)
        share = np.empty((256, self.columns))
        other = np.empty((256, self.columns), dtype=np.int64)
        for row in range(256):
            share[row], other[row] = alias_table(probabilities[row] / probabilities[row].sum())
        self.probability = share.astype(np.float32).reshape(-1)
        """(256 · columns,): of the column's own outcome."""
        self.outcomes = np.concatenate((values, values[other].reshape(-1)))
        """(257 · columns,) uint8: the columns' own outcomes, and the other ones by value and column."""


@lru_cache(maxsize=10)
def _poisson_table(photons: float) -> _PoissonTable:
    return _PoissonTable(photons)


def alias_table(probabilities: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Share of each column's own outcome, and its other outcome (Vose, 1991).

    Args:
        probabilities: (n,) with the sum 1.

    Example:
        >>> share, other = alias_table(np.array([0.75, 0.25]))
        >>> share.tolist(), other.tolist()
        ([1.0, 0.5], [0, 0])
    """
    count = len(probabilities)
    share = probabilities * count
    other = np.arange(count)
    small = [index for index in range(count) if share[index] < 1]
    large = [index for index in range(count) if share[index] >= 1]
    while small and large:
        taker, giver = small.pop(), large[-1]
        other[taker] = giver
        share[giver] -= 1 - share[taker]
        if share[giver] < 1:
            small.append(large.pop())
    # What rounding leaves over is a whole column.
    share[small + large] = 1.0
    return share, other
