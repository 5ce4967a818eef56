"""Defocus, glass, motion and zoom blur."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn import functional

from trainables.data.corruptions.filters import enlarged_centre, gaussian_blur, planes_of, truncated
from trainables.data.corruptions.filters import motion_blur as blurred_along_line
from trainables.data.corruptions.parameters import Glass, Parameters
from trainables.data.corruptions.streams import ImageStreams


def defocus_blur(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """Convolution with a smoothed disk; the picture is mirrored about its outermost pixels."""
    radius, smoothing = parameters.defocus_blur[severity - 1]
    kernel = disk(radius, smoothing)
    reach = len(kernel) // 2
    height, width = pixels.shape[1:3]
    padded = functional.pad(planes_of(pixels.float()), (reach, reach, reach, reach), mode="reflect")
    size = (next_fast_len(height + 2 * reach, real=True), next_fast_len(width + 2 * reach, real=True))
    # The kernel is symmetric: correlation and convolution are the same. What wraps around falls on the padding.
    spectrum = torch.fft.rfft2(padded, s=size).mul_(_disk_spectrum(radius, smoothing, size, pixels.device))
    blurred = torch.fft.irfft2(spectrum, s=size)
    sharp = blurred[:, :, 2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
    return truncated(sharp).permute(0, 2, 3, 1)


@lru_cache(maxsize=16)
def _disk_spectrum(radius: float, smoothing: float, size: tuple[int, int], device: torch.device) -> Tensor:
    """Fourier transform of the kernel, padded to a picture's size."""
    spectrum: Tensor = torch.fft.rfft2(torch.tensor(disk(radius, smoothing), device=device), s=size)
    return spectrum


@lru_cache(maxsize=16)
def disk(radius: float, smoothing: float) -> NDArray[np.float32]:
    """A disk of weights, smoothed by a small Gaussian kernel that is mirrored about the outermost weights.

    Without the rows and columns of zeros around it.
    """
    reach, taps = (8, 3) if radius <= 8 else (int(radius), 5)
    offsets = np.arange(-reach, reach + 1)
    inside = (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2).astype(np.float32)
    inside /= inside.sum()
    weights = np.exp(-0.5 * (np.arange(-(taps // 2), taps // 2 + 1) / smoothing) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        mirrored = np.pad(inside, [(taps // 2, taps // 2) if axis == other else (0, 0) for other in (0, 1)], "reflect")
        length = inside.shape[axis]
        parts = [weight * mirrored.take(range(tap, tap + length), axis) for tap, weight in enumerate(weights)]
        inside = np.sum(parts, axis=0).astype(np.float32)
    margin = int(np.flatnonzero(inside.any(0))[0])
    return np.ascontiguousarray(inside[margin : len(inside) - margin, margin : len(inside) - margin])


def glass_blur(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """Pixels exchanged with their neighbours, between two blurs."""
    glass = parameters.glass_blur[severity - 1]
    sigma = (glass.sigma, glass.sigma)
    blurred = truncated(gaussian_blur(pixels.float(), sigma, 4.0, "nearest"))
    sources = shuffled_sources(pixels.shape[1], pixels.shape[2], glass, streams)
    shuffled = blurred.view(-1, pixels.shape[3]).index_select(0, sources).view_as(blurred)
    return truncated(gaussian_blur(shuffled.float(), sigma, 4.0, "nearest"))


def shuffled_sources(height: int, width: int, glass: Glass, streams: ImageStreams) -> Tensor:
    """Position in the batch's pixels that each pixel of the shuffled pictures comes from, (B · H · W,) int64.

    The published loop runs from the last pixel to the first and means to swap two pixels, but assigns through views of
    one array: pixel p becomes what its neighbour q is at that moment. That is the result of the pass where the loop has
    been at q before, and the pixel before the pass elsewhere. Following these links to their ends gives the same
    picture without a loop over pixels.
    """
    device = streams.device
    reach = glass.reach
    positions = torch.arange(len(streams) * height * width, device=device)
    sources = positions
    if min(height, width) <= 2 * reach:
        return sources
    grid = positions.view(len(streams), height, width)
    visited = grid[:, reach + 1 : height - reach + 1, reach + 1 : width - reach + 1]
    is_visited = torch.zeros(len(positions), dtype=torch.bool, device=device)
    is_visited[visited.flatten()] = True
    for _ in range(glass.passes):
        offsets = streams.integers(-reach, reach, 2, *visited.shape[1:])
        link = grid.clone()
        link[:, reach + 1 : height - reach + 1, reach + 1 : width - reach + 1] += offsets[:, 1] * width + offsets[:, 0]
        link = link.flatten()
        # A pixel that stays the one before the pass ends a path; it is its own end where the loop never comes.
        ends = (link <= positions) | ~is_visited.index_select(0, link)
        origin = link.clone()
        open_paths = (~ends).nonzero()[:, 0]
        reached = link.index_select(0, open_paths)
        # Half of the paths end with each round.
        while len(open_paths):
            following = link.index_select(0, reached)
            origin[open_paths] = following
            goes_on = ~ends.index_select(0, reached)
            open_paths, reached = open_paths[goes_on], following[goes_on]
        sources = sources.index_select(0, origin)
    return sources


def motion_blur(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """Blur along a line within 45° of the horizontal."""
    degrees = streams.uniform(1, low=-45, high=45)[:, 0]
    return truncated(blurred_along_line(pixels.float(), parameters.motion_blur[severity - 1], degrees))


def zoom_blur(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """Mean of the picture and of enlargements of its centre."""
    height, width = pixels.shape[1:3]
    picture = (planes_of(pixels).double() / 255).float()
    zooms = parameters.zooms(severity)
    total = torch.zeros_like(picture)
    exact = picture.double()
    for zoom in zooms:
        # Interpolated in double and summed in single precision, as the definition: truncation shows the last bit.
        total += enlarged_centre(exact, zoom)[:, :, :height, :width].float()
    mean = (picture + total) / (len(zooms) + 1)
    return (mean.clamp_(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)
