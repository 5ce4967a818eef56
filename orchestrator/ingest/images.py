"""Decoding of untrusted image files to RGB images; the only module that opens them."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are opened, recognised by content. EPS is not among them: Pillow would run Ghostscript."""
MAX_PIXELS = 50_000_000
MAX_BYTES = 256 * 2**20
MIN_SIDE = 4
"""Minimum length of the shorter side, in pixels."""
MAX_ASPECT = 20
"""Maximum ratio of the sides: of a longer strip the centre square shows less than a twentieth."""

THUMBNAIL_SIDE = 32
"""Side of `thumbnail`'s luminance, in pixels; that of the perceptual hash pHash."""
COLOUR_SIDE = 8
"""Side of `thumbnail`'s colours, in pixels."""

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""By the names of timm's data configuration."""

TRANSPOSED_FROM = 5
"""EXIF orientations from this one on exchange width and height."""

_ORIENTATION = 0x0112
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


class BadImageError(Exception):
    """An image that cannot be used; the text is the reason in the quarantine list."""


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A decoded image."""

    pixels: NDArray[np.uint8]
    """(side, side, 3), or (height, width, 3) of a whole image."""
    digest: bytes
    """See `pixels_digest`."""
    width: int
    """Of the original, upright, in pixels."""
    height: int
    format: str
    """Pillow's name of the format, such as `JPEG`."""
    notes: tuple[str, ...]
    """Any of `animated`, `sixteen_bit`, `transparent`, `cmyk`, `rotated_by_exif`."""
    thumbnail: bytes
    """See `thumbnail`."""


def decode(data: bytes, side: int | None, interpolation: str, crop: int | None = None) -> DecodedImage:
    """Decode, rotate upright, flatten to RGB, resize the shorter side and crop the centre square.

    Transparency is composited on white; 16-bit values are scaled by their declared range (v / 257), not clipped; of an
    animation the first frame is used.

    Args:
        data: the whole file.
        side: of the result, in pixels; None = the whole image at its own size.
        interpolation: one of `INTERPOLATIONS`.
        crop: see `square`.

    Raises:
        BadImageError: the bytes are no image that can be used.
    """
    with opened(data) as image:
        return _convert(image, side, interpolation, crop)


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """An image whose header is within the limits; whatever its decoding raises is a `BadImageError`.

    Raises:
        BadImageError: the bytes are no image that can be used.
    """
    if not data:
        raise BadImageError("the file is empty")
    if len(data) > MAX_BYTES:
        raise BadImageError(f"{len(data) / 2**20:.0f} MiB is over the limit of {MAX_BYTES // 2**20} MiB")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image)
            yield image
    except UnidentifiedImageError as error:
        raise BadImageError(f"not a picture ({', '.join(FORMATS)}): it begins with {_beginning(data)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow raises before it returns an image: its size is in the message alone.
        raise _too_many_pixels(int("".join(re.findall(r"\((\d+) pixels\)", str(error))) or 0)) from error
    except BadImageError:
        raise
    except MemoryError as error:
        raise BadImageError("needs more memory than a decoder may take") from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything: struct.error, SyntaxError, KeyError
        raise BadImageError(f"truncated or damaged: {error}") from error


def _beginning(data: bytes) -> str:
    """The first bytes of a file, as text where they are."""
    first = data[:12]
    if first.isascii() and first.decode("ascii").isprintable():
        return f'the text "{first.decode("ascii")}"'
    return f"the bytes {first.hex(' ')}"


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, as stored; no pixel is decoded.

    Raises:
        BadImageError: the bytes are no image that can be used, as far as the header shows.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image)
            return image.size
    except BadImageError:
        raise
    except Exception as error:  # as for `decode`
        raise BadImageError(f"not a picture ({', '.join(FORMATS)}): {error}") from error


def upright_size(data: bytes) -> tuple[int, int, bool]:
    """Width and height in pixels as shown, and whether the EXIF orientation turns the image; no pixel is decoded.

    Raises:
        BadImageError: the bytes are no image that can be used, as far as the header shows.
    """
    with opened(data) as image:
        width, height = image.size
        orientation = orientation_of(image)
        if orientation >= TRANSPOSED_FROM:
            return height, width, True
        return width, height, orientation != 1


