"""Rungs of early stopping: the units after which the trials of one entry are compared."""

from __future__ import annotations

import math

import numpy as np


def rungs(epochs: int, grace: int = 1, reduction: float = 3) -> tuple[int, ...]:
    """Units after which trials are compared, ascending, all below `epochs`: `grace · reduction^k`.

    Raises:
        ValueError: a grace period outside 1 … epochs, or a reduction of 1 or less.
    """
    if not 1 <= grace <= epochs:
        raise ValueError(f"1 <= grace <= epochs = {epochs} must hold, but got {grace}.")
    if not reduction > 1:
        raise ValueError(f"reduction must be greater than 1, but got {reduction}. The usual values are 3 and 4.")
    units = [math.ceil(milestone) for milestone in milestones(epochs, grace, reduction)]
    return tuple(dict.fromkeys(unit for unit in units if unit < epochs))


def milestones(epochs: int, grace: float, reduction: float) -> list[float]:
    """`grace · reduction^k` up to `epochs`, ascending; fractions where `reduction` is one.

    None for a grace period beyond `epochs`.
    """
    # The formula of Ray's ASHA, its floating-point rounding included.
    count = int(np.log(epochs / grace) / np.log(reduction) + 1)
    return [grace * reduction**k for k in range(count)]
