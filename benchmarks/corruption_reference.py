"""Mean distances that the reference's corruptions put between a picture and its corrupted copy.

    pip install --target REFERENCE imagecorruptions-imaug scikit-image opencv-python-headless numba
    PYTHONPATH=.:REFERENCE python -m benchmarks.corruption_reference

Writes `benchmarks/support/corruption_reference.json`, which tests compare `trainables.data.corruptions` with. At 224 px
the reference is the package `imagecorruptions-imaug` (Michaelis et al., 2019, repaired for current libraries), which is
no dependency of Luthier. At 32 px it is a transcription of the script that made CIFAR-10-C (Hendrycks and Dietterich,
2019, https://github.com/hendrycks/robustness), with the package's motion blur in place of ImageMagick's. The package
draws frost from six photographs (the script from the first five): `--ice` prints the quantiles of their colours.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import cv2
import imagecorruptions as package
import imagecorruptions.corruptions as helpers
import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image

from benchmarks.support.corruption_pictures import LARGE, REFERENCE, SMALL, mean_distance, pictures

EXACT = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
"""Corruptions without random numbers."""
DRAWS = {"frost": 120, "fog": 120, "motion_blur": 60, "snow": 60}
"""Corrupted copies of each large picture; 12 of the others. Frost has six photographs to choose from."""
SMALL_DRAWS = 200
"""Corrupted copies of each small picture."""
LIBRARIES = ("imagecorruptions-imaug", "scikit-image", "opencv-python-headless", "scipy", "pillow")

Picture = NDArray[np.uint8]
Array = NDArray[Any]


def measure(side: int, corrupt: Callable[[Picture, int, str], Picture]) -> dict[str, list[float]]:
    """Mean distance by corruption, at severities 1 to 5."""
    originals = pictures(side)
    distances: dict[str, list[float]] = {}
    for name in package.get_corruption_names("common"):
        np.random.seed(0)
        draws = SMALL_DRAWS if side == SMALL else DRAWS.get(name, 12)
        if name in EXACT:
            draws = 1
        distances[name] = [
            float(
                np.mean(
                    [
                        mean_distance(np.stack([corrupt(picture, severity, name) for picture in originals]), originals)
                        for _ in range(draws)
                    ]
                )
            )
            for severity in range(1, 6)
        ]
        print(side, name, [round(distance, 3) for distance in distances[name]], flush=True)
    return distances


def cifar_corrupted(picture: Picture, severity: int, name: str) -> Picture:
    """A corrupted copy as in CIFAR-10-C."""
    return np.uint8(CIFAR[name](picture, severity - 1))  # type: ignore[return-value]


def _gaussian_noise(x: Array, level: int) -> Array:
    return _clip(x / 255.0 + np.random.normal(size=x.shape, scale=[0.04, 0.06, 0.08, 0.09, 0.10][level]))


def _shot_noise(x: Array, level: int) -> Array:
    c = [500, 250, 100, 75, 50][level]
    return _clip(np.random.poisson(x / 255.0 * c) / c)


def _impulse_noise(x: Array, level: int) -> Array:
    return _clip(skimage.util.random_noise(x / 255.0, mode="s&p", amount=[0.01, 0.02, 0.03, 0.05, 0.07][level]))


def _defocus_blur(x: Array, level: int) -> Array:
    radius, alias = [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)][level]
    kernel = helpers.disk(radius=radius, alias_blur=alias)
    return _clip(np.stack([cv2.filter2D(x[:, :, d] / 255.0, -1, kernel) for d in range(3)], axis=2))


def _glass_blur(x: Array, level: int) -> Array:
    c = [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)][level]
    blurred = np.uint8(helpers.gaussian(x / 255.0, sigma=c[0], channel_axis=-1) * 255)
    seed = np.random.randint(2**31)
    shuffled = helpers._shuffle_pixels_njit_glass_blur(len(x), len(x), blurred, c, seed)
    return _clip(helpers.gaussian(shuffled / 255.0, sigma=c[0], channel_axis=-1))


def _motion_blur(x: Array, level: int) -> Array:
    radius, sigma = [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)][level]
    return np.clip(helpers._motion_blur(x, radius, sigma, np.random.uniform(-45, 45)), 0, 255)


def _zoom_blur(x: Array, level: int) -> Array:
    x = (x / 255.0).astype(np.float32)
    zooms = np.arange(1, [1.06, 1.11, 1.16, 1.21, 1.26][level], 0.01)
    out = np.zeros_like(x)
    for zoom in zooms:
        out += helpers.clipped_zoom(x, zoom)[: len(x), : len(x)]
    return _clip((x + out) / (len(zooms) + 1))


def _snow(x: Array, level: int) -> Array:
    c = [
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ][level]
    x = x.astype(np.float32) / 255.0
    layer = helpers.clipped_zoom(np.random.normal(size=x.shape[:2], loc=c[0], scale=c[1])[..., np.newaxis], c[2])
    layer[layer < c[3]] = 0
    layer = np.clip(layer[: len(x), : len(x), 0], 0, 1)
    layer = helpers._motion_blur(layer, radius=c[4], sigma=c[5], angle=np.random.uniform(-135, -45))
    layer = (np.round(layer * 255).astype(np.uint8) / 255.0)[..., np.newaxis]
    gray = cv2.cvtColor(x, cv2.COLOR_RGB2GRAY)[..., np.newaxis]
    x = c[6] * x + (1 - c[6]) * np.maximum(x, gray * 1.5 + 0.5)
    return _clip(x + layer + np.rot90(layer, k=2))


def _frost(x: Array, level: int) -> Array:
    c = [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)][level]
    ice = cv2.resize(photographs()[np.random.randint(6)], (0, 0), fx=0.2, fy=0.2)
    top, left = np.random.randint(0, ice.shape[0] - len(x)), np.random.randint(0, ice.shape[1] - len(x))
    return np.clip(c[0] * x + c[1] * ice[top : top + len(x), left : left + len(x)], 0, 255)


def _fog(x: Array, level: int) -> Array:
    c = [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)][level]
    x = x / 255.0
    brightest = x.max()
    x = x + c[0] * helpers.plasma_fractal(mapsize=32, wibbledecay=c[1])[: len(x), : len(x)][..., np.newaxis]
    return _clip(x * brightest / (brightest + c[0]))


def _brightness(x: Array, level: int) -> Array:
    x = skimage.color.rgb2hsv(x / 255.0)
    x[:, :, 2] = np.clip(x[:, :, 2] + [0.05, 0.1, 0.15, 0.2, 0.3][level], 0, 1)
    return _clip(skimage.color.hsv2rgb(x))


def _contrast(x: Array, level: int) -> Array:
    x = x / 255.0
    means = np.mean(x, axis=(0, 1), keepdims=True)
    return _clip((x - means) * [0.75, 0.5, 0.4, 0.3, 0.15][level] + means)


def _elastic_transform(x: Array, level: int) -> Array:
    side = len(x)
    alpha, sigma, bound = [
        (0, 0, side * 0.08),
        (side * 0.05, side * 0.2, side * 0.07),
        (side * 0.08, side * 0.06, side * 0.06),
        (side * 0.1, side * 0.04, side * 0.05),
        (side * 0.1, side * 0.03, side * 0.03),
    ][level]
    x = x.astype(np.float32) / 255.0
    centre = np.array([side, side], dtype=np.float32) // 2
    arm = side // 3
    points = np.array([centre + arm, [centre[0] + arm, centre[1] - arm], centre - arm], dtype=np.float32)
    moved = points + np.random.uniform(-bound, bound, size=points.shape).astype(np.float32)
    matrix = cv2.getAffineTransform(points, moved)
    x = cv2.warpAffine(x, matrix, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    columns, rows = (
        helpers.gaussian(np.random.uniform(-1, 1, size=x.shape[:2]), sigma, mode="reflect", truncate=3) * alpha
        for _ in range(2)
    )
    across, down, channel = np.meshgrid(np.arange(side), np.arange(side), np.arange(3))
    positions = (down + rows[..., np.newaxis], across + columns[..., np.newaxis], channel)
    return _clip(helpers.map_coordinates(x, [axis.ravel() for axis in positions], order=1, mode="reflect")).reshape(
        x.shape
    )


def _pixelate(x: Array, level: int) -> Array:
    c = [0.95, 0.9, 0.85, 0.75, 0.65][level]
    size = (int(len(x) * c), int(len(x) * c))
    reduced = Image.fromarray(x).resize(size, Image.Resampling.BOX)
    return np.asarray(reduced.resize((len(x), len(x)), Image.Resampling.BOX))


def _jpeg_compression(x: Array, level: int) -> Array:
    file = io.BytesIO()
    Image.fromarray(x).save(file, "JPEG", quality=[80, 65, 58, 50, 40][level])
    return np.asarray(Image.open(file))


def _clip(x: Array) -> Array:
    return np.clip(x, 0, 1) * 255


CIFAR = {
    name.removeprefix("_"): function
    for name, function in list(globals().items())
    if name.removeprefix("_") in package.get_corruption_names("common")
}
"""Corruption → picture and severity − 1 → its corrupted copy."""


@lru_cache
def photographs() -> list[Picture]:
    """The reference's pictures of ice, RGB."""
    folder = files("imagecorruptions") / "frost"
    names = sorted(path.name for path in folder.iterdir())
    return [np.asarray(Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB")) for name in names]


def ice_quantiles() -> list[list[int]]:
    """Quantiles of red, green and blue in crops of the photographs, at 17 equal steps."""
    random = np.random.default_rng(0)
    colours = []
    for photograph in photographs():
        height, width = (int(np.ceil(length * 1.1)) for length in photograph.shape[:2])
        enlarged = cv2.resize(photograph, dsize=(width, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(400):
            top, left = random.integers(0, height - LARGE), random.integers(0, width - LARGE)
            colours.append(enlarged[top : top + LARGE : 8, left : left + LARGE : 8].reshape(-1, 3))
    return np.quantile(np.concatenate(colours), np.linspace(0, 1, 17), axis=0).round().astype(int).T.tolist()


def main() -> None:
    """Measure both sizes and write the file, or print the quantiles of the ice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ice", action="store_true")
    if parser.parse_args().ice:
        print(*ice_quantiles(), sep="\n")
        return
    content: dict[str, Any] = {
        "libraries": {name: version(name) for name in LIBRARIES},
        str(LARGE): measure(LARGE, lambda picture, severity, name: package.corrupt(picture, severity, name)),
        str(SMALL): measure(SMALL, cifar_corrupted),
    }
    REFERENCE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
