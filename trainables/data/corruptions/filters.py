"""Blurs, displacements and enlargements that several corruptions share.

All take and return pixels (B, H, W, C), and compute each picture's values independently of its batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainables.data.corruptions.parameters import Motion

SLACK = 1e-3
"""Added before a value of 0 to 255 is truncated: a sum of weights that is 1 but for rounding keeps a flat area as it
is."""

_NEGLIGIBLE = 1e-7
"""Weights of a blur below this change no 8-bit value."""


def truncated(values: Tensor) -> Tensor:
    """Values on a scale from 0 to 255 as uint8, truncated as the published definitions do; `values` is overwritten."""
    return values.add_(SLACK).clamp_(0, 255).to(torch.uint8)


def gaussian_blur(pixels: Tensor, sigma: tuple[float, float], truncate: float, mode: str) -> Tensor:
    """Separable Gaussian blur, as `scipy.ndimage.gaussian_filter`.

    Args:
        sigma: along the axes of rows and of columns, in pixels.
        truncate: radius of the kernel in standard deviations.
        mode: `nearest` (the outermost pixel continues) or `reflect` (mirrored about the picture's edge).
    """
    for axis, deviation in ((1, sigma[0]), (2, sigma[1])):
        radius = int(truncate * deviation + 0.5)
        if radius == 0:
            continue
        offsets = np.arange(-radius, radius + 1)
        weights = np.exp(-0.5 * (offsets / deviation) ** 2)
        weights /= weights.sum()
        length = pixels.shape[axis]
        index = torch.arange(-radius, length + radius, device=pixels.device)
        padded = pixels.index_select(axis, _inside(index, length, mode))
        blurred = torch.zeros_like(pixels)
        for tap, weight in enumerate(weights.tolist()):
            blurred.add_(padded.narrow(axis, tap, length), alpha=weight)
        pixels = blurred
    return pixels


def _inside(index: Tensor, length: int, mode: str) -> Tensor:
    """Positions of the pixels that continue a line of `length` pixels."""
    if mode == "nearest":
        return index.clamp(0, length - 1)
    wrapped = index.remainder(2 * length)
    return torch.minimum(wrapped, 2 * length - 1 - wrapped)


def motion_blur(pixels: Tensor, motion: Motion, degrees: Tensor) -> Tensor:
    """Blur along a line at an angle of each picture's own, as Michaelis et al. (2019).

    Args:
        degrees: (B,) angles.
    """
    steps = np.arange(2 * motion.radius + 1)
    weights = np.exp(-(steps**2) / (2 * motion.sigma**2))
    weights /= weights.sum()
    height, width = pixels.shape[1:3]
    reach = 2 * motion.radius
    rows = torch.arange(-reach, height + reach, device=pixels.device).clamp_(0, height - 1)
    columns = torch.arange(-reach, width + reach, device=pixels.device).clamp_(0, width - 1)
    padded = pixels.index_select(1, rows).index_select(2, columns)
    blurred = torch.zeros_like(pixels)
    # Picture by picture: each has its own offsets.
    for source, result, angle in zip(padded, blurred, degrees.tolist(), strict=True):
        sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
        for step, weight in enumerate(weights.tolist()):
            if weight < _NEGLIGIBLE:
                break
            top = reach + math.ceil(step * sine - 0.5)
            left = reach + math.ceil(step * cosine - 0.5)
            result.add_(source[top : top + height, left : left + width], alpha=weight)
    return blurred


def enlarged_centre(planes: Tensor, zoom: float) -> Tensor:
    """The centre of planes (B, C, H, W), enlarged to at least their size, see `enlarged`."""
    height, width = planes.shape[2:]
    rows, columns = math.ceil(height / zoom), math.ceil(width / zoom)
    top, left = (height - rows) // 2, (width - columns) // 2
    return enlarged(planes[:, :, top : top + rows, left : left + columns], zoom)


def enlarged(planes: Tensor, zoom: float) -> Tensor:
    """Planes (B, C, H, W) enlarged bilinearly, corners on corners, as `scipy.ndimage.zoom` of order 1."""
    size = (round(planes.shape[2] * zoom), round(planes.shape[3] * zoom))
    return functional.interpolate(planes, size=size, mode="bilinear", align_corners=True)


def displaced(pixels: Tensor, rows: Tensor, columns: Tensor, about_pixels: bool = False) -> Tensor:
    """Values at other positions, interpolated bilinearly and mirrored beyond the edges.

    Args:
        rows: (B, H, W) positions in pixels.
        columns: (B, H, W) positions in pixels.
        about_pixels: mirror about the outermost pixels' centres, not about the picture's edge.
    """
    height, width = pixels.shape[1:3]
    shape = np.broadcast_shapes(rows.shape, columns.shape)
    grid = torch.empty(*shape, 2, device=pixels.device)
    for axis, (positions, length) in enumerate(((columns, width), (rows, height))):
        if about_pixels:
            torch.sub(positions * (2 / (length - 1)), 1, out=grid[..., axis])
        else:
            torch.sub((2 * positions + 1) / length, 1, out=grid[..., axis])
    planes = functional.grid_sample(
        planes_of(pixels), grid, mode="bilinear", padding_mode="reflection", align_corners=about_pixels
    )
    return planes.permute(0, 2, 3, 1)


def planes_of(pixels: Tensor) -> Tensor:
    """Pixels (B, H, W, C) as contiguous planes (B, C, H, W)."""
    return pixels.permute(0, 3, 1, 2).contiguous()
