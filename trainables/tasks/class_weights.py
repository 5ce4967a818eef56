"""Weights of classes by their frequency."""

from __future__ import annotations

from collections.abc import Sequence


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """Weight of each class, N / (C · n_c).

    All classes count equally, and the mean over samples is 1: the weights of scikit-learn's `class_weight="balanced"`.
    A class without samples has weight 1 and is none of the C.

    Args:
        counts: samples n_c of each class; N is their sum.

    Raises:
        ValueError: no class has a sample.

    Example:
        >>> balanced_weights([95, 5, 0])
        [0.5263157894736842, 10.0, 1.0]
    """
    total = sum(counts)
    present = sum(count > 0 for count in counts)
    if not present:
        raise ValueError("Class weights need training samples, but there are none.")
    return [total / (present * count) if count else 1.0 for count in counts]
