"""Faults of a soak and their times, drawn from a seed; the same for both sides.

Faults inside a trial name the unit that they hit (`LUTHIER_FAULT`, see `trainables.specs.fault_injection`); faults
outside are due after a number of units has begun.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

BEGUN = "phase=before_unit,action=note,times=0"
"""A harmless fault, which logs every unit that any process begins."""

INSIDE = {
    "kill mid-epoch": ("step", "kill"),
    "kill before the checkpoint": ("before_checkpoint", "kill"),
    "kill while writing the checkpoint": ("in_checkpoint", "kill"),
    "kill after the checkpoint": ("after_checkpoint", "kill"),
    "disk full (ENOSPC)": ("in_checkpoint", "full"),
    "disk error (EIO)": ("in_checkpoint", "io_error"),
    "trial stopped (SIGSTOP)": ("step", "stop"),
}
"""Kind → phase and action."""
OUTSIDE = (
    "driver killed",
    "driver killed, newest checkpoint truncated",
    "node killed",
    "tracker killed",
    "tracker stopped (SIGSTOP)",
)
WEIGHTS = {
    "kill mid-epoch": 5,
    "kill before the checkpoint": 3,
    "kill while writing the checkpoint": 3,
    "kill after the checkpoint": 3,
    "disk full (ENOSPC)": 2,
    "disk error (EIO)": 2,
    "trial stopped (SIGSTOP)": 1,
    "driver killed": 3,
    "driver killed, newest checkpoint truncated": 1,
    "node killed": 2,
    "tracker killed": 2,
    "tracker stopped (SIGSTOP)": 2,
}
"""Relative frequency of each kind, after one of each."""
PER_TRIAL = 2
"""Maximum number of faults inside one trial, below the limit of its retries."""
SPAN = (0.04, 0.9)
"""Range of the outside faults, as shares of all units."""


@dataclass(frozen=True)
class Schedule:
    """The faults of one soak."""

    inside: tuple[str, ...]
    """Texts for `LUTHIER_FAULT`."""
    outside: tuple[tuple[int, str], ...]
    """(units begun, kind), in order."""
    kinds: dict[str, int]
    """How many of each kind."""

    @property
    def environment(self) -> str:
        """The value of `LUTHIER_FAULT`."""
        return ";".join([*self.inside, BEGUN])


NONE = Schedule((), (), {})


def draw(seed: int, count: int, trials: int, units: int, steps: int) -> Schedule:
    """A schedule of `count` faults over `trials` × `units`.

    Args:
        steps: optimiser steps of one unit.

    Raises:
        ValueError: more faults than the trials have room for.
    """
    generator = random.Random(seed)
    kinds = generator.sample(list(WEIGHTS), min(count, len(WEIGHTS)))
    kinds += generator.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count - len(kinds))
    free = [(trial, unit) for trial in range(trials) for unit in range(1, units + 1)]
    generator.shuffle(free)
    per_trial: Counter[int] = Counter()
    inside: list[str] = []
    for kind in kinds:
        if kind in OUTSIDE:
            continue
        slot = next(((trial, unit) for trial, unit in free if per_trial[trial] < PER_TRIAL), None)
        if slot is None:
            raise ValueError(f"{trials} trials have room for {PER_TRIAL * trials} faults inside them; ask for fewer.")
        free.remove(slot)
        trial, unit = slot
        per_trial[trial] += 1
        phase, action = INSIDE[kind]
        where = f"trial={trial},unit={unit}"
        if phase == "step":
            where += f",step={generator.randint(1, steps)}"
        inside.append(f"{where},phase={phase},action={action}")
    outside_kinds = [kind for kind in kinds if kind in OUTSIDE]
    generator.shuffle(outside_kinds)
    first, last = (share * trials * units for share in SPAN)
    width = (last - first) / max(1, len(outside_kinds))
    outside = tuple((round(first + width * (n + generator.random())), kind) for n, kind in enumerate(outside_kinds))
    return Schedule(tuple(inside), outside, dict(Counter(kinds)))
