"""Which faults hit a soak, and when: drawn from a seed, the same for whoever is soaked.

Faults inside a trial name the unit that they hit (`LUTHIER_FAULT`, see `trainables.specs.fault_injection`); faults
outside come when so many units have been begun.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

BEGUN = "phase=before_unit,action=note,times=0"
"""The fault that does no harm: it leaves a line in the log for every unit that any process begins."""

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
"""How often each kind is drawn once every kind is there."""
PER_TRIAL = 2
"""Faults inside one trial at most: what is retried for ever is no study of recovery."""
SPAN = (0.04, 0.9)
"""Between which shares of all units the outside faults come."""


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
        ValueError: more faults than places for them.
    """
    chance = random.Random(seed)
    kinds = chance.sample(list(WEIGHTS), min(count, len(WEIGHTS)))
    kinds += chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count - len(kinds))
    places = [(trial, unit) for trial in range(trials) for unit in range(1, units + 1)]
    chance.shuffle(places)
    taken: Counter[int] = Counter()
    inside: list[str] = []
    for kind in kinds:
        if kind in OUTSIDE:
            continue
        place = next((place for place in places if taken[place[0]] < PER_TRIAL), None)
        if place is None:
            raise ValueError(f"{trials} trials have room for {PER_TRIAL * trials} faults inside them; ask for fewer.")
        places.remove(place)
        taken[place[0]] += 1
        phase, action = INSIDE[kind]
        where = f"trial={place[0]},unit={place[1]}" + (f",step={chance.randint(1, steps)}" if phase == "step" else "")
        inside.append(f"{where},phase={phase},action={action}")
    wanted = [kind for kind in kinds if kind in OUTSIDE]
    chance.shuffle(wanted)
    first, last = (share * trials * units for share in SPAN)
    width = (last - first) / max(1, len(wanted))
    outside = tuple((round(first + width * (n + chance.random())), kind) for n, kind in enumerate(wanted))
    return Schedule(tuple(inside), outside, dict(Counter(kinds)))
