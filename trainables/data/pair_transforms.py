"""Scaling and cropping of a picture together with its mask.

Pictures are interpolated linearly, masks only ever by index: no value arises that the mask did not hold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainables.data.mask_views import Box
from trainables.data.store import IGNORED


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Size of a picture scaled by a factor, in whole pixels of which there is at least one."""
    return max(1, round(height * scale)), max(1, round(width * scale))


def scaled_picture(picture: Tensor, size: tuple[int, int], box: Box) -> Tensor:
    """A box of a picture that is scaled to a size, (3, box height, box width) float32 in 0…255.

    Only the box is computed, and it is the same as if it were cut out of the scaled whole. Linear interpolation whose
    filter widens where the picture shrinks, which is torch's `interpolate(mode="bilinear", antialias=True)`.

    Args:
        picture: (H, W, 3) uint8.
        size: height and width that the whole is scaled to, in pixels.
        box: within this size.
    """
    rows, row_weights = _filter(picture.shape[0], size[0], box.rows, picture.device)
    columns, column_weights = _filter(picture.shape[1], size[1], box.columns, picture.device)
    part = picture[rows, columns].permute(2, 0, 1).to(torch.float32)
    return row_weights @ part @ column_weights.T


def scaled_mask(mask: Tensor, size: tuple[int, int], box: Box) -> Tensor:
    """A box of a mask that is scaled to a size, (box height, box width) uint8.

    Each pixel takes the value of the source pixel that its centre lies in.

    Args:
        mask: (H, W) uint8.
        size: height and width that the whole is scaled to, in pixels.
        box: within this size.
    """
    rows = _nearest(mask.shape[0], size[0], box.rows, mask.device)
    columns = _nearest(mask.shape[1], size[1], box.columns, mask.device)
    return mask.index_select(0, rows).index_select(1, columns)


def padded(picture: Tensor, side: int) -> Tensor:
    """A normalised picture (3, h, w) padded with zeros below and to the right, (3, side, side)."""
    return torch.nn.functional.pad(picture, (0, side - picture.shape[2], 0, side - picture.shape[1]))


def padded_mask(mask: Tensor, side: int) -> Tensor:
    """A mask (h, w) padded with the ignored value below and to the right, (side, side)."""
    return torch.nn.functional.pad(mask, (0, side - mask.shape[1], 0, side - mask.shape[0]), value=IGNORED)


def _filter(length: int, scaled: int, pixels: slice, device: torch.device) -> tuple[slice, Tensor]:
    """Source pixels that a stretch of the scaled axis depends on, and their weights (stretch, sources) float32."""
    step = length / scaled
    support = max(step, 1.0)
    first = max(0, math.floor((pixels.start + 0.5) * step - support))
    last = min(length, math.ceil((pixels.stop - 0.5) * step + support))
    centres = (torch.arange(pixels.start, pixels.stop, device=device, dtype=torch.float64) + 0.5) * step
    sources = torch.arange(first, last, device=device, dtype=torch.float64) + 0.5
    weights = (1 - (sources[None, :] - centres[:, None]).abs() / support).clamp(min=0)
    # Divided by their sum, since the filter is cut off at the edges of the picture.
    weights = weights / weights.sum(1, keepdim=True)
    return slice(first, last), weights.to(torch.float32)


def _nearest(length: int, scaled: int, pixels: slice, device: torch.device) -> Tensor:
    """Source pixel of each pixel of a stretch of the scaled axis."""
    positions = torch.arange(pixels.start, pixels.stop, device=device)
    # In integers: floor((i + 1/2) · length / scaled) has no rounding error.
    return (2 * positions + 1) * length // (2 * scaled)
