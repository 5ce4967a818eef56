"""Contrast, elastic distortion, pixelation and JPEG compression."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainables.data.corruptions.filters import displaced, gaussian_blur, truncated
from trainables.data.corruptions.parameters import Parameters, elastic_for
from trainables.data.corruptions.streams import ImageStreams


def contrast(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """Deviations from each channel's mean, reduced."""
    kept = parameters.contrast[severity - 1]
    height, width, channels = pixels.shape[1:]
    # From a sum of integers, which no order of summation changes. Repeated along a row: a last axis of three channels
    # would be computed three values at a time.
    means = (pixels.sum((1, 2), dtype=torch.int64).double() / (255 * height * width)).repeat(1, width)[:, None, :]
    values = pixels.reshape(len(pixels), height, width * channels).double() / 255
    changed = values.sub_(means).mul_(kept).add_(means).clamp_(0, 1).mul_(255)
    return changed.to(torch.uint8).view_as(pixels)


def elastic_transform(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """Pixels displaced by smooth noise, in small pictures after a random affine map."""
    height, width = pixels.shape[1:3]
    elastic = elastic_for(height, width, severity)
    values = pixels.float()
    row = torch.arange(height, device=pixels.device, dtype=torch.float32)[None, :, None]
    column = torch.arange(width, device=pixels.device, dtype=torch.float32)[None, None, :]
    if elastic.affine:
        values = displaced(values, *affine_positions(row, column, elastic.affine, streams), about_pixels=True)
    if elastic.amplitude:
        noise = streams.uniform(height, width, 2, low=-elastic.noise, high=elastic.noise)
        smooth = gaussian_blur(noise, elastic.sigma, 3.0, "reflect") * elastic.amplitude
        values = displaced(values, row + smooth[..., 1], column + smooth[..., 0])
    return truncated(values)


def affine_positions(row: Tensor, column: Tensor, bound: float, streams: ImageStreams) -> tuple[Tensor, Tensor]:
    """Where the pixels of an affine map come from, rows and columns (B, H, W).

    Three points about the centre move by up to `bound` pixels each way.
    """
    height, width = row.shape[1], column.shape[2]
    middle = (width // 2, height // 2)
    arm = min(height, width) // 3
    points = torch.tensor(
        [
            [middle[0] + arm, middle[1] + arm],
            [middle[0] + arm, middle[1] - arm],
            [middle[0] - arm, middle[1] - arm],
        ],
        dtype=torch.float64,
    )
    moved = points + streams.uniform(3, 2, low=-bound, high=bound).double().cpu()
    ones = torch.ones(len(moved), 3, 1, dtype=torch.float64)
    # By Cramer's rule of a 3 × 3 matrix, whatever the batch: from moved points back to the original ones.
    inverse = torch.stack([torch.linalg.inv(matrix) for matrix in torch.cat((moved, ones), 2)])
    back = (inverse @ points).float().to(row.device)[:, :, :, None, None]
    columns, rows = (back[:, 0, axis] * column + back[:, 1, axis] * row + back[:, 2, axis] for axis in (0, 1))
    return rows, columns


def pixelate(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """Reduced by averages over boxes and enlarged again, by Pillow."""
    factor = parameters.pixelate[severity - 1]
    enlarge = Image.Resampling.BOX if parameters.enlarged_by_averaging else Image.Resampling.NEAREST

    def pixelated(picture: Image.Image) -> Image.Image:
        size = (max(1, int(picture.width * factor)), max(1, int(picture.height * factor)))
        return picture.resize(size, Image.Resampling.BOX).resize(picture.size, enlarge)

    return _by_pillow(pixels, pixelated)


def jpeg_compression(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """Saved as JPEG and read again, by Pillow."""
    quality = parameters.jpeg_compression[severity - 1]

    def compressed(picture: Image.Image) -> Image.Image:
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file, formats=["JPEG"])

    return _by_pillow(pixels, compressed)


def _by_pillow(pixels: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    pictures = pixels.contiguous().cpu().numpy()
    changed = np.empty_like(pictures)
    height, width = pictures.shape[1:3]
    for number, picture in enumerate(pictures):
        # Without the copies that `fromarray` and `asarray` make.
        original = Image.frombuffer("RGB", (width, height), picture, "raw", "RGB", 0, 1)
        changed[number] = np.frombuffer(change(original).tobytes(), np.uint8).reshape(picture.shape)
    return torch.from_numpy(changed).to(pixels.device)
