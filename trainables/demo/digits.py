"""The built-in images: digits printed in many fonts, handwritten digits, and shifted versions; no download.

The printed digits are rendered from the fonts that matplotlib ships; the handwritten ones are scikit-learn's copy of
the UCI "Optical Recognition of Handwritten Digits" test set (Alpaydin and Kaynak, 1998; 1,797 images of 8 x 8 pixels).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

SIDE = 32
SHIFTS = ("inverted", "rotated", "noisy", "blurred")
"""Kinds of `shift`."""

FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmb10",
    "cmr10",
    "cmss10",
    "cmtt10",
)
"""matplotlib's text fonts with upright-height digits (cmmi10 has old-style ones; the others are symbol fonts)."""

_GLYPH_SIDE = 96
"""Side at which glyphs are drawn once, before random affine maps sample them down."""


def printed_digits(n_per_class: int, seed: int) -> tuple[Pixels, Labels]:
    """Digits in a random font, dark on light, with random rotation, scale, shear and position.

    Returns:
        (10 n, 32, 32, 3) uint8 and (10 n,) int64 labels 0…9 in turn, so that any prefix of 10 k images is balanced.

    Example:
        >>> images, labels = printed_digits(2, seed=0)
        >>> images.shape, labels[:12].tolist()
        ((20, 32, 32, 3), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])
    """
    return render("0123456789", n_per_class, seed)


def handwritten_digits() -> tuple[Pixels, Labels]:
    """scikit-learn's 1,797 handwritten digits, dark on light, in their own order.

    Enlarged to 24 x 24 (bicubic) in the middle of 32 x 32: as large as the printed ones, with room for rotation.

    Returns:
        (1797, 32, 32, 3) uint8 and (1797,) int64 labels 0…9.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    inverted = np.rint(255 - digits.images * (255 / 16)).astype(np.uint8)
    enlarged = [np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC)) for image in inverted]
    padded = np.pad(np.stack(enlarged), ((0, 0), (4, 4), (4, 4)), constant_values=255)
    return _grey_to_rgb(padded), digits.target.astype(np.int64)


def shift(images: Pixels, kind: str, seed: int) -> Pixels:
    """A copy of images under one kind of distribution shift.

    Args:
        images: (n, H, W, 3) uint8.
        kind: `inverted` (255 − x), `rotated` (by 20° to 45° either way), `noisy` (grey Gaussian noise, σ = 64 of 255)
            or `blurred` (Gaussian, σ = H / 14).
        seed: of angles and noise.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in SHIFTS:
        raise ValueError(f"A shift is one of {', '.join(SHIFTS)}, but got {kind!r}.")
    generator = np.random.default_rng(seed)
    if kind == "inverted":
        return 255 - images
    if kind == "noisy":
        noise = generator.normal(0, 64, size=(*images.shape[:3], 1))
        return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)
    if kind == "rotated":
        angles = generator.uniform(20, 45, size=len(images)) * generator.choice([-1, 1], size=len(images))
        return _stack([_rotate(image, float(angle)) for image, angle in zip(images, angles, strict=True)], images)
    blur = ImageFilter.GaussianBlur(images.shape[1] / 14)
    return _stack([np.asarray(Image.fromarray(image).filter(blur)) for image in images], images)


def render(characters: str, n_per_class: int, seed: int, side: int = SIDE) -> tuple[Pixels, Labels]:
    """Characters in a random font, dark on light, each with a random affine map.

    Args:
        characters: one class each.
        n_per_class: images of each.
        seed: of fonts and maps.
        side: of the images, in pixels.

    Returns:
        (n, side, side, 3) uint8 and (n,) int64 indices into `characters`, in turn.
    """
    generator = np.random.default_rng(seed)
    glyphs = [[_glyph(character, font) for font in FONTS] for character in characters]
    labels = np.arange(n_per_class * len(characters)) % len(characters)
    fonts = generator.integers(len(FONTS), size=len(labels))
    maps = generator.uniform(-1, 1, size=(len(labels), 5))
    images = np.empty((len(labels), side, side), dtype=np.uint8)
    for i, (label, font, jitter) in enumerate(zip(labels, fonts, maps, strict=True)):
        affine = _affine(jitter, _GLYPH_SIDE / side, side)
        glyph = glyphs[label][font]
        images[i] = glyph.transform(
            (side, side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR, fillcolor=255
        )
    return _grey_to_rgb(images), labels.astype(np.int64)


def _glyph(character: str, font: str) -> Image.Image:
    """A character in the middle of a square of `_GLYPH_SIDE`, black on white, smoothed against aliasing."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    image = Image.new("L", (_GLYPH_SIDE, _GLYPH_SIDE), 255)
    pen = ImageDraw.Draw(image)
    typeface = ImageFont.truetype(str(path), round(_GLYPH_SIDE * 0.85))
    left, top, right, bottom = pen.textbbox((0, 0), character, font=typeface)
    middle = _GLYPH_SIDE / 2
    pen.text((middle - (left + right) / 2, middle - (top + bottom) / 2), character, font=typeface, fill=0)
    return image.filter(ImageFilter.GaussianBlur(1))


def _affine(jitter: NDArray[np.float64], zoom: float, side: int) -> tuple[float, ...]:
    """Pillow's six coefficients, which map a pixel of the result to one of the glyph.

    Rotation ±15°, scale 0.75…1.05, shear ±0.2, shift ±side / 12; `jitter` holds five numbers in −1…1.
    """
    angle = jitter[0] * math.radians(15)
    scale = zoom / (0.9 + 0.15 * jitter[1])
    shear = 0.2 * jitter[2]
    cos = math.cos(angle) * scale
    sin = math.sin(angle) * scale
    a = cos
    b = cos * shear - sin
    d = sin
    e = sin * shear + cos
    x = side * (0.5 + jitter[3] / 12)
    y = side * (0.5 + jitter[4] / 12)
    centre = zoom * side / 2
    return a, b, centre - a * x - b * y, d, e, centre - d * x - e * y


def _rotate(image: Pixels, angle: float) -> Pixels:
    background = tuple(int(v) for v in image[0, 0])
    rotated = Image.fromarray(image).rotate(angle, Image.Resampling.BILINEAR, fillcolor=background)
    return np.asarray(rotated)


def _stack(images: list[Pixels], like: Pixels) -> Pixels:
    return np.stack(images) if images else np.empty_like(like)


def _grey_to_rgb(images: Pixels) -> Pixels:
    return np.repeat(images[..., None], 3, axis=3)
