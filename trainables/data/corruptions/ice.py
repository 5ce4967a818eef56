"""Pictures of ice by a procedure of our own.

Hendrycks and Dietterich (2019) lay photographs of frosted glass over a picture, which are not ours to ship. Here the
ice is drawn: ridges of smooth noise at five scales, stretched in a direction of each scale's own, as frost flowers
grow. Its colours have the distribution of the photographs': the ranks of the drawn values are mapped to quantiles that
were measured in crops of them (`benchmarks/corruption_reference.py` prints the table), so that frost changes a picture
by as much as the published one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from trainables.data.corruptions.streams import ImageStreams

QUANTILES = (
    (0, 43, 56, 67, 78, 89, 102, 116, 131, 145, 160, 176, 190, 199, 207, 215, 255),
    (0, 62, 85, 104, 121, 132, 140, 148, 156, 164, 173, 184, 195, 204, 212, 221, 255),
    (0, 69, 96, 116, 134, 146, 155, 162, 169, 177, 185, 195, 205, 214, 222, 231, 255),
)
"""Of red, green and blue, at equal steps from the minimum to the maximum."""

CELLS = (3, 6, 12, 24, 48)
"""Cells of the noise along 224 pixels, from the coarsest scale to the finest."""

_LEVELS = 1024
"""Entries of the table from drawn values to colours."""
_SAMPLED = 16
"""One in so many values is ranked."""


def ice(height: int, width: int, scale: float, streams: ImageStreams) -> Tensor:
    """Ice (B, H, W, 3) float32 from 0 to 255.

    Args:
        scale: size of its pixels in those of the picture.
    """
    row = torch.linspace(-1, 1, height, device=streams.device)[:, None] * (height / (224 * scale))
    column = torch.linspace(-1, 1, width, device=streams.device)[None, :] * (width / (224 * scale))
    drawn = torch.zeros(len(streams), height, width, device=streams.device)
    grid = torch.empty(len(streams), height, width, 2, device=streams.device)
    for octave, cells in enumerate(CELLS):
        angle = streams.uniform(1, low=0.0, high=2 * math.pi)[:, :, None]
        offset = streams.uniform(2, low=-1.0, high=1.0)[:, :, None, None]
        noise = streams.uniform(1, 2 * cells, 2 * cells)
        # Twice as long as wide: the grid is stretched along the direction.
        sine, cosine = angle.sin() * 0.6, angle.cos() * 0.6
        torch.sub(row * cosine + offset[:, 1], column * sine, out=grid[..., 0])
        torch.add(row * (sine / 2) + offset[:, 0], column * (cosine / 2), out=grid[..., 1])
        smooth = functional.grid_sample(noise, grid, padding_mode="reflection", align_corners=False)[:, 0]
        drawn.add_(smooth.mul_(2).sub_(1).abs_(), alpha=-(0.6**octave))
    return _coloured(drawn)


def _coloured(drawn: Tensor) -> Tensor:
    """Values (B, H, W) mapped by their ranks to the quantiles of each channel, (B, H, W, 3)."""
    count = len(QUANTILES[0])
    flat = drawn.flatten(1)
    sample = flat[:, ::_SAMPLED].sort(1).values
    steps = torch.linspace(0, sample.shape[1] - 1, count, device=drawn.device).round().to(torch.int64)
    edges = sample[:, steps].contiguous()
    lowest, highest = edges[:, :1], edges[:, -1:]
    span = (highest - lowest).clamp_(min=1e-12)
    # Through a table of levels: a search per level, not per pixel.
    levels = lowest + span * torch.linspace(0, 1, _LEVELS, device=drawn.device)
    left = torch.searchsorted(edges, levels, right=True).sub_(1).clamp_(0, count - 2)
    low, high = edges.gather(1, left), edges.gather(1, left + 1)
    share = ((levels - low) / (high - low).clamp_(min=1e-12)).clamp_(0, 1)[:, :, None]
    table = torch.tensor(QUANTILES, dtype=torch.float32, device=drawn.device).T
    colours = (table[left] * (1 - share) + table[left + 1] * share).flatten(0, 1)
    level = ((flat - lowest) * ((_LEVELS - 1) / span)).clamp_(0, _LEVELS - 1).to(torch.int64)
    rows = torch.arange(len(drawn), device=drawn.device)[:, None] * _LEVELS
    return colours.index_select(0, (level + rows).flatten()).view(*drawn.shape, 3)
