"""Budget plan of a trial.

The phase of each unit, and the optimiser steps before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainables.engine.contract import Phase, Strategy


@dataclass(frozen=True)
class UnitPosition:
    """Position of a unit within the phases of a trial."""

    phase: Phase
    unit_in_phase: int
    """0-based."""
    steps_before: int
    """Optimiser steps of the whole trial before the unit; closed-form phases have none."""


@dataclass(frozen=True)
class BudgetPlan:
    """Phases of one trial in order, and the length of a unit in optimiser steps."""

    phases: tuple[Phase, ...]
    unit_steps: int

    @classmethod
    def of(cls, strategy: Strategy, budget: int, unit_steps: int) -> BudgetPlan:
        """Plan the phases that a strategy defines for a budget.

        Raises:
            ValueError: the phases take more units than the budget, or none.
        """
        phases = tuple(strategy.phases(budget))
        needed = sum(phase.units for phase in phases)
        if not 0 < needed <= budget or any(phase.units < 1 for phase in phases):
            raise ValueError(
                f"The phases of {strategy.name()} must take between 1 and {budget} units, but they take {needed} "
                f"({', '.join(f'{p.name}: {p.units}' for p in phases) or 'no phase'}). Give the trial more epochs."
            )
        return cls(phases, unit_steps)

    @property
    def units(self) -> int:
        """Number of units; may be fewer than the budget (linear probing takes one)."""
        return sum(phase.units for phase in self.phases)

    def at(self, unit: int) -> UnitPosition:
        """Position of a unit (0-based).

        Raises:
            IndexError: the unit is beyond the plan.
        """
        first = 0
        steps = 0
        for phase in self.phases:
            length = 0 if phase.solve else self.unit_steps  # a closed-form phase takes no optimiser steps
            if unit < first + phase.units:
                return UnitPosition(phase, unit - first, steps + (unit - first) * length)
            first += phase.units
            steps += phase.units * length
        raise IndexError(f"unit {unit} of {self.units}")
