"""Albums of pictures that a perceptual hash takes for photographs, with versions of some of them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from trainables.data.store import Store

PHOTO_SIDE = 96


def scene(number: int, side: int = PHOTO_SIDE) -> Image.Image:
    """A smooth coloured picture with edges, decided by a number: what a photograph is to a hash."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int64)
    rows, columns = np.mgrid[:side, :side]
    for _ in range(4):
        y, x, radius = generator.integers(10, side - 10, 3)
        inside = (rows - y) ** 2 + (columns - x) ** 2 < (radius / 3) ** 2
        picture[inside] = generator.integers(0, 256, 3)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def album(root: Path, per_class: int = 20, copies: int = 5) -> Path:
    """`root/<class>/*` of which the first pictures of each class lie there in two more versions."""
    for index, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            picture = scene(1000 * index + number)
            picture.save(root / name / f"{number:03d}.png")
            if number < copies:
                as_jpeg(picture, 70).save(root / name / f"again-{number:03d}.jpg")
                shutil.copy(root / name / f"{number:03d}.png", root / name / f"copy-{number:03d}.png")
    return root


def split_of(store: Store) -> dict[str, str]:
    return {name: split for split in store.splits for name in store.names(split)}
