"""ASHA per entry: rungs, who is compared with whom, and who is left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from orchestrator.record.records import TrialRecord
from orchestrator.search.asha import StudyScheduler
from orchestrator.search.rungs import rungs

CONTROLLER: Any = None
CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


@dataclass
class FakeTrial:
    trial_id: str
    label: str = "full"
    role: str = "search"
    number: int | None = None
    config: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.config = {"label": self.label, "strategy": "full", "role": self.role}
        if self.number is not None:
            self.config["_number"] = self.number


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
        (300, 1, 10, (1, 10, 100)),
    ],
)
def test_rungs_are_the_units_after_which_a_trial_may_be_stopped(
    epochs: int, grace: int, reduction: float, expected: tuple[int, ...]
) -> None:
    assert rungs(epochs, grace, reduction) == expected
    stopping = []
    for unit in range(1, epochs):
        scheduler = StudyScheduler("val/acc", True, epochs, grace, reduction)
        good, bad = FakeTrial("good"), FakeTrial("bad")
        add(scheduler, good, bad)
        for earlier in range(1, unit):
            report(scheduler, good, earlier, 0.5)
            report(scheduler, bad, earlier, 0.5)
        report(scheduler, good, unit, 0.9)
        if report(scheduler, bad, unit, 0.1) == STOP:
            stopping.append(unit)
    assert tuple(stopping) == expected


def test_impossible_rungs_are_errors() -> None:
    with pytest.raises(ValueError, match=r"^1 <= grace <= epochs = 4 must hold, but got 5\.$"):
        rungs(4, 5)
    with pytest.raises(
        ValueError, match=r"^reduction must be greater than 1, but got 1\. The usual values are 3 and 4\.$"
    ):
        StudyScheduler("val/acc", True, 4, 1, 1)


def test_a_trial_behind_its_own_entry_is_stopped_and_one_ahead_continues() -> None:
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
    assert scheduler.metric == "val/acc"
    assert "0 stopped" in scheduler.debug_string()


@pytest.mark.parametrize(
    ("scores", "reduction", "cutoff"),
    [
        ([0.1, 0.4], 2, 0.25),  # the median of two is their mean
        ([0.0, 0.3, 0.6, 0.9], 3, 0.6),  # position 3 · 2/3 = 2
        ([0.0, 1.0], 4, 0.75),  # position 1 · 3/4
    ],
)
def test_the_cutoff_is_the_interpolated_quantile(scores: list[float], reduction: float, cutoff: float) -> None:
    below, at = cutoff - 1e-6, cutoff + 1e-6
    for score, decision in ((below, STOP), (at, CONTINUE)):
        history = [recorded(number, [value]) for number, value in enumerate(scores)]
        scheduler = StudyScheduler("val/acc", True, 20, 1, reduction, history)
        trial = FakeTrial("new")
        add(scheduler, trial)
        assert report(scheduler, trial, 1, score) == decision


def recorded(number: int, values: Sequence[float], state: str = "pruned", reason: str | None = None) -> TrialRecord:
    record = TrialRecord(trial_id=f"old{number}", number=number, strategy="full", label="full")
    return dataclasses.replace(
        record,
        state=state,
        reason=reason,
        history=tuple({"unit": float(unit), "val/acc": value} for unit, value in enumerate(values, start=1)),
    )


values = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(-1e6, 1e6))


@given(
    st.data(),
    st.integers(1, 30),
    st.sampled_from([1.2, 1.5, 2, 2.5, 3, 4, 10]),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 3), values), max_size=80),
)
def test_decisions_are_those_of_rays_asha(
    data: st.DataObject,
    epochs: int,
    reduction: float,
    maximise: bool,
    steps: list[tuple[int, int, float]],
) -> None:
    """Ray's own scheduler is the reference, in any order of trials, also where units are skipped or repeated."""
    grace = data.draw(st.integers(1, epochs))
    mode = "max" if maximise else "min"
    reference = AsyncHyperBandScheduler("unit", "val/acc", mode, epochs, grace, reduction)
    scheduler = StudyScheduler("val/acc", maximise, epochs, grace, reduction)
    trials = [FakeTrial(str(i)) for i in range(8)]
    for trial in trials:
        reference.on_trial_add(CONTROLLER, trial)
    add(scheduler, *trials)
    units = dict.fromkeys(range(8), 0)
    running = set(range(8))
    for index, advance, value in steps:
        if index not in running:
            continue
        units[index] += advance if advance < 3 else 0  # 3: the same unit once more, as a resumed trial reports it
        result = {"unit": max(units[index], 1), "val/acc": value}
        decision = reference.on_trial_result(CONTROLLER, trials[index], result)
        assert scheduler.on_trial_result(CONTROLLER, trials[index], result) == decision  # type: ignore[arg-type]
        if decision == STOP:
            running.remove(index)
            if result["unit"] >= epochs:  # Luthier leaves out what ends before; Ray counts it
                reference.on_trial_complete(CONTROLLER, trials[index], result)
            scheduler.on_trial_complete(CONTROLLER, trials[index], result)  # type: ignore[arg-type]


