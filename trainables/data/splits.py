"""Seeded splits, stratified by class, and the nested order behind `train_fraction`.

Pure functions on integer labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainables.specs.seeds import stream_seed

Integers = NDArray[np.int64]

TRAIN = 0
VAL = 1
TEST = 2


def stratified_split(
    labels: Integers,
    domains: Integers,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    groups: Sequence[Sequence[int]] = (),
) -> NDArray[np.int8]:
    """Assign every sample to train, val or test, with the same shares in each class.

    Of a class with n samples, max(1, round(n · fraction)) go to test, and likewise to val; the rest, at least one, is
    for training. Within a class the domains are spread evenly over the three.

    A group lies in one of the three. It takes the turn of its first sample in the random order of that sample's class,
    and is passed over where it would exceed what any of its classes still needs. Sizes are therefore those above
    wherever the samples outside of groups suffice to reach them. Where they do not, one more group is taken if that
    brings the size nearer; every class keeps a sample in each split as long as it has enough groups.

    Args:
        labels: (n,) class of each sample.
        domains: (n,) domain of each sample.
        val_fraction: share for validation, in [0, 1); 0 = no validation split.
        test_fraction: share for testing, in [0, 1); 0 = no test split.
        seed: which samples go where; the sizes depend on the fractions alone.
        groups: positions that must not be divided; each position in one group at most.

    Returns:
        (n,) codes `TRAIN`, `VAL` or `TEST`.

    Raises:
        ValueError: the fractions leave nothing to train on, or a class has fewer samples than splits.

    Example:
        >>> labels = np.repeat([0, 1], 6)
        >>> codes = stratified_split(labels, np.zeros(12, int), val_fraction=0.2, test_fraction=0.2, seed=0)
        >>> np.bincount(codes).tolist()  # per class: four for training, one for validation, one for testing
        [8, 2, 2]
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            "The fractions for validation and test must lie in [0, 1) and their sum must be below 1, but got "
            f"{val_fraction} and {test_fraction}."
        )
    draw = _GroupedDraw(labels, groups)
    classes = np.unique(labels).tolist()
    for label in classes:
        count = int(np.count_nonzero(labels == label))
        draw.wanted[VAL][label], draw.wanted[TEST][label] = _split_sizes(count, val_fraction, test_fraction, label)
    for label in classes:
        members = np.flatnonzero(labels == label)
        # A random stream per class: other classes never change where its samples go.
        order = members[_spread(domains[members], stream_seed(seed, "split", label))].tolist()
        # Test first: another share for validation leaves the test split as it is (except in the smallest classes).
        draw.fill(TEST, label, order)
        draw.fill(VAL, label, order)
    return draw.codes


class _GroupedDraw:
    """Splits that are filled group by group; every sample is in training at first.

    Args:
        labels: (n,) class of each sample.
        groups: positions that must not be divided; every other position is a group of its own.
    """

    def __init__(self, labels: Integers, groups: Sequence[Sequence[int]]) -> None:
        self.codes = np.full(len(labels), TRAIN, dtype=np.int8)
        self.wanted: dict[int, dict[int, int]] = {TEST: {}, VAL: {}}
        """Split → class → samples that it still needs."""
        self._labels = labels.tolist()
        # By its first position, which decides when a group has its turn.
        self._groups = {min(group): tuple(group) for group in groups}
        self._followers = {position for group in groups for position in group} - self._groups.keys()
        self._in_training = Counter(
            label
            for position in range(len(labels))
            if position not in self._followers
            for label in {self._labels[member] for member in self._members(position)}
        )
        """Class → groups in training that have samples of it."""

    def fill(self, code: int, label: int, order: Sequence[int]) -> None:
        """Move groups from training to a split until it has enough samples of a class.

        Args:
            code: of the split.
            label: the class.
            order: positions of the class, in the order in which they have their turn.
        """
        wanted = self.wanted[code]
        for position in order:
            if wanted[label] <= 0:
                return
            counts = self._movable(position, code)
            if counts and all(count <= wanted[each] for each, count in counts.items()):
                self._move(position, code, counts)
        if wanted[label] <= 0:
            return
        # Only groups that are larger than the gap remain: the smallest one, or none.
        larger = [counts for counts in ((self._movable(p, code)[label], p) for p in order) if counts[0]]
        if not larger:
            return
        # By size alone: `min` takes the first in the order among equal ones.
        count, position = min(larger, key=lambda pair: pair[0])
        is_empty = not (self.codes[order] == code).any()
        if is_empty or count < 2 * wanted[label]:
            self._move(position, code, self._movable(position, code))

    def _members(self, position: int) -> tuple[int, ...]:
        return self._groups.get(position, (position,))

    def _movable(self, position: int, code: int) -> Counter[int]:
        """Samples of each class in the group that a position leads.

        Empty where it leads none, where the group is in a split already, and where a class needs it elsewhere.
        """
        if position in self._followers or self.codes[position] != TRAIN:
            return Counter()
        counts = Counter(self._labels[member] for member in self._members(position))
        for label in counts:
            for_validation = 1 if code == TEST and self.wanted[VAL][label] > 0 else 0
            if self._in_training[label] - 1 < 1 + for_validation:
                return Counter()
        return counts

    def _move(self, position: int, code: int, counts: Counter[int]) -> None:
        self.codes[list(self._members(position))] = code
        for label, count in counts.items():
            self._in_training[label] -= 1
            self.wanted[code][label] -= count


