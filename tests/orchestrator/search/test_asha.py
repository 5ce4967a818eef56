"""ASHA per entry: rungs, who is compared with whom, and who is left alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.async_hyperband import _Bracket

from orchestrator.search.asha import StudyScheduler, rungs

CONTROLLER: Any = None
CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


@dataclass
class FakeTrial:
    trial_id: str
    label: str = "full"
    role: str = "search"
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.config = {"label": self.label, "strategy": "full", "role": self.role}


def add(scheduler: StudyScheduler, *trials: FakeTrial) -> None:
    for trial in trials:
        scheduler.on_trial_add(CONTROLLER, trial)  # type: ignore[arg-type]


def report(scheduler: StudyScheduler, trial: FakeTrial, unit: int, value: float) -> str:
    return scheduler.on_trial_result(CONTROLLER, trial, {"unit": unit, "val/acc": value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("epochs", "grace", "reduction", "expected"),
    [
        (20, 1, 3, (1, 3, 9)),
        (20, 2, 4, (2, 8)),
        (9, 1, 3, (1, 3)),
        (10, 1, 2.5, (1, 3, 7)),
        (1, 1, 3, ()),
        (4, 4, 3, ()),
        (1000, 1, 10, (1, 10, 100)),
    ],
)
def test_rungs_are_the_units_after_which_ray_may_stop(
    epochs: int, grace: int, reduction: float, expected: tuple[int, ...]
) -> None:
    assert rungs(epochs, grace, reduction) == expected
    milestones = sorted(float(m) for m, _ in _Bracket(grace, epochs, reduction, 0)._rungs)
    assert tuple(int(np.ceil(m)) for m in milestones if np.ceil(m) < epochs) == expected


def test_impossible_rungs_are_errors() -> None:
    with pytest.raises(ValueError, match=r"^1 <= grace <= epochs = 4 must hold, but got 5\.$"):
        rungs(4, 5)
    with pytest.raises(
        ValueError, match=r"^reduction must be greater than 1, but got 1\. The usual values are 3 and 4\.$"
    ):
        StudyScheduler("val/acc", True, 4, 1, 1)


def test_a_trial_behind_its_own_entry_is_stopped_and_one_ahead_goes_on() -> None:
    scheduler = StudyScheduler("val/acc", True, epochs=9)
    a, b, c = FakeTrial("a"), FakeTrial("b"), FakeTrial("c")
    add(scheduler, a, b, c)
    assert report(scheduler, a, 1, 0.5) == CONTINUE  # nothing to compare with
    assert report(scheduler, b, 1, 0.4) == STOP
    assert report(scheduler, c, 1, 0.6) == CONTINUE
    assert report(scheduler, c, 2, 0.1) == CONTINUE  # between rungs


def test_a_loss_is_compared_the_other_way_round() -> None:
    scheduler = StudyScheduler("val/nll", False, epochs=9)
    a, b = FakeTrial("a"), FakeTrial("b")
    add(scheduler, a, b)
    scheduler.on_trial_result(CONTROLLER, a, {"unit": 1, "val/nll": 0.5})  # type: ignore[arg-type]
    assert scheduler.on_trial_result(CONTROLLER, b, {"unit": 1, "val/nll": 0.6}) == STOP  # type: ignore[arg-type]


def test_an_entry_that_starts_late_is_not_measured_by_one_that_starts_high() -> None:
    scheduler = StudyScheduler("val/acc", True, epochs=9)
    lp_ft, daft = FakeTrial("a", "lp_ft"), FakeTrial("b", "daft")
    add(scheduler, lp_ft, daft)
    assert report(scheduler, lp_ft, 1, 0.9) == CONTINUE
    assert report(scheduler, daft, 1, 0.2) == CONTINUE


@pytest.mark.parametrize("role", ["fold", "confirm", "reference"])
def test_folds_confirmations_and_references_run_in_full(role: str) -> None:
    scheduler = StudyScheduler("val/acc", True, epochs=9)
    good, again = FakeTrial("a"), FakeTrial("b", role=role)
    add(scheduler, good, again)
    report(scheduler, good, 1, 0.9)
    assert report(scheduler, again, 1, 0.1) == CONTINUE
    assert report(scheduler, again, 9, 0.1) == CONTINUE
    scheduler.on_trial_complete(CONTROLLER, again, {"unit": 9, "val/acc": 0.99})  # type: ignore[arg-type]
    scheduler.on_trial_remove(CONTROLLER, again)  # type: ignore[arg-type]
    assert report(scheduler, FakeTrial("c"), 1, 0.1) == CONTINUE  # never added: left alone


def test_a_short_trial_that_finished_by_itself_sets_no_bar() -> None:
    scheduler = StudyScheduler("val/acc", True, epochs=9)
    closed_form, other = FakeTrial("a"), FakeTrial("b")
    add(scheduler, closed_form, other)
    scheduler.on_trial_complete(CONTROLLER, closed_form, {"unit": 1, "val/acc": 0.9})  # type: ignore[arg-type]
    assert report(scheduler, other, 1, 0.2) == CONTINUE


def test_p24_what_is_not_finite_or_missing_is_left_to_the_trial() -> None:
    scheduler = StudyScheduler("val/acc", True, epochs=9)
    a, b = FakeTrial("a"), FakeTrial("b")
    add(scheduler, a, b)
    assert report(scheduler, a, 1, float("nan")) == CONTINUE
    assert report(scheduler, b, 1, 0.1) == CONTINUE  # NaN set no bar
    assert scheduler.on_trial_result(CONTROLLER, a, {"unit": 3}) == CONTINUE  # type: ignore[arg-type]


def test_a_trial_whose_actor_died_comes_back_to_the_same_rungs() -> None:
    scheduler = StudyScheduler("val/acc", True, epochs=9)
    a, b = FakeTrial("a"), FakeTrial("b")
    add(scheduler, a, b)
    assert report(scheduler, a, 1, 0.5) == CONTINUE
    scheduler.on_trial_error(CONTROLLER, a)  # type: ignore[arg-type]
    add(scheduler, a)
    assert report(scheduler, a, 1, 0.5) == CONTINUE
    assert report(scheduler, b, 1, 0.4) == STOP


def test_tunes_own_metric_is_not_needed() -> None:
    scheduler = StudyScheduler("val/acc", True, epochs=9)
    assert scheduler.set_search_properties("anything", "min")
    assert scheduler._metric == "val/acc"
    assert "0 stopped" in scheduler.debug_string()
