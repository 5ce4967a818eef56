"""Small data sets of pictures with masks, drawn from rectangles: the pixels of every class can be counted by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VOID = 255
Box = tuple[int, int, int, int, int]
"""Left, top, right, bottom, value."""
LABEL_COLOURS = {"cat": (48, 112, 32), "background": (0, 0, 0), "dog": (176, 112, 32)}
"""Classes of `write_colours`, in the order of the lines of the label file, which is not that of their names."""

_TINTS = np.random.default_rng(7).integers(40, 216, (256, 3))
_TINTS[:2] = [200, 60, 60], [40, 220, 60]


def boxes(width: int, height: int, *items: Box) -> NDArray[np.uint8]:
    """A mask (height, width) of zeros with boxes; later ones lie on top."""
    mask = np.zeros((height, width), np.uint8)
    for left, top, right, bottom, value in items:
        mask[top:bottom, left:right] = value
    return mask


def photo(mask: NDArray[np.uint8], number: int) -> Image.Image:
    """A picture in which every value of a mask has a colour, with noise that differs between numbers."""
    noise = np.random.default_rng(number).integers(-30, 31, (*mask.shape, 3))
    return Image.fromarray((_TINTS[mask] + noise).clip(0, 255).astype(np.uint8))


def save(image: Image.Image | NDArray[Any], path: Path, **options: Any) -> Path:
    """Write an image into a folder that is made first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def palette_image(mask: NDArray[np.uint8], colours: Sequence[int] | None = None) -> Image.Image:
    """A mask as a palette image; by default with the palette of VOC, in which index 255 is light grey."""
    if colours is None:
        bits = np.arange(256)[:, None] >> np.arange(8) & 1
        spread = 7 - np.arange(8) // 3
        channels = [(bits[:, channel::3] << spread[channel::3]).sum(axis=1) for channel in range(3)]
        colours = np.stack(channels, axis=1).ravel().tolist()
    image = Image.fromarray(mask)
    image.putpalette(list(colours))
    return image


def painted(mask: NDArray[np.uint8], colours: Mapping[int, tuple[int, int, int]]) -> NDArray[np.uint8]:
    """A mask as colours (height, width, 3)."""
    image = np.zeros((*mask.shape, 3), np.uint8)
    for value, colour in colours.items():
        image[mask == value] = colour
    return image


def write_pairs(
    root: Path, count: int = 8, values: Sequence[int] = (0, 1), side: int = 32, first: int = 0, **options: Any
) -> Path:
    """images/ and masks/ of squares of 12 x 12 pixels; objects have the values after the first, in turn.

    Args:
        root: of both folders.
        count: number of pairs.
        values: of the background, then of the objects.
        side: of the pictures.
        first: number of the first picture.
        options: `ending` of the masks, and options of saving them.
    """
    ending = options.pop("ending", "png")
    for number in range(first, first + count):
        kind = 1 + number % (len(values) - 1)
        mask = boxes(side, side, (10, 10, 22, 22, kind))
        save(photo(mask, number), root / "images" / f"{number:03d}.png")
        save(np.array([*values], np.uint8)[mask], root / "masks" / f"{number:03d}.{ending}", **options)
    return root


def write_voc(root: Path, palette: bool = True) -> Path:
    """VOC's layout: 13 pictures, 9 with masks that have a rim of 255, lists train (6), val (3) and trainval."""
    for number in range(13):
        mask = boxes(48, 40, (7, 7, 25, 25, VOID), (8, 8, 24, 24, (1, 15)[number % 2]))
        name = f"2007_{number:06d}"
        save(photo(mask, number), root / "JPEGImages" / f"{name}.jpg")
        if number < 9:
            save(palette_image(mask) if palette else mask, root / "SegmentationClass" / f"{name}.png")
            objects = np.where((mask > 0) & (mask < VOID), 1 + number % 3, mask).astype(np.uint8)
            save(palette_image(objects), root / "SegmentationObject" / f"{name}.png")
    write_lists(root, {"train": range(6), "val": range(6, 9), "trainval": range(9)}, "2007_{:06d}")
    return root


def write_lists(root: Path, lists: Mapping[str, Sequence[int]], name: str) -> None:
    """ImageSets/Segmentation/*.txt with formatted numbers."""
    folder = root / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    for key, numbers in lists.items():
        (folder / f"{key}.txt").write_text("".join(name.format(number) + "\n" for number in numbers))


