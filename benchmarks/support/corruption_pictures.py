"""Pictures on which corruptions are compared with the reference, and what was measured of the reference on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

REFERENCE = Path(__file__).with_name("corruption_reference.json")
"""Written by `benchmarks/corruption_reference.py`."""

CORNERS = ((0, 0), (200, 400))
"""Row and column of the crops of each photograph."""

LARGE = 224
SMALL = 32


def pictures(side: int) -> NDArray[np.uint8]:
    """Crops (4, side, side, 3) uint8 of the photographs that scikit-learn ships."""
    crops = [
        image[top : top + LARGE, left : left + LARGE] for image in load_sample_images().images for top, left in CORNERS
    ]
    resized = [Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC) for crop in crops]
    return np.stack([np.asarray(picture) for picture in resized])


def mean_distance(corrupted: NDArray[np.uint8], original: NDArray[np.uint8]) -> float:
    """Mean absolute difference of the values, on a scale from 0 to 255."""
    return float(np.abs(corrupted.astype(np.int16) - original).mean())


def reference() -> dict[str, Any]:
    """Mean distance by side ("224", "32") and corruption, a list over severities; see the script."""
    content: dict[str, Any] = json.loads(REFERENCE.read_text())
    return content