@given(
    st.integers(2, 20),
    st.sampled_from([2, 3, 4]),
    st.lists(st.lists(values, min_size=1, max_size=20), max_size=6),
    st.lists(values, min_size=20, max_size=20),
)
def test_an_earlier_runs_trials_count_as_if_they_had_run_now(
    epochs: int, reduction: int, earlier: list[list[float]], new: list[float]
) -> None:
    earlier = [trial[: epochs - 1] for trial in earlier]
    replayed = StudyScheduler(
        "val/acc", True, epochs, 1, reduction, [recorded(number, trial) for number, trial in enumerate(earlier)]
    )
    live = StudyScheduler("val/acc", True, epochs, 1, reduction)
    for number, trial in enumerate(earlier):
        old = FakeTrial(f"old{number}")
        add(live, old)
        for unit, value in enumerate(trial, start=1):
            report(live, old, unit, value)
    trial = FakeTrial("new")
    add(replayed, trial)
    add(live, trial)
    for unit in range(1, epochs + 1):
        decision = report(live, trial, unit, new[unit - 1])
        assert report(replayed, trial, unit, new[unit - 1]) == decision
        if decision == STOP:
            return


def test_a_resumed_trial_is_decided_at_the_unit_that_it_reports_again() -> None:
    """The driver may have died between the journal's entry and Tune's decision."""
    better = [recorded(number, [0.9, 0.9, 0.9]) for number in range(3)]
    interrupted = recorded(7, [0.9, 0.9, 0.1], state="failed", reason="interrupted")
    scheduler = StudyScheduler("val/acc", True, 9, 1, 3, [*better, interrupted])
    resumed = FakeTrial("another id", number=7)
    add(scheduler, resumed)
    assert report(scheduler, resumed, 3, 0.1) == STOP


def test_a_resumed_trial_is_not_compared_with_itself() -> None:
    interrupted = recorded(7, [0.9], state="failed", reason="interrupted")
    scheduler = StudyScheduler("val/acc", True, 9, 1, 3, [interrupted])
    resumed = FakeTrial("another id", number=7)
    add(scheduler, resumed)
    assert report(scheduler, resumed, 2, 0.1) == CONTINUE
    assert report(scheduler, resumed, 3, 0.1) == CONTINUE


def test_an_entry_with_a_later_grace_keeps_its_trials_through_the_first_rung() -> None:
    scheduler = StudyScheduler("val/acc", True, epochs=9, graces={"lp_ft": 3.0})
    for label, at_first_rung in (("lp_ft", CONTINUE), ("full", STOP)):
        better, worse = FakeTrial(f"{label} 1", label), FakeTrial(f"{label} 2", label)
        add(scheduler, better, worse)
        assert report(scheduler, better, 1, 0.9) == CONTINUE
        assert report(scheduler, worse, 1, 0.1) == at_first_rung
    kept = FakeTrial("lp_ft 2", "lp_ft")
    assert report(scheduler, FakeTrial("lp_ft 1", "lp_ft"), 3, 0.9) == CONTINUE
    assert report(scheduler, kept, 3, 0.1) == STOP


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_a_grace_beyond_the_budget_leaves_no_rung(epochs: int) -> None:
    scheduler = StudyScheduler("val/acc", True, epochs=epochs, graces={"full": 100.0})
    first, second = FakeTrial("a"), FakeTrial("b")
    add(scheduler, first, second)
    for unit in range(1, epochs):
        assert report(scheduler, first, unit, 0.9) == report(scheduler, second, unit, 0.1) == CONTINUE
