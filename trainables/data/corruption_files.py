"""Pictures that were corrupted before, in the files of CIFAR-10-C (Hendrycks and Dietterich, 2019).

A folder with `labels.npy` (5·n,) and `<corruption>.npy` (5·n, H, W, 3) uint8 for each corruption: n pictures at
severity 1, the same n at severity 2, and so on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainables.specs.corruptions import COMMON, SEVERITIES

LABELS = "labels.npy"


def corruptions_in(folder: str | Path) -> tuple[str, ...]:
    """The corruptions that a folder has files of, in the order of the paper's tables.

    Raises:
        ValueError: it is no folder, or has none of them.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(
            f"{folder} is no folder. Corrupted pictures are in one, as {LABELS} and one file per corruption."
        )
    names = tuple(name for name in COMMON if (root / f"{name}.npy").is_file())
    if not names:
        raise ValueError(
            f"{folder} must have at least one of {', '.join(f'{name}.npy' for name in COMMON)}, but has none."
        )
    return names


class CorruptedFiles:
    """A folder of corrupted pictures; arrays are mapped into memory, not read.

    Args:
        folder: with the files.
        names: of the corruptions that are needed.
        classes: number of classes of the study; label i is its i-th class.

    Raises:
        ValueError: a file is missing or is no array of the expected shape and type, or labels that are no classes.
    """

    def __init__(self, folder: str | Path, names: Iterable[str], classes: int) -> None:
        root = Path(folder)
        labels = _array(root / LABELS)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) % len(SEVERITIES) or not len(labels):
            raise ValueError(
                f"{root / LABELS} must hold whole numbers, as many for each of {len(SEVERITIES)} severities, but has "
                f"{labels.dtype} of shape {labels.shape}."
            )
        used = np.unique(labels)
        if used[0] < 0 or len(used) != classes or used[-1] != classes - 1:
            raise ValueError(
                f"The labels in {root / LABELS} must be the study's {classes} classes, 0 to {classes - 1} in their "
                f"order, but are {len(used)} different ones from {used[0]} to {used[-1]}."
            )
        self._labels = labels.astype(np.int64)
        self._pictures: dict[str, NDArray[np.uint8]] = {}
        for name in names:
            path = root / f"{name}.npy"
            pictures: NDArray[Any] = _array(path)
            if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
                raise ValueError(
                    f"{path} must hold uint8 pictures (N, H, W, 3), but has {pictures.dtype} of shape {pictures.shape}."
                )
            if len(pictures) != len(labels):
                raise ValueError(
                    f"{path} must hold a picture for each of {len(labels)} labels, but has {len(pictures)}."
                )
            self._pictures[name] = pictures

    @property
    def count(self) -> int:
        """Pictures per corruption and severity."""
        return len(self._labels) // len(SEVERITIES)

    def pictures(self, name: str, severity: int, count: int) -> NDArray[np.uint8]:
        """The first pictures of a corruption at a severity, (count, H, W, 3) uint8."""
        start = (severity - 1) * self.count
        return np.array(self._pictures[name][start : start + count])

    def labels(self, count: int) -> NDArray[np.int64]:
        """Labels of the first pictures."""
        return self._labels[:count]


def _array(path: Path) -> NDArray[np.generic]:
    try:
        # Nothing pickled is read: an array of objects is refused by NumPy.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} does not exist. A folder of corrupted pictures has {LABELS} and one file per name."
        ) from error
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} must be an array that NumPy saved, but cannot be read as one ({error}).") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} must hold one array, but holds several.")
    return array