def write_cityscapes(root: Path) -> Path:
    """Cityscapes' layout with all four files of a picture; the masks of the test split hold no class."""
    cities = (("train", "aachen"), ("train", "bochum"), ("val", "frankfurt"), ("test", "berlin"))
    edges: list[Box] = [(0, 0, 2, 32, 3), (2, 30, 64, 32, 1)]
    scene: list[Box] = [(0, 0, 64, 8, 23), (0, 8, 64, 20, 11), (0, 20, 64, 32, 7), (20, 16, 32, 24, 26)]
    scene.append((50, 10, 54, 12, 30))
    for seed, (split, city) in enumerate(cities):
        for number in range(2):
            labels = boxes(64, 32, *(edges if split == "test" else [*scene, *edges]))
            stem = f"{city}_{number:06d}_000019"
            picture = photo(boxes(64, 32, *scene, *edges), 2 * seed + number)
            save(picture, root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
            folder = root / "gtFine" / split / city
            save(labels, folder / f"{stem}_gtFine_labelIds.png")
            save(painted(labels, {7: (128, 64, 128), 26: (0, 0, 142)}), folder / f"{stem}_gtFine_color.png")
            instances = np.where(labels == 26, 26000, labels).astype(np.uint16)
            save(instances, folder / f"{stem}_gtFine_instanceIds.png")
            (folder / f"{stem}_gtFine_polygons.json").write_text("{}")
    return root


def write_colours(root: Path, label_file: bool = True, stray: int = 0) -> Path:
    """Masks of three colours, with CVAT's label file and list or without; `stray` pixels have a fourth colour."""
    masks = "SegmentationClass" if label_file else "masks"
    for number in range(6):
        mask = boxes(32, 32, (4, 4, 16, 16, 1), (20, 20, 28, 28, 2))
        image = painted(mask, {1: LABEL_COLOURS["cat"], 2: LABEL_COLOURS["dog"]})
        if number == 5:
            image[10, 4 : 4 + stray] = (49, 112, 32)
        save(photo(mask, number), root / ("JPEGImages" if label_file else "images") / f"{number:03d}.jpg")
        save(image, root / masks / f"{number:03d}.png")
    if label_file:
        lines = [f"{name}:{','.join(map(str, colour))}::" for name, colour in LABEL_COLOURS.items()]
        (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n" + "\n".join(lines) + "\n")
        write_lists(root, {"default": range(6)}, "{:03d}")
    return root


def write_sizes(root: Path, kind: str) -> Path:
    """Six pairs of 48 x 40.

    Args:
        root: of images/ and masks/.
        kind: `half`: masks of half the size; `two_more`: one mask is two pixels too large; `turned`: EXIF turns the
            first two photographs, their masks are turned, too; `as_stored`: these masks are not.
    """
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn by 90 degrees, clockwise
    for number in range(6):
        mask = boxes(48, 40, (4, 4, 20, 14, 1))
        labels = mask
        options: dict[str, Any] = {"quality": 95}
        if kind == "half":
            labels = boxes(24, 20, (2, 2, 10, 7, 1))
        elif kind == "two_more" and number == 3:
            labels = boxes(50, 42, (4, 4, 20, 14, 1))
        elif kind in ("turned", "as_stored") and number < 2:
            options["exif"] = exif
            labels = np.rot90(mask, -1) if kind == "turned" else mask
        save(photo(mask, number), root / "images" / f"{number:03d}.jpg", **options)
        save(np.ascontiguousarray(labels), root / "masks" / f"{number:03d}.png")
    return root


def write_names(root: Path, kind: str) -> Path:
    """Twelve pairs, of which object N has 8 · N pixels.

    Args:
        root: of the folders.
        kind: `suffix`: masks end in _mask; `gap`: the mask of picture 1 is called 99; `one_folder`: masks end in _L and
            lie beside the pictures.
    """
    for number in range(1, 13):
        mask = boxes(32, 32, (2, 4, 2 + 2 * number, 8, 1))
        save(photo(mask, number), root / "images" / f"img_{number}.jpg")
        if kind == "one_folder":
            save(mask, root / "images" / f"img_{number}_L.png")
        else:
            shown = 99 if kind == "gap" and number == 1 else number
            save(mask, root / "masks" / f"img_{shown}_mask.png")
    return root


def write_voids(root: Path) -> Path:
    """Folders train (9), val (3) and test (3): one training mask is void, no validation picture has class 2."""
    for split, first, count in (("train", 0, 9), ("val", 20, 3), ("test", 30, 3)):
        for number in range(first, first + count):
            items: list[Box] = [(4, 4, 16, 16, 1)]
            if split != "val":
                items.append((20, 20, 28, 28, 2))
            mask = boxes(32, 32, *items)
            save(photo(mask, number), root / split / "images" / f"{number}.png")
            save(np.full_like(mask, VOID) if number == 8 else mask, root / split / "masks" / f"{number}.png")
    return root


def write_domains(root: Path, domains: Sequence[str] = ("photo", "sketch")) -> Path:
    """Six pairs per domain, no two of one size, few sides a multiple of 32."""
    shapes = ((33, 47), (50, 70), (64, 64), (96, 40), (31, 31), (65, 33))
    for shift, domain in enumerate(domains):
        for number, (width, height) in enumerate(shapes):
            mask = boxes(width, height, (5, 6, 15, 16, 1))
            save(photo(mask, number + 100 * shift), root / domain / "images" / f"{number:03d}.png")
            save(mask, root / domain / "masks" / f"{number:03d}.png")
    return root
