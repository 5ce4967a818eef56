"""Folders of one-coloured images for tests that count files and never train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def write_plain_images(root: Path, counts: Mapping[str, int], side: int = 8) -> Path:
    """Write `counts[folder]` one-coloured PNG files into each folder below `root`; `{"photo/cat": 3}` writes three."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shade = (40 * number % 255, len(folder) * 9 % 255, 90)
            Image.new("RGB", (side, side), shade).save(root / folder / f"{number}.png")
    return root
