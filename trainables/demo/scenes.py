"""The built-in pictures with masks: digits on photographs; no download.

Handwritten digits (see `trainables.demo.digits`) in dark ink on faded photographs, the two that scikit-learn ships
(`sklearn.datasets.load_sample_images`, both CC BY). A mask has the digit of every pixel that is ink by more than half.
Pictures are of many sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainables.demo.digits import SHIFTS, handwritten_digits, printed_digits, shift
from trainables.specs.seeds import stream_seed

Picture = NDArray[np.uint8]

CLASSES = ("background", *"0123456789")
COUNTS = {"train": 320, "val": 96, "test": 96}
"""Scenes of each split."""
SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
"""Shares of the handwritten digits."""
SIDES = (56, 73)
"""Sides of a scene: from 56 to 72 pixels."""
CELL = 28
"""A scene has four cells, each of which may hold a digit, so that digits never overlap."""
MARGIN = 2
"""Rows and columns around a digit that have no ink in the built-in images (24 of 32 pixels are the digit)."""
FADED = 0.55
"""Share of white in the photographs: ink stays darker than what is around it."""
INK = 90
"""Brightest value of a channel of ink."""
SHIFTED = tuple(kind for kind in SHIFTS if kind != "rotated")
"""Shifts that leave every pixel where it is."""
PRINTED_PER_CLASS = 30


@dataclass(frozen=True)
class Scene:
    """A picture and its mask."""

    picture: Picture
    """(H, W, 3)"""
    mask: Picture
    """(H, W), indices into `CLASSES`."""


def scenes(seed: int) -> dict[str, list[Scene]]:
    """Scenes by split: `train`, `val`, `test`, and an OOD domain for each of `SHIFTED` and for `printed`.

    No digit and no part of a photograph is in two of training, validation and test. The shifted domains are the test
    scenes themselves; the printed ones have digits of many fonts on the photographs of the test.

    Args:
        seed: of everything that is random.
    """
    images, labels = handwritten_digits()
    parts = _parts(labels, np.random.default_rng(stream_seed(seed, "scenes")))
    drawn: dict[str, list[Scene]] = {}
    for name, rows in parts.items():
        random = np.random.default_rng(stream_seed(seed, "scenes", name))
        drawn[name] = _compose(images[rows], labels[rows], _photographs(name), COUNTS[name], random)
    for kind in SHIFTED:
        drawn[kind] = [
            Scene(shift(scene.picture[None], kind, stream_seed(seed, kind, number))[0], scene.mask)
            for number, scene in enumerate(drawn["test"])
        ]
    printed, printed_labels = printed_digits(PRINTED_PER_CLASS, stream_seed(seed, "printed"))
    random = np.random.default_rng(stream_seed(seed, "scenes", "printed"))
    drawn["printed"] = _compose(printed, printed_labels, _photographs("test"), COUNTS["test"], random)
    return drawn


def _parts(labels: NDArray[np.int64], random: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """Rows of the digits that each split may use, the same shares of every class."""
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in SHARES}
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        ends = np.rint(np.cumsum(list(SHARES.values())) * len(rows)).astype(np.int64)
        for name, part in zip(SHARES, np.split(rows, ends[:-1]), strict=True):
            parts[name].append(part)
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _photographs(split: str) -> list[Picture]:
    """The stretch of each photograph that a split may show: the left half, and the two halves of the rest."""
    from sklearn.datasets import load_sample_images

    stretches = {"train": (0.0, 0.5), "val": (0.5, 0.75), "test": (0.75, 1.0)}
    first, last = stretches[split]
    return [
        photograph[:, round(first * photograph.shape[1]) : round(last * photograph.shape[1])]
        for photograph in load_sample_images().images
    ]


def _compose(
    digits: Picture, labels: NDArray[np.int64], photographs: list[Picture], count: int, random: np.random.Generator
) -> list[Scene]:
    """Scenes of one to four digits each; every digit is used before one comes again."""
    deck: list[int] = []
    composed = []
    for _ in range(count):
        height, width = random.integers(*SIDES, size=2).tolist()
        picture = _background(photographs, height, width, random)
        mask = np.zeros((height, width), np.uint8)
        cells = [(row, column) for row in (0, 1) for column in (0, 1)]
        for cell in random.permutation(4)[: random.integers(1, 5)].tolist():
            if not deck:
                deck = random.permutation(len(digits)).tolist()
            number = deck.pop()
            _draw(picture, mask, digits[number], int(labels[number]) + 1, cells[cell], random)
        composed.append(Scene(np.rint(picture).astype(np.uint8), mask))
    return composed


def _background(
    photographs: list[Picture], height: int, width: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """A random piece of a photograph, faded."""
    photograph = photographs[random.integers(len(photographs))]
    top = random.integers(photograph.shape[0] - height + 1)
    left = random.integers(photograph.shape[1] - width + 1)
    piece = photograph[top : top + height, left : left + width].astype(np.float64)
    return (1 - FADED) * piece + FADED * 255


def _draw(
    picture: NDArray[np.float64],
    mask: Picture,
    digit: Picture,
    label: int,
    cell: tuple[int, int],
    random: np.random.Generator,
) -> None:
    """Put ink and label of a digit into one cell, in place."""
    glyph = digit[MARGIN:-MARGIN, MARGIN:-MARGIN, 0]
    top, left = (
        origin * (length // 2) + int(random.integers(length // 2 - CELL + 1))
        for origin, length in zip(cell, mask.shape, strict=True)
    )
    box = (slice(top, top + CELL), slice(left, left + CELL))
    coverage = 1 - glyph[:, :, None] / 255
    ink = random.integers(INK + 1, size=3)
    picture[box] = (1 - coverage) * picture[box] + coverage * ink
    mask[box][coverage[:, :, 0] > 0.5] = label
