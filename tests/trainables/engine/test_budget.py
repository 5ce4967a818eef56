"""Phases, units and steps."""

from __future__ import annotations

import pytest

from trainables.engine.budget import BudgetPlan, UnitPosition
from trainables.engine.contract import Phase, Strategy


class Listed(Strategy):
    """A strategy with given phases."""

    def __init__(self, *phases: Phase) -> None:
        self.listed = list(phases)

    def phases(self, units: int) -> list[Phase]:
        return self.listed


HEAD, SOLVE, ALL = Phase("head", 2), Phase("solve", 1, solve=lambda model, data: {}), Phase("all", 3)


def test_every_unit_has_its_phase_and_the_steps_before_it() -> None:
    plan = BudgetPlan.of(Listed(HEAD, SOLVE, ALL), budget=8, unit_steps=10)
    assert plan.units == 6
    assert [plan.at(unit) for unit in range(6)] == [
        UnitPosition(HEAD, 0, 0),
        UnitPosition(HEAD, 1, 10),
        UnitPosition(SOLVE, 0, 20),
        UnitPosition(ALL, 0, 20),
        UnitPosition(ALL, 1, 30),
        UnitPosition(ALL, 2, 40),
    ]
    with pytest.raises(IndexError):
        plan.at(6)


@pytest.mark.parametrize(
    ("phases", "taken"),
    [
        ((HEAD, ALL), "5 (head: 2, all: 3)"),
        ((), "0 (no phase)"),
        ((HEAD, Phase("rest", 0)), "2 (head: 2, rest: 0)"),
    ],
)
def test_a_plan_must_fit_the_budget(phases: tuple[Phase, ...], taken: str) -> None:
    with pytest.raises(ValueError) as error:
        BudgetPlan.of(Listed(*phases), budget=4, unit_steps=1)
    assert str(error.value) == (
        f"The phases of test_budget must take between 1 and 4 units, but they take {taken}. Give the trial more epochs."
    )
