"""Decoding of mask files to integers or colours, and their translation to class indices.

A mask is a table of labels, not a picture: its colours are not converted, its size and its orientation are those of the
file. In this order: a decoded mask; its summary; the translation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from orchestrator.ingest.images import BadImageError, opened, orientation_of

MAX_VALUES = 1024
"""Different values of a mask whose pixels are counted one by one, the most frequent ones."""
MISSING = -1
"""Entry of a translation for values without a meaning."""

INDEX = "index"
"""Kind of a mask of integers: palette index, one channel, or one bit."""
GREY = "grey"
"""Kind of a mask with three equal channels: integers, or colours without colour."""
COLOUR = "colour"
"""Kind of a mask of colours."""

_UNSCALE = {"L;2": 85, "L;2R": 85, "L;4": 17, "L;4R": 17}
"""Pillow's raw modes of 2 and 4 bits a pixel → the factor by which it scales them to 8 bits."""
_LOSSY_TIFF = frozenset({"jpeg", "tiff_jpeg", "webp"})


@dataclass(frozen=True, slots=True)
class DecodedMask:
    """A mask as it is stored."""

    values: NDArray[np.int32]
    """(height, width): integers, or colours as 0xRRGGBB."""
    kind: str
    """`INDEX`, `GREY` or `COLOUR`."""
    format: str
    """Pillow's name of the format, such as `PNG`."""
    lossy: bool
    """Whether the format changes values when it is saved."""
    palette: Mapping[int, int]
    """Index → colour as 0xRRGGBB; empty = the mask has no palette."""


class MaskOutcome(NamedTuple):
    """What decoding a mask has shown."""

    width: int
    height: int
    format: str
    kind: str
    lossy: bool
    counts: dict[int, int]
    """Value → pixels, of the `MAX_VALUES` most frequent."""
    distinct: int
    """Number of different values."""
    solid: frozenset[int]
    """Values that fill 2 x 2 pixels somewhere; smoothing leaves values that do not."""
    palette: dict[int, int]
    """Colour of each value that occurs; empty = the mask has no palette."""
    digest: str
    """Of its values, in hex: different for different masks of one picture."""

    def to_json(self) -> list[Any]:
        """The fields as JSON values."""
        return [
            *self[:5],
            list(self.counts.items()),
            self.distinct,
            sorted(self.solid),
            list(self.palette.items()),
            self.digest,
        ]

    @classmethod
    def from_json(cls, fields: list[Any]) -> MaskOutcome:
        """The inverse of `to_json`."""
        width, height, file_format, kind, lossy, counts, distinct, solid, palette, digest = fields
        return cls(
            width, height, file_format, kind, lossy, dict(counts), distinct, frozenset(solid), dict(palette), digest
        )  # fmt: skip


@dataclass(frozen=True)
class Translation:
    """Class index of every value: what the masks of a store were translated by."""

    classes: tuple[str, ...]
    integers: Mapping[int, int] = field(default_factory=dict)
    """Value → class index, or `trainables.data.store.IGNORED`."""
    colours: Mapping[int, int] = field(default_factory=dict)
    """Colour as 0xRRGGBB → class index, or `IGNORED`."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "classes": list(self.classes),
            "integers": sorted(self.integers.items()),
            "colours": sorted(self.colours.items()),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Translation:
        """The inverse of `to_json`."""
        return cls(tuple(fields["classes"]), dict(fields["integers"]), dict(fields["colours"]))

    def index(self, value: int, kind: str, palette: Mapping[int, int]) -> int:
        """Class index of a value; `MISSING` = it has no meaning.

        The index of a palette is the label, unless labels are given by colour alone.
        """
        if kind != COLOUR and (self.integers or not self.colours):
            return self.integers.get(value, MISSING)
        if kind == COLOUR:
            return self.colours.get(value, MISSING)
        return self.colours.get(palette.get(value, grey_colour(value)), MISSING)

    def apply(self, mask: DecodedMask) -> NDArray[np.uint8]:
        """Class indices (height, width), 255 = ignored.

        Raises:
            BadImageError: a value without a meaning.
        """
        raw, _ = _counted(mask.values, mask.kind)
        indices = [self.index(value, mask.kind, mask.palette) for value in raw.tolist()]
        if MISSING in indices:
            raise BadImageError(f"its mask holds {raw_text(int(raw[indices.index(MISSING)]), mask.kind)}, no label")
        if mask.kind == COLOUR:
            return np.array(indices, np.uint8)[np.searchsorted(raw, mask.values)]
        table = np.zeros(int(raw[-1]) + 1, np.uint8)
        table[raw] = indices
        return table[mask.values]


def grey_colour(value: int) -> int:
    """The colour 0xRRGGBB of three equal channels.

    Example:
        >>> hex(grey_colour(255))
        '0xffffff'
    """
    return value << 16 | value << 8 | value


def raw_text(value: int, kind: str) -> str:
    """A value as a reader knows it: an integer, or red, green and blue."""
    return f"{value >> 16},{value >> 8 & 255},{value & 255}" if kind == COLOUR else str(value)


def _counted(values: NDArray[np.int32], kind: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different values, ascending, and the pixels of each."""
    if kind == COLOUR:
        raw, counts = np.unique(values, return_counts=True)
        return raw.astype(np.int64), counts.astype(np.int64)
    # Integers have 16 bits at most: counting needs no sorting.
    histogram = np.bincount(values.ravel())
    present = np.flatnonzero(histogram)
    return present.astype(np.int64), histogram[present].astype(np.int64)


