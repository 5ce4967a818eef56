"""Snow, frost, fog and brightness."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainables.data.corruptions.filters import enlarged, motion_blur, truncated
from trainables.data.corruptions.ice import ice
from trainables.data.corruptions.parameters import Parameters
from trainables.data.corruptions.streams import ImageStreams

_GRAY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601)."""


def snow(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """A whitened picture under two layers of flakes, one the other turned by 180°."""
    flakes = parameters.snow[severity - 1]
    height, width = pixels.shape[1:3]
    # Only the centre of the noise is enlarged: the rest need not be drawn.
    centre = (math.ceil(height / flakes.zoom), math.ceil(width / flakes.zoom))
    layer = enlarged(streams.normal(1, *centre).mul_(flakes.std).add_(flakes.mean), flakes.zoom)
    layer = layer.masked_fill(layer < flakes.threshold, 0).clamp_(0, 1)
    degrees = streams.uniform(1, low=-135, high=-45)[:, 0]
    layer = motion_blur(layer[:, 0, :, :, None], flakes.motion, degrees)[:, :height, :width]
    layer = layer.mul_(255).round_()
    values = pixels.float()
    red, green, blue = values.unbind(3)
    gray = red * _GRAY[0] + green * _GRAY[1] + blue * _GRAY[2]
    whitened = torch.maximum(values, gray.mul_(1.5).add_(0.5 * 255)[..., None])
    mixed = values.mul_(flakes.kept).add_(whitened, alpha=1 - flakes.kept)
    return truncated(mixed.add_(layer + layer.flip(1, 2)))


def frost(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """The picture under ice, see `trainables.data.corruptions.ice`."""
    kept, weight = parameters.frost[severity - 1]
    frozen = ice(pixels.shape[1], pixels.shape[2], parameters.ice_scale, streams)
    return truncated(frozen.mul_(weight).add_(pixels, alpha=kept))


def fog(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """A fractal veil over the picture; the brightest value stays as bright as it was."""
    thickness, decay = parameters.fog[severity - 1]
    height, width = pixels.shape[1:3]
    veil = plasma(1 << max(1, (max(height, width) - 1).bit_length()), decay, streams)[:, :height, :width, None]
    brightest = pixels.amax((1, 2, 3), keepdim=True).float().div_(255)
    scale = brightest / (brightest + thickness)
    return truncated(pixels.float().add_(veil * (255 * thickness)).mul_(scale))


def plasma(side: int, decay: float, streams: ImageStreams) -> Tensor:
    """Height maps (B, side, side) from 0 to 1 by the diamond-square algorithm on a torus.

    Args:
        side: a power of two.
        decay: quotient of the random displacements of one scale and the next.
    """
    heights = torch.zeros(len(streams), side, side, device=streams.device)
    drawn = streams.uniform(side * side - 1, low=-1, high=1)
    used = 0
    step = side
    spread = 100.0
    while step >= 2:
        half = step // 2
        cells = side // step
        # In the order of the published loop: centres of squares, then the two kinds of edges.
        wobble = drawn[:, used : used + 3 * cells * cells].view(-1, 3, cells, cells) * spread**2
        used += 3 * cells * cells
        corners = heights[:, ::step, ::step].clone()
        pairs = corners + corners.roll(-1, 1)
        centres = (pairs + pairs.roll(-1, 2)) / 4 + wobble[:, 0]
        beside = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        below = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        heights[:, half::step, half::step] = centres
        heights[:, ::step, half::step] = beside / 4 + wobble[:, 1]
        heights[:, half::step, ::step] = below / 4 + wobble[:, 2]
        step = half
        spread /= decay
    heights -= heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)


def brightness(pixels: Tensor, severity: int, parameters: Parameters, streams: ImageStreams) -> Tensor:
    """A constant added to the value of HSV.

    In double precision and in the order of scikit-image's conversions: many results are integers but for rounding,
    and truncation shows which side they are on.
    """
    red, green, blue = (channel.double() / 255 for channel in pixels.unbind(3))
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    is_gray = spread == 0
    saturation = torch.where(is_gray, 0.0, spread / value)
    hue = torch.where(red == value, (green - blue) / spread, 0.0)
    hue = torch.where(green == value, 2.0 + (blue - red) / spread, hue)
    hue = torch.where(blue == value, 4.0 + (red - green) / spread, hue)
    hue = torch.where(is_gray, 0.0, (hue / 6.0).remainder(1.0))
    value = (value + parameters.brightness[severity - 1]).clamp(0, 1)
    sector = (hue * 6).floor()
    fraction = hue * 6 - sector
    low = value * (1 - saturation)
    falling = value * (1 - fraction * saturation)
    rising = value * (1 - (1 - fraction) * saturation)
    sector = sector.to(torch.int8).remainder(6)
    in_sector = [sector == number for number in range(6)]
    result = torch.empty_like(pixels)
    # Sectors in which a channel is the brightest, falls and rises; it is the darkest in the other two.
    for channel, (first, second, falls, rises) in enumerate(((0, 5, 1, 4), (1, 2, 3, 0), (3, 4, 5, 2))):
        mixed = torch.where(in_sector[rises], rising, low)
        mixed = torch.where(in_sector[falls], falling, mixed)
        mixed = torch.where(in_sector[first] | in_sector[second], value, mixed)
        result[..., channel] = (mixed.clamp_(0, 1).mul_(255)).to(torch.uint8)
    return result