def nested_order(labels: Integers, domains: Integers, seed: int) -> Integers:
    """An order in which every `train_fraction` is a prefix, and every prefix a stratified sample.

    Each class is shuffled (its domains spread evenly); its sample of rank r out of n_c gets the key r / n_c, and
    samples are sorted by key, ties by class. Sample i is in fraction f if and only if its key is below f, so that a
    smaller fraction is contained in a larger one.

    Args:
        labels: (n,) class of each sample.
        domains: (n,) domain of each sample.
        seed: of the shuffles.

    Returns:
        (n,) positions, to be applied as `labels[order]`.

    Example:
        >>> labels = np.array([0, 0, 0, 0, 1, 1])
        >>> order = nested_order(labels, np.zeros(6, int), seed=0)
        >>> labels[order].tolist()  # half of each class comes first
        [0, 1, 0, 0, 1, 0]
    """
    keys = np.empty(len(labels))
    ranks = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = members[_spread(domains[members], stream_seed(seed, "order", int(label)))]
        ranks[order] = np.arange(len(members))
        keys[order] = np.arange(len(members)) / len(members)
    # `lexsort` takes its last key as the primary one.
    return np.lexsort((ranks, labels, keys)).astype(np.int64)


def fraction_size(labels: Integers, fraction: float) -> int:
    """Length of the nested-order prefix with a fraction of each class.

    Σ_c |{r : r / n_c < fraction}|; at least one sample per class.

    Args:
        labels: (n,) class of each sample, in any order.
        fraction: share of each class, in (0, 1].

    Raises:
        ValueError: the fraction lies outside (0, 1].

    Example:
        >>> fraction_size(np.repeat([0, 1], 100), 0.07)
        14
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"A fraction of the training data must lie in (0, 1], but got {fraction}.")
    _, counts = np.unique(labels, return_counts=True)
    # Divided as in `nested_order`, so that both round alike: ceil(0.07 · 100) would be 8.
    return sum(int(np.count_nonzero(np.arange(n) / n < fraction)) for n in counts)


def _split_sizes(count: int, val_fraction: float, test_fraction: float, label: int) -> tuple[int, int]:
    """Sizes of validation and test of a class with `count` samples.

    At least one sample remains for training.
    """
    sizes = [max(1, round(count * fraction)) if fraction > 0 else 0 for fraction in (val_fraction, test_fraction)]
    parts = 1 + sum(size > 0 for size in sizes)
    if count < parts:
        raise ValueError(
            f"A class to be split into {parts} parts needs {parts} samples, but class {label} has {count}."
        )
    while sum(sizes) >= count:
        # At equal sizes the first, validation, gives way.
        sizes[int(np.argmax(sizes))] -= 1
    return sizes[0], sizes[1]


def _spread(domains: Integers, seed: int) -> Integers:
    """A random order of one class, stratified by domain.

    Any stretch of it has each domain in proportion, to within one sample.
    """
    generator = np.random.default_rng(seed)
    keys = np.empty(len(domains))
    for domain in np.unique(domains):
        members = np.flatnonzero(domains == domain)
        # A random phase per domain: otherwise the first sample of every domain would have key 0 and come first.
        keys[generator.permutation(members)] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.argsort(keys, kind="stable").astype(np.int64)
