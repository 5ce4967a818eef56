"""Deterministic, stratified splits: pure functions on labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


class SplitError(ValueError):
    """A class is too small to be split."""


def stratified_split(
    labels: Labels, val_fraction: float, test_fraction: float, seed: int, classes: list[str]
) -> dict[str, NDArray[np.int64]]:
    """Indices of `train`, `val` and `test`, per class, drawn from the seed.

    Every class gives at least one sample to each part whose fraction is above zero.

    Raises:
        SplitError: a class has fewer samples than parts.
    """
    parts: dict[str, list[NDArray[np.int64]]] = {"train": [], "val": [], "test": []}
    needed = 1 + (val_fraction > 0) + (test_fraction > 0)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < needed:
            raise SplitError(
                f"Each class needs at least {needed} ID images (train, val and test), but class "
                f"{classes[label]!r} has {len(members)}. Add images, or remove the class."
            )
        members = np.random.default_rng([seed, int(label)]).permutation(members)
        val = max(1, round(val_fraction * len(members))) if val_fraction > 0 else 0
        test = max(1, round(test_fraction * len(members))) if test_fraction > 0 else 0
        while val + test >= len(members):
            val, test = (val - 1, test) if val >= test else (val, test - 1)
        parts["val"].append(members[:val])
        parts["test"].append(members[val : val + test])
        parts["train"].append(members[val + test :])
    return {name: np.sort(np.concatenate(found)) for name, found in parts.items()}


def nested_order(labels: Labels, seed: int) -> NDArray[np.int64]:
    """An order in which every prefix is stratified: shuffled within each class, then sorted by rank / class size.

    The samples with rank / size < f, the fraction f of every class (rounded up), are a prefix of it, so that a smaller
    fraction is contained in a larger one.
    """
    rank = np.zeros(len(labels))
    size = np.bincount(labels) if len(labels) else np.zeros(0, int)
    for label in np.unique(labels):
        members = np.random.default_rng([seed, 1, int(label)]).permutation(np.flatnonzero(labels == label))
        rank[members] = np.arange(len(members)) / size[label]
    return np.lexsort((labels, rank)).astype(np.int64)


def fraction_count(labels: Labels, fraction: float) -> int:
    """Length of the prefix of a nested order that holds `fraction` of every class (rounded up).

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"0 < fraction <= 1 must hold, but got {fraction!r}.")
    # The product is rounded first: 0.07 * 100 is 7.000000000000001, which is 7 images and not 8.
    return int(sum(np.ceil(round(fraction * int(n), 9)) for n in np.bincount(labels)))
