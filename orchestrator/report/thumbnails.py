"""Thumbnails of stored images as `src` of an `<img>`; the page loads nothing."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainables.data.store import MANIFEST, Store, StoreError

SIDE = 96
"""Side of a thumbnail, in pixels; smaller images are embedded as they are."""
LOSSLESS_SIDE = 64
"""Up to this side images are PNG: JPEG's artefacts would hide what there is to see."""
JPEG_QUALITY = 82
MOST = 1500
"""Thumbnails of a page, which then has about 6 MB."""


class Thumbnails:
    """Thumbnails of the samples of a data store.

    Args:
        store: None = the page is made without thumbnails.
        most: thumbnails that are made in all.
    """

    def __init__(self, store: Store | None, most: int = MOST) -> None:
        self.store = store
        self.left = most
        """Thumbnails that may still be made."""
        self._names: dict[str, list[str]] = {}

    def has(self, split: str, names: list[str]) -> bool:
        """Whether the store has exactly these samples in this split, in this order."""
        if self.store is None or split not in self.store.splits:
            return False
        if split not in self._names:
            self._names[split] = self.store.names(split)
        return self._names[split] == names

    def uri(self, split: str, position: int) -> str | None:
        """A sample's thumbnail; None where the page has as many as it may have."""
        if self.store is None or self.left <= 0:
            return None
        self.left -= 1
        return thumbnail(self.store.images(split)[position])


def thumbnail(pixels: NDArray[np.uint8]) -> str:
    """An image (H, W, 3) as a data URI."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((SIDE, SIDE))
    is_small = max(image.size) <= LOSSLESS_SIDE
    out = io.BytesIO()
    if is_small:
        image.save(out, "PNG")
    else:
        image.save(out, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/{'png' if is_small else 'jpeg'};base64,{base64.b64encode(out.getvalue()).decode()}"


def find_store(study: Path, digest: str) -> Store | None:
    """The data store of a digest beside a study's folder; None where there is none that can be read."""
    for manifest in sorted((study.parent / "data").glob(f"*/{MANIFEST}")):
        store = Store(manifest.parent)
        try:
            if store.digest == digest:
                return store
        except StoreError:
            continue
    return None
