"""Seeded splits, stratified by class, and the nested order behind `train_fraction`.

Pure functions on integer labels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainables.specs.seeds import stream_seed

Integers = NDArray[np.int64]

TRAIN = 0
VAL = 1
TEST = 2


def stratified_split(
    labels: Integers, domains: Integers, val_fraction: float, test_fraction: float, seed: int
) -> NDArray[np.int8]:
    """Assign every sample to train, val or test, with the same shares in each class.

    Of a class with n samples, max(1, round(n · fraction)) go to test, and likewise to val; the rest, at least one, is
    for training. Within a class the domains are spread evenly over the three.

    Args:
        labels: (n,) class of each sample.
        domains: (n,) domain of each sample.
        val_fraction: share for validation, in [0, 1); 0 = no validation split.
        test_fraction: share for testing, in [0, 1); 0 = no test split.
        seed: which samples go where; the sizes depend on the fractions alone.

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
    codes = np.full(len(labels), TRAIN, dtype=np.int8)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        val_size, test_size = _split_sizes(len(members), val_fraction, test_fraction, int(label))
        # A random stream per class: other classes never change where its samples go.
        order = members[_spread(domains[members], stream_seed(seed, "split", int(label)))]
        # Test first: another share for validation leaves the test split as it is (except in the smallest classes).
        codes[order[:test_size]] = TEST
        codes[order[test_size : test_size + val_size]] = VAL
    return codes


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
