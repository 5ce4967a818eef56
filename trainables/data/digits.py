"""Digits without a download: rendered from the fonts that matplotlib ships, and scikit-learn's handwritten ones.

All images are uint8 (n, 32, 32, 3), light ink on dark ground, labels int64 (n,) in 0 … 9.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 32
MARGIN = 4
"""Dark border around handwritten digits, so that a rotation cuts nothing off."""
SHIFTS = ("inverted", "rotated", "noisy", "blurred")

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def printed_digits(n_per_class: int, seed: int) -> tuple[Images, Labels]:
    """Digits in random fonts, sizes, rotations, shears and shifts; the classes take turns.

    Args:
        n_per_class: images of each digit.
        seed: decides everything.
    """
    random = np.random.default_rng([seed, 20])
    labels = np.tile(np.arange(10, dtype=np.int64), n_per_class)
    images = np.stack([_printed(int(digit), random) for digit in labels])
    return _colour(images), labels


def handwritten_digits() -> tuple[Images, Labels]:
    """scikit-learn's 1797 handwritten digits (UCI, 8 by 8 pixels of 17 grey levels), enlarged to 24 by 24 and framed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = np.round(found.images * (255 / 16)).astype(np.uint8)
    inner = SIDE - 2 * MARGIN
    large = [np.asarray(Image.fromarray(image).resize((inner, inner), Image.Resampling.BICUBIC)) for image in small]
    framed = np.pad(np.stack(large), ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
    return _colour(framed), found.target.astype(np.int64)


def shift(images: Images, kind: str, seed: int) -> Images:
    """The same digits under another condition, one of `SHIFTS`.

    inverted: dark ink on light ground. rotated: by 20 to 40 degrees to either side. noisy: Gaussian noise, standard
    deviation 60 grey levels. blurred: Gaussian blur, radius 2 pixels.

    Raises:
        ValueError: an unknown kind.
    """
    random = np.random.default_rng([seed, 21])
    if kind == "inverted":
        return np.ascontiguousarray(255 - images)
    if kind == "noisy":
        noise = random.normal(0.0, 60.0, images.shape[:3])[..., None]
        return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)
    if kind == "rotated":
        angles = random.uniform(20, 40, len(images)) * random.choice([-1, 1], len(images))
        turned = [
            np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR))
            for image, angle in zip(images, angles, strict=True)
        ]
        return np.stack(turned)
    if kind == "blurred":
        return np.stack([np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2))) for image in images])
    raise ValueError(f"A shift is one of {', '.join(SHIFTS)}, but got {kind!r}.")


def _colour(grey: Images) -> Images:
    return np.ascontiguousarray(np.repeat(grey[..., None], 3, axis=3))


def _printed(digit: int, random: np.random.Generator) -> Images:
    fonts = _fonts()
    font = ImageFont.truetype(fonts[random.integers(len(fonts))], int(random.integers(19, 30)))
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), str(digit), fill=255, font=font, anchor="mm")
    angle, shear, scale = random.uniform(-0.25, 0.25), random.uniform(-0.25, 0.25), random.uniform(0.85, 1.2)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    matrix = np.array([[cos, sin + shear], [-sin, cos]])
    centre = np.array([SIDE / 2, SIDE / 2])
    offset = centre - matrix @ (centre + random.uniform(-2.5, 2.5, 2))
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    moved = image.transform((SIDE, SIDE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(moved)


@cache
def _fonts() -> tuple[str, ...]:
    """matplotlib's own fonts that have the ten digits as text (the symbol and maths fonts are left out)."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    families = ("DejaVu", "STIXGeneral", "cmr", "cmb", "cmss", "cmtt")
    found = [p for p in sorted(folder.glob("*.ttf")) if p.stem.startswith(families) and "Display" not in p.stem]
    return tuple(str(path) for path in found)
