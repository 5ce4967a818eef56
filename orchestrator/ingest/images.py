"""Decoding of untrusted image files: allow-listed formats, bounded size, nothing silently repaired."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
MAX_PIXELS = 50_000_000
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class BadImageError(ValueError):
    """The image cannot be used; the message says why."""


def decode(source: Path | bytes, side: int, interpolation: str) -> NDArray[np.uint8]:
    """An image as uint8 RGB (side, side, 3): shortest side resized, centre cropped.

    EXIF orientation is applied, transparency is composited on white, 16-bit grey is scaled (not clipped) to 8 bits,
    of an animation the first frame is used.

    Raises:
        BadImageError: not an image of an allowed format, damaged, cut off, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImageError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read")
                image.load()
                return _square(_eight_bits(ImageOps.exif_transpose(image)), side, interpolation)
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(f"too many pixels ({error})") from None
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, Warning, MemoryError) as error:
        raise BadImageError(_reason(source, error)) from None


def resize(pixels: NDArray[np.uint8], side: int, interpolation: str) -> NDArray[np.uint8]:
    """The same for pixels that are in memory: uint8 (H, W), (H, W, 1) or (H, W, 3)."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return _square(Image.fromarray(pixels).convert("RGB"), side, interpolation)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float64)
        # 16-bit files use the whole range of their type; "convert" would clip all above 255 to white.
        return Image.fromarray(np.clip(np.round(values / 257), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImageError("floating-point pixels have no declared range; convert the file to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _square(image: Image.Image, side: int, interpolation: str) -> NDArray[np.uint8]:
    if (image.width, image.height) != (side, side):
        scale = side / min(image.width, image.height)
        size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        if size[0] * size[1] > MAX_PIXELS:
            raise BadImageError(f"{image.width} x {image.height} pixels: too narrow to resize")
        image = image.resize(size, _RESAMPLING[interpolation])
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return np.asarray(image, dtype=np.uint8)


def _reason(source: Path | bytes, error: BaseException) -> str:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size if source.exists() else -1
    if size == 0:
        return "the file is empty"
    if "truncated" in str(error):
        return f"the file is cut off ({error})"
    if "cannot identify" in str(error):
        return f"not an image of the formats {', '.join(FORMATS)}"
    return f"{type(error).__name__}: {error}"
