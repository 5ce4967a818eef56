"""Two classes, of which one has 5 % of the images and is hard to tell from the other: accuracy rewards ignoring it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.support.synthetic import SIDE, MemoryStore

CLASSES = ["common", "rare"]
SIZES = {"train": 800, "val": 400, "test": 400, "ood/inverted": 100}
EVERY = 20
"""Every twentieth image is of the rare class."""
BRIGHTNESS = (0.42, 0.58)
"""Mean brightness of a class's disc."""
SPREAD = 0.13
"""Standard deviation of the brightness within a class: the classes are 1.2 of them apart."""


def imbalanced() -> MemoryStore:
    """Discs of two mean brightnesses, 95 : 5; inverted in the OOD domain."""
    generator = np.random.default_rng(0)
    pixels: dict[str, NDArray[np.uint8]] = {}
    targets: dict[str, NDArray[np.int64]] = {}
    domains: dict[str, NDArray[np.int64]] = {}
    for split, count in SIZES.items():
        labels = (np.arange(count) % EVERY == EVERY - 1).astype(np.int64)
        images = np.stack([_disc(label, generator) for label in labels.tolist()])
        is_ood = split.startswith("ood/")
        pixels[split] = 255 - images if is_ood else images
        targets[split] = labels
        domains[split] = np.full(count, int(is_ood))
    return MemoryStore(pixels, targets, domains, list(CLASSES), ["plain", "inverted"], "imbalanced-discs")


def write_imbalanced(root: Path) -> Path:
    """The ID images as a folder root/plain/<class>/<n>.png, the OOD domain beside it."""
    store = imbalanced()
    for split in store.splits:
        rows = zip(store.images(split), store.labels(split), store.domain_ids(split), strict=True)
        for number, (image, label, domain) in enumerate(rows):
            folder = root / store.domains[domain] / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{split.replace('/', '-')}-{number}.png")
    return root


def _disc(label: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    value = np.where(x**2 + y**2 < 25, generator.normal(BRIGHTNESS[label], SPREAD), 0.5)
    value = value + generator.normal(0, 0.02, size=(SIDE, SIDE))
    return np.repeat((np.clip(value, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)
