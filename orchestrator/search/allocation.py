"""Allocation of a search's budget to the entries of a study."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

ALLOCATIONS = ("sampler", "equal", "halving")
LEAST = 3
"""Trials per entry before `halving` drops any."""
STAGES = 3
"""Parts of the budget of `halving`; entries leave after each part but the last."""


def next_entry(
    allocation: str, labels: Sequence[str], started: Sequence[str], values: Mapping[int, float], budget: int
) -> str:
    """The entry that the next trial belongs to.

    `equal`: the entry with the fewest trials. `halving` (successive halving of Jamieson and Talwalkar, 2016, over
    entries): likewise, but after a third of the budget, and at least `LEAST` trials of each entry, the worse half of
    the entries gets no further trials, and after two thirds the worse half of the remaining ones. An entry is as good
    as its best trial.

    Args:
        allocation: `equal` or `halving`.
        labels: of the entries, in the order of the study.
        started: label of each trial so far, in the order in which they were proposed.
        values: index into `started` → objective of that trial, higher is better; what runs or failed has none.
        budget: trials that are allocated.

    Raises:
        ValueError: no entry, or another allocation.

    Example:
        >>> next_entry("equal", ["full", "daft"], ["full"], {0: 0.9}, budget=4)
        'daft'
        >>> started = ["full", "daft", "lora"] * 3
        >>> values = {i: {"full": 0.7, "daft": 0.9, "lora": 0.8}[label] for i, label in enumerate(started)}
        >>> next_entry("halving", ["full", "daft", "lora"], started, values, budget=24)
        'daft'
    """
    if allocation not in ALLOCATIONS[1:] or not labels:
        raise ValueError(
            f"A budget is allocated to entries by one of {', '.join(ALLOCATIONS[1:])}, but got {allocation!r} for "
            f"{len(labels)} entries."
        )
    candidates = list(labels)
    if allocation == "halving":
        share = max(LEAST * len(labels), math.ceil(budget / STAGES))
        for stage in range(1, STAGES):
            if len(started) >= stage * share:
                candidates = _better_half(candidates, started[: stage * share], values)
    counts = Counter(started)
    return min(candidates, key=lambda label: counts[label])


def _better_half(labels: Sequence[str], started: Sequence[str], values: Mapping[int, float]) -> list[str]:
    """The better half of the entries, rounded up, in the order of `labels`."""
    best = dict.fromkeys(labels, -math.inf)
    for index, label in enumerate(started):
        if label in best:
            best[label] = max(best[label], values.get(index, -math.inf))
    # Stable: of equal entries the one that comes first in the study stays.
    ranked = sorted(labels, key=lambda label: -best[label])[: math.ceil(len(labels) / 2)]
    return [label for label in labels if label in ranked]
