"""Parameters of the corruptions at severities 1 to 5, as published.

`LARGE` are those of ImageNet-C, `SMALL` those of CIFAR-10-C, both from the scripts that made the sets (Hendrycks and
Dietterich, 2019, https://github.com/hendrycks/robustness). Elastic distortion of large pictures is that of Michaelis et
al. (2019), whose package made the definitions independent of the pictures' size: at severities 1 and 2 the script for
ImageNet-C moves whole pictures by up to a tenth of their side, so that severity 1 is farther from the picture than
severity 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LARGE_SIDE = 96
"""Shorter side in pixels from which a picture is corrupted with the parameters of ImageNet-C."""

Floats = tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Glass:
    """Local exchange of pixels between two blurs."""

    sigma: float
    """Standard deviation of both blurs, in pixels."""
    reach: int
    """A pixel comes from at most this far, in rows and in columns."""
    passes: int


@dataclass(frozen=True)
class Motion:
    """Blur along a line, with weights that fall off like one half of a normal density."""

    radius: int
    """The line is `2 · radius + 1` pixels long."""
    sigma: float


@dataclass(frozen=True)
class Snow:
    """A layer of thresholded noise, enlarged, blurred along a line and added to a whitened picture."""

    mean: float
    """Of the noise, on a scale from 0 to 1."""
    std: float
    zoom: float
    threshold: float
    motion: Motion
    kept: float
    """Weight of the picture; 1 − kept is that of its whitened copy."""


@dataclass(frozen=True)
class Elastic:
    """Smooth random displacement, after a random affine map."""

    amplitude: float
    """Factor of the smoothed noise."""
    noise: float
    """Bound of the uniform noise before smoothing."""
    sigma: tuple[float, float]
    """Standard deviation of the smoothing along rows and columns, in pixels."""
    affine: float
    """Bound of the displacement of the affine map's three points, in pixels; 0 = no affine map."""


@dataclass(frozen=True)
class Parameters:
    """Parameters of all corruptions; the items of a tuple are severities 1 to 5."""

    gaussian_noise: Floats
    """Standard deviation, on a scale from 0 to 1."""
    shot_noise: Floats
    """Expected photons of a white pixel."""
    impulse_noise: Floats
    """Share of the values that become 0 or 255."""
    defocus_blur: tuple[tuple[float, float], ...]
    """Radius of the disk in pixels, and standard deviation of its smoothing."""
    glass_blur: tuple[Glass, ...]
    motion_blur: tuple[Motion, ...]
    zoom_blur: tuple[tuple[float, float], ...]
    """End (exclusive) and step of the zoom factors, which begin at 1."""
    snow: tuple[Snow, ...]
    frost: tuple[tuple[float, float], ...]
    """Weights of picture and ice."""
    ice_scale: float
    """Size of the ice's pixels in those of the picture."""
    fog: tuple[tuple[float, float], ...]
    """Thickness, and decay of the fractal's roughness from one scale to the next."""
    brightness: Floats
    """Added to the value of HSV, on a scale from 0 to 1."""
    contrast: Floats
    """Share of each pixel's deviation from the mean that is kept."""
    pixelate: Floats
    """Factor of the side."""
    enlarged_by_averaging: bool
    """Whether `pixelate` enlarges by averages over boxes, not by the nearest pixel."""
    jpeg_compression: tuple[int, int, int, int, int]
    """Quality."""

    def zooms(self, severity: int) -> list[float]:
        """Zoom factors of `zoom_blur`."""
        end, step = self.zoom_blur[severity - 1]
        # By the published expression: its rounding decides how many factors there are.
        return [float(zoom) for zoom in np.arange(1, end, step)]


LARGE = Parameters(
    gaussian_noise=(0.08, 0.12, 0.18, 0.26, 0.38),
    shot_noise=(60, 25, 12, 5, 3),
    impulse_noise=(0.03, 0.06, 0.09, 0.17, 0.27),
    defocus_blur=((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    glass_blur=(Glass(0.7, 1, 2), Glass(0.9, 2, 1), Glass(1, 2, 3), Glass(1.1, 3, 2), Glass(1.5, 4, 2)),
    motion_blur=(Motion(10, 3), Motion(15, 5), Motion(15, 8), Motion(15, 12), Motion(20, 15)),
    zoom_blur=((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    snow=(
        Snow(0.1, 0.3, 3, 0.5, Motion(10, 4), 0.8),
        Snow(0.2, 0.3, 2, 0.5, Motion(12, 4), 0.7),
        Snow(0.55, 0.3, 4, 0.9, Motion(12, 8), 0.7),
        Snow(0.55, 0.3, 4.5, 0.85, Motion(12, 8), 0.65),
        Snow(0.55, 0.3, 2.5, 0.85, Motion(12, 12), 0.55),
    ),
    frost=((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ice_scale=1.0,
    fog=((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    brightness=(0.1, 0.2, 0.3, 0.4, 0.5),
    contrast=(0.4, 0.3, 0.2, 0.1, 0.05),
    pixelate=(0.6, 0.5, 0.4, 0.3, 0.25),
    enlarged_by_averaging=False,
    jpeg_compression=(25, 18, 15, 10, 7),
)
"""ImageNet-C."""

SMALL = Parameters(
    gaussian_noise=(0.04, 0.06, 0.08, 0.09, 0.10),
    shot_noise=(500, 250, 100, 75, 50),
    impulse_noise=(0.01, 0.02, 0.03, 0.05, 0.07),
    defocus_blur=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    glass_blur=(Glass(0.05, 1, 1), Glass(0.25, 1, 1), Glass(0.4, 1, 1), Glass(0.25, 1, 2), Glass(0.4, 1, 2)),
    motion_blur=(Motion(6, 1), Motion(6, 1.5), Motion(6, 2), Motion(8, 2), Motion(9, 2.5)),
    zoom_blur=((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    snow=(
        Snow(0.1, 0.2, 1, 0.6, Motion(8, 3), 0.95),
        Snow(0.1, 0.2, 1, 0.5, Motion(10, 4), 0.9),
        Snow(0.15, 0.3, 1.75, 0.55, Motion(10, 4), 0.9),
        Snow(0.25, 0.3, 2.25, 0.6, Motion(12, 6), 0.85),
        Snow(0.3, 0.3, 1.25, 0.65, Motion(14, 12), 0.8),
    ),
    frost=((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ice_scale=0.2,
    fog=((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    brightness=(0.05, 0.1, 0.15, 0.2, 0.3),
    contrast=(0.75, 0.5, 0.4, 0.3, 0.15),
    pixelate=(0.95, 0.9, 0.85, 0.75, 0.65),
    enlarged_by_averaging=True,
    jpeg_compression=(80, 65, 58, 50, 40),
)
"""CIFAR-10-C."""


def parameters_for(height: int, width: int) -> Parameters:
    """The set for pictures of a size in pixels."""
    return LARGE if min(height, width) >= LARGE_SIDE else SMALL


def elastic_for(height: int, width: int, severity: int) -> Elastic:
    """Elastic distortion, whose parameters follow the picture's size."""
    if min(height, width) >= LARGE_SIDE:
        amplitude = 250 * (0.05, 0.065, 0.085, 0.1, 0.12)[severity - 1]
        return Elastic(amplitude, height * 0.005, (height * 0.01, width * 0.01), 0.0)
    amplitude, sigma, affine = (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[severity - 1]
    side = min(height, width)
    return Elastic(side * amplitude, 1.0, (side * sigma, side * sigma), side * affine)
