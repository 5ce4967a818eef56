"""What each unit of a trial consists of, as far as its length depends on it: units of one kind take about as long."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Start = Literal["", "warm", "cold"]
"""What comes before the unit: nothing, a network to build in a process that had one before, or everything."""


class Kind(NamedTuple):
    """Units of one strategy that do the same."""

    start: Start
    phase: str
    """Name of the strategy's phase, without the number of a cycle: a head alone is trained faster than all of it."""
    closes: bool
    """Whether the phase has something to do at its end, and this is it."""
    tests: bool
    """Whether the test sets are evaluated after it."""
    last: bool
    """Whether the trial's final evaluation and diagnostics follow."""

    def __str__(self) -> str:
        words = ["first of a process"] if self.start else []
        words += ["last of the trial"] if self.last else ["evaluated on the test sets"] if self.tests else []
        return " and ".join(words) or "plain"


def kind_of(config: Mapping[str, Any], unit: int, start: Start = "") -> Kind:
    """The kind of one unit.

    Args:
        config: a `TrialSpec.to_dict()`; the epochs and rungs of its task, its strategy and hyperparameters are read.
        unit: 1-based.
        start: what comes before it.
    """
    task = config.get("task") or {}
    hparams = json.dumps(dict(config.get("hparams") or {}), sort_keys=True, default=str)
    plain = _kinds(
        str(config.get("strategy")), hparams, int(task.get("epochs") or 1), tuple(task.get("evaluate_at") or ())
    )
    return plain[min(max(unit, 1), len(plain)) - 1]._replace(start=start)


@functools.cache
def _kinds(strategy: str, hparams: str, epochs: int, tested: Sequence[int]) -> tuple[Kind, ...]:
    from trainables import strategy_class
    from trainables.core.plan import Plan

    try:
        plan = Plan.of(strategy_class(strategy).from_hparams(json.loads(hparams)), epochs, 1)
    except (ValueError, TypeError):  # the trial itself will say what is wrong
        return (Kind("", "", False, True, True),)
    found: list[Kind] = []
    for phase in plan.phases:
        for inside in range(phase.units):
            unit = len(found) + 1
            closes = phase.finish is not None and inside + 1 == phase.units
            found.append(
                Kind(
                    "",
                    phase.name.rstrip(" 0123456789"),
                    closes,
                    unit in tested or unit == plan.units,
                    unit == plan.units,
                )
            )
    return tuple(found)