def to_eight_bit(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Scale 0…65535 to 0…255, rounded.

    Example:
        >>> to_eight_bit(np.array([0, 257, 65535], np.uint16)).tolist()
        [0, 1, 255]
    """
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def pixels_digest(image: Image.Image) -> bytes:
    """SHA-256 of an RGB image at full size, independent of its file format."""
    # With the size: a 2 x 8 image and a 4 x 4 one may have equal bytes.
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).digest()


def thumbnail(image: Image.Image) -> bytes:
    """Bytes by which nearly equal RGB images are recognised.

    `THUMBNAIL_SIDE`² of luminance, then 3 · `COLOUR_SIDE`² of colour, both of the whole image, squashed to a square.
    """
    # Not of the decoded square: a crop of a panorama shows less than the file that was saved again.
    small = image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    colour = small.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX)
    return small.convert("L").tobytes() + colour.tobytes()


def square(image: Image.Image, side: int, interpolation: str, crop: int | None = None) -> Image.Image:
    """Resize the shorter side to `side` and crop the centre square.

    Rounds as torchvision's `Resize` and `CenterCrop`.

    Args:
        crop: side of the crop that an evaluation will take from the centre of this square. That crop then has the
            pixels that `CenterCrop(crop)` takes from the resized image: two crops in a row round twice, and may
            otherwise end up one pixel away. None = `side`.
    """
    width, height = image.size
    short = min(width, height)
    long = max(width, height)
    if short != side:
        other = int(side * long / short)
        size = (side, other) if width <= height else (other, side)
        image = image.resize(size, INTERPOLATIONS[interpolation])
    if image.size == (side, side):
        return image
    inner = side if crop is None else crop
    margin = round((side - inner) / 2.0)
    left, top = (round((length - inner) / 2.0) - margin for length in image.size)
    return image.crop((left, top, left + side, top + side))


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image as `decode` sees it before it is resized: upright, in 8-bit RGB.

    Raises:
        BadImageError: its pixels have no declared range of values.
    """
    file_format = str(image.format)
    image.load()
    return _to_rgb(_upright(image), file_format)[0]


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(width * height)
    if min(width, height) < MIN_SIDE:
        raise BadImageError(f"{width} x {height} is too small: the shorter side must have {MIN_SIDE} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImageError(f"{width} x {height} is too thin: the longer side may be {MAX_ASPECT} times the shorter")


def _too_many_pixels(count: int) -> BadImageError:
    return BadImageError(f"{count / 1e6:.0f} megapixels are over the limit of {MAX_PIXELS // 10**6}")


def _convert(image: Image.Image, side: int | None, interpolation: str, crop: int | None) -> DecodedImage:
    notes = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append("animated")
    file_format = str(image.format)
    # Decodes the pixels: a truncated file is an error here, not at its first use below.
    image.load()
    if image.mode == "CMYK":
        notes.append("cmyk")
    upright = _upright(image)
    if upright is not image:
        notes.append("rotated_by_exif")
    rgb, note = _to_rgb(upright, file_format)
    if note is not None:
        notes.append(note)
    pixels = np.asarray(rgb if side is None else square(rgb, side, interpolation, crop))
    return DecodedImage(pixels, pixels_digest(rgb), *upright.size, file_format, tuple(notes), thumbnail(rgb))


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 = as stored."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF beside intact pixels: no orientation
        return 1
    return int(orientation) if orientation in range(2, 9) else 1


def _upright(image: Image.Image) -> Image.Image:
    return image if orientation_of(image) == 1 else ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, file_format: str) -> tuple[Image.Image, str | None]:
    """The image in RGB, and the note on how it was converted."""
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray(to_eight_bit(np.asarray(image, dtype=np.uint16))).convert("RGB"), "sixteen_bit"
    if image.mode == "I" and file_format in ("PNG", "PPM"):
        return Image.fromarray(to_eight_bit(np.asarray(image).astype(np.uint16))).convert("RGB"), "sixteen_bit"
    if image.mode in ("I", "F"):
        raise BadImageError(f"pixels of mode {image.mode!r} have no declared range; save them with 8 or 16 bits")
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        # White, as a viewer shows it; dropping alpha would uncover whatever colour transparent pixels happen to have.
        white = Image.new("RGBA", foreground.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, foreground).convert("RGB"), "transparent"
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return rgb, None
