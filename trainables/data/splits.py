"""Which sample goes where: seeded splits, stratified by class, and the nested order behind `train_fraction`.

Pure functions on integer labels; no file is read here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainables.specs.seeds import stream_seed

Integers = NDArray[np.int64]

TRAIN, VAL, TEST = 0, 1, 2
"""Codes that `stratified_split` returns."""


def stratified_split(
    labels: Integers, domains: Integers, val_fraction: float, test_fraction: float, seed: int
) -> NDArray[np.int8]:
    """Give every sample to train, val or test; each class is split by the same shares.

    Of a class with n samples, max(1, round(n · fraction)) go to test and as many to val by its own fraction; the rest,
    at least one, is for training. Within a class the domains are spread evenly over the three parts. A class is split
    by random numbers of its own, so that another class never changes where its samples go.

    Args:
        labels: (n,) class of each sample.
        domains: (n,) domain of each sample.
        val_fraction: share for validation, in [0, 1); 0 = no such part.
        test_fraction: share for testing, in [0, 1); 0 = no such part.
        seed: decides which samples; the sizes depend on the fractions alone.

    Returns:
        (n,) codes `TRAIN`, `VAL`, `TEST`.

    Raises:
        ValueError: the fractions leave nothing to train on, or a class has fewer samples than parts.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            "The fractions for validation and test must lie in [0, 1) and their sum must be below 1, but got "
            f"{val_fraction} and {test_fraction}."
        )
    codes = np.full(len(labels), TRAIN, dtype=np.int8)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        sizes = _part_sizes(len(members), val_fraction, test_fraction, int(label))
        order = members[_spread(domains[members], stream_seed(seed, "split", int(label)))]
        codes[order[: sizes[1]]] = TEST
        codes[order[sizes[1] : sum(sizes)]] = VAL
    return codes


def nested_order(labels: Integers, domains: Integers, seed: int) -> Integers:
    """An order in which every `train_fraction` is a prefix, and every prefix a stratified sample.

    Each class is shuffled (its domains spread evenly); its sample of rank r out of n_c gets the key r / n_c, and
    samples are sorted by key, ties by class. Sample i is in fraction f if and only if its key is below f, so that a
    smaller fraction is contained in a larger one.

    Args:
        labels: (n,) class of each sample.
        domains: (n,) domain of each sample.
        seed: decides the shuffles.

    Returns:
        (n,) positions, to be applied as `labels[order]`.
    """
    keys = np.empty(len(labels))
    ranks = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = members[_spread(domains[members], stream_seed(seed, "order", int(label)))]
        ranks[order] = np.arange(len(members))
        keys[order] = np.arange(len(members)) / len(members)
    return np.lexsort((ranks, labels, keys)).astype(np.int64)


def fraction_size(labels: Integers, fraction: float) -> int:
    """Length of the prefix that a fraction takes of samples in nested order: Σ_c |{r : r / n_c < fraction}|.

    At least one sample per class.

    Args:
        labels: (n,) class of each sample, in any order.
        fraction: share of each class, in (0, 1].

    Raises:
        ValueError: the fraction lies outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"A fraction of the training data must lie in (0, 1], but got {fraction}.")
    _, counts = np.unique(labels, return_counts=True)
    # The same division as in `nested_order`, so that both round alike: ceil(0.07 · 100) would be 8.
    return sum(int(np.count_nonzero(np.arange(n) / n < fraction)) for n in counts)


def _part_sizes(count: int, val_fraction: float, test_fraction: float, label: int) -> tuple[int, int]:
    wanted = [max(1, round(count * f)) if f > 0 else 0 for f in (val_fraction, test_fraction)]
    parts = 1 + sum(size > 0 for size in wanted)
    if count < parts:
        raise ValueError(
            f"A class to be split into {parts} parts needs {parts} samples, but class {label} has {count}."
        )
    while sum(wanted) >= count:
        wanted[int(np.argmax(wanted))] -= 1
    return wanted[0], wanted[1]


def _spread(domains: Integers, seed: int) -> Integers:
    """A random order of one class in which any stretch holds each domain in its share, give or take one sample."""
    generator = np.random.default_rng(seed)
    keys = np.empty(len(domains))
    for domain in np.unique(domains):
        members = np.flatnonzero(domains == domain)
        keys[generator.permutation(members)] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.argsort(keys, kind="stable").astype(np.int64)
