"""A store of pictures with masks, held in memory: coloured rectangles on noise, no two pictures of one size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trainables.data.store import IGNORED

CLASSES = ("ground", "red", "blue")
COLOURS = {1: (220, 60, 50), 2: (40, 80, 220)}
SPLITS = {"train": 16, "val": 6, "test": 6, "ood/dark": 6}


@dataclass
class MaskMemoryStore:
    """What `trainables.data.store.MaskStoreLike` demands."""

    split_pictures: Mapping[str, Sequence[NDArray[np.uint8]]]
    split_masks: Mapping[str, Sequence[NDArray[np.uint8]]]
    classes: list[str] = field(default_factory=lambda: list(CLASSES))
    domains: list[str] = field(default_factory=lambda: ["plain", "dark"])
    path: str = "memory"

    @property
    def splits(self) -> list[str]:
        return list(self.split_masks)

    @property
    def digest(self) -> str:
        content = hashlib.sha256()
        for split in self.splits:
            for picture, mask in zip(self.split_pictures[split], self.split_masks[split], strict=True):
                content.update(picture.tobytes() + mask.tobytes())
        return content.hexdigest()

    @property
    def image_size(self) -> int:
        return max(int(side) for masks in self.split_masks.values() for mask in masks for side in mask.shape)

    def pictures(self, split: str) -> Sequence[NDArray[np.uint8]]:
        return self.split_pictures[split]

    def masks(self, split: str) -> Sequence[NDArray[np.uint8]]:
        return self.split_masks[split]

    def sizes(self, split: str) -> NDArray[np.int64]:
        return np.array([mask.shape for mask in self.split_masks[split]], np.int64)

    def images(self, split: str) -> NDArray[np.uint8]:
        raise AssertionError("pictures of different sizes are no array")

    def labels(self, split: str) -> NDArray[np.int64]:
        return np.zeros(len(self.split_masks[split]), np.int64)

    def domain_ids(self, split: str) -> NDArray[np.int64]:
        return np.full(len(self.split_masks[split]), int(split.startswith("ood/")), np.int64)

    def names(self, split: str) -> list[str]:
        return [f"{split}/{number}.png" for number in range(len(self.split_masks[split]))]

    def groups(self, split: str) -> NDArray[np.int64]:
        return np.full(len(self.split_masks[split]), -1, np.int64)

    def fraction(self, split: str, f: float, /) -> int:
        return max(1, round(f * len(self.split_masks[split])))


def rectangles(side: int = 24) -> MaskMemoryStore:
    """Pictures with sides from half to one and a half of `side`; every mask has a rim of ignored pixels."""
    random = np.random.default_rng(0)
    pictures: dict[str, list[NDArray[np.uint8]]] = {}
    masks: dict[str, list[NDArray[np.uint8]]] = {}
    for split, count in SPLITS.items():
        pairs = [_drawn(random, side, dark=split == "ood/dark") for _ in range(count)]
        pictures[split] = [picture for picture, _ in pairs]
        masks[split] = [mask for _, mask in pairs]
    return MaskMemoryStore(pictures, masks)


def _drawn(random: np.random.Generator, side: int, dark: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    height, width = random.integers(side // 2, side + side // 2, 2)
    picture = random.integers(90, 160, (height, width, 3))
    mask = np.zeros((height, width), np.uint8)
    for label, colour in COLOURS.items():
        top, left = random.integers(0, height // 2), random.integers(0, width // 2)
        box = (slice(top, top + height // 2), slice(left, left + width // 2))
        picture[box] = colour
        mask[box] = label
    mask[0] = IGNORED
    if dark:
        picture = picture // 2
    return picture.astype(np.uint8), mask