def decode_mask(data: bytes) -> DecodedMask:
    """Decode a mask without changing a value.

    Indices of a palette and the values of 1, 2, 4, 8 and 16 bits are taken as they are stored; three channels are
    colours.

    Raises:
        BadImageError: no image, several frames, transparency, an orientation of its own, or a type of pixel that holds
            no labels.
    """
    with opened(data) as image:
        return _decoded(image, data)


def _decoded(image: Image.Image, data: bytes) -> DecodedMask:
    file_format = str(image.format)
    if getattr(image, "n_frames", 1) > 1:
        raise BadImageError("the mask has several frames")
    scale = _stored_scale(image)
    image.load()
    lossy = _is_lossy(image, data)
    if orientation_of(image) != 1:
        raise BadImageError("the mask has an EXIF orientation of its own; save it upright")
    if image.mode in ("P", "L", "1") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int32)
        values = np.rint(values * scale).astype(np.int32) if scale != 1 else values
        return DecodedMask(values, INDEX, file_format, lossy, _palette(image) if image.mode == "P" else {})
    if image.mode == "I":
        values = np.asarray(image).astype(np.int32)
        values = np.rint(values * scale).astype(np.int32) if scale != 1 else values
        if values.min() < 0 or values.max() >= 2**16:
            raise BadImageError(f"the mask holds values from {values.min()} to {values.max()}, beyond 16 bits")
        return DecodedMask(values, INDEX, file_format, lossy, {})
    if image.mode in ("LA", "PA", "RGBA"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise BadImageError("the mask has transparent pixels, which are no label; save it without transparency")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if image.mode == "L":
        return DecodedMask(np.asarray(image).astype(np.int32), INDEX, file_format, lossy, {})
    if image.mode != "RGB":
        raise BadImageError(f"the mask has pixels of mode {image.mode!r}; save indices or RGB colours")
    channels = np.asarray(image)
    red = channels[..., 0].astype(np.int32)
    if np.array_equal(channels[..., 0], channels[..., 1]) and np.array_equal(channels[..., 0], channels[..., 2]):
        return DecodedMask(red, GREY, file_format, lossy, {})
    green = channels[..., 1].astype(np.int32)
    return DecodedMask(red << 16 | green << 8 | channels[..., 2], COLOUR, file_format, lossy, {})


def _stored_scale(image: Image.Image) -> float:
    """Factor from the values that Pillow returns to those of the file."""
    tiles = getattr(image, "tile", None)  # of images that were opened from a file
    if not tiles:
        return 1
    args = tiles[0][3]
    arguments = args if isinstance(args, tuple) else (args,)
    if image.format == "PPM" and len(arguments) > 1:
        # Pillow scales netpbm files to the full range of 8 or 16 bits.
        full = 65535 if image.mode.startswith("I") else 255
        return float(arguments[-1]) / full
    return 1 / _UNSCALE.get(str(arguments[0]), 1)


def _is_lossy(image: Image.Image, data: bytes) -> bool:
    if image.format == "WEBP":
        # Pillow does not tell: a lossless picture has a chunk VP8L instead of VP8.
        return b"VP8L" not in data[: 2**16]
    return image.format in ("JPEG", "MPO") or image.info.get("compression") in _LOSSY_TIFF


def _palette(image: Image.Image) -> dict[int, int]:
    colours = image.getpalette("RGB") or []
    return {
        index: colours[3 * index] << 16 | colours[3 * index + 1] << 8 | colours[3 * index + 2]
        for index in range(len(colours) // 3)
    }


def summary(mask: DecodedMask) -> MaskOutcome:
    """What a study must know of a mask before its pixels are stored."""
    values, counts = _counted(mask.values, mask.kind)
    order = np.argsort(-counts, kind="stable")[:MAX_VALUES]
    corner = mask.values[:-1, :-1]
    same = (corner == mask.values[1:, :-1]) & (corner == mask.values[:-1, 1:]) & (corner == mask.values[1:, 1:])
    listed = {int(values[i]): int(counts[i]) for i in order}
    height, width = mask.values.shape
    return MaskOutcome(
        width=width,
        height=height,
        format=mask.format,
        kind=mask.kind,
        lossy=mask.lossy,
        counts=dict(sorted(listed.items())),
        distinct=len(values),
        solid=frozenset(_counted(corner[same], mask.kind)[0].tolist()) & listed.keys(),
        palette={value: mask.palette[value] for value in listed if value in mask.palette},
        digest=hashlib.sha256(f"{mask.values.shape}".encode() + mask.values.tobytes()).hexdigest()[:32],
    )
