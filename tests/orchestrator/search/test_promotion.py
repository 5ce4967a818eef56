"""Pause and promote without Tune: the order of promotions, withdrawals, the end of a search, and earlier runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.record.records import TrialRecord
from orchestrator.search.promotion import Promotions
from orchestrator.search.rungs import rungs

scores = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-1e6, 1e6))


class Algorithm2:
    """Li et al. (2020), algorithm 2, `get_job`, over several entries; nothing ever ends or is withdrawn."""

    def __init__(self, rungs: int, reduction: float, labels: Sequence[str]) -> None:
        self.scores: dict[str, list[dict[int, float]]] = {label: [{} for _ in range(rungs)] for label in labels}
        self.promoted: dict[str, list[set[int]]] = {label: [set() for _ in range(rungs)] for label in labels}
        self.reduction = reduction

    def promotion(self) -> int | None:
        count = len(next(iter(self.scores.values())))
        for rung in range(count - 1, -1, -1):
            for label, levels in self.scores.items():
                ranked = sorted(levels[rung], key=lambda trial: (-levels[rung][trial], trial))
                for trial in ranked[: math.floor(len(ranked) / self.reduction)]:
                    if trial not in self.promoted[label][rung]:
                        self.promoted[label][rung].add(trial)
                        return trial
        return None


@dataclasses.dataclass
class Search:
    """A search of `trials` trials on `workers` slots under the reference or under `Promotions`."""

    units: Sequence[int]
    labels: Sequence[str]
    trials: int
    workers: int
    log: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    active: dict[int, int] = dataclasses.field(default_factory=dict)
    """Running trial → index of the rung that it reaches next."""
    proposed: int = 0

    def label(self, trial: int) -> str:
        return self.labels[trial % len(self.labels)]

    def fill_with(self, reference: Algorithm2) -> None:
        while len(self.active) < self.workers:
            trial = reference.promotion()
            if trial is not None:
                levels = reference.scores[self.label(trial)]
                self.active[trial] = sum(trial in level for level in levels)
                self.log.append(("promoted", trial))
            elif self.proposed < self.trials:
                self.active[self.proposed] = 0
                self.log.append(("new", self.proposed))
                self.proposed += 1
            else:
                return

    def fill(self, promotions: Promotions, reached: dict[int, int]) -> None:
        while len(self.active) < self.workers:
            promotions.withdraw(self.trials - self.proposed)
            self.check_bound(promotions)
            for withdrawn in list(promotions.withdrawn):
                promotions.end(withdrawn)
            trial = promotions.promote_next()
            if trial is not None:
                self.active[trial] = reached[trial]
                self.log.append(("promoted", trial))
            elif self.proposed < self.trials:
                promotions.add(self.proposed, self.label(self.proposed))
                self.active[self.proposed] = 0
                self.log.append(("new", self.proposed))
                self.proposed += 1
            else:
                return

    def check_bound(self, promotions: Promotions) -> None:
        """Per entry and rung at most ⌊n/η⌋ wait, n the trials that reached it or could, and one of each entry."""
        remaining = self.trials - self.proposed
        for entry in promotions._entries.values():
            for rung, level in enumerate(entry.scores):
                could = sum(trial not in level for trial in entry.active)
                could += sum(other < rung for other in entry.waiting.values()) + remaining
                waiting = sum(other == rung for other in entry.waiting.values())
                assert waiting <= (len(level) + could) // entry._reduction + (not entry.has_completed)


@given(
    st.data(),
    st.sampled_from([(1,), (1, 3), (1, 2, 4), (2, 6, 18)]),
    st.sampled_from([1.5, 2, 3, 4]),
    st.sampled_from([("full",), ("full", "daft"), ("full", "daft", "lora")]),
    st.integers(1, 4),
    st.integers(1, 24),
)
def test_promotions_are_those_of_algorithm_2(
    data: st.DataObject, units: tuple[int, ...], reduction: float, labels: tuple[str, ...], workers: int, trials: int
) -> None:
    """In the same order, with any number of workers; what is withdrawn, the algorithm would never have promoted."""
    reference = Algorithm2(len(units), reduction, labels)
    promotions = Promotions(units, reduction, labels)
    expected = Search(units, labels, trials, workers)
    search = Search(units, labels, trials, workers)
    reached: dict[int, int] = {}
    expected.fill_with(reference)
    search.fill(promotions, reached)
    while expected.active:
        trial = data.draw(st.sampled_from(sorted(expected.active)))
        rung = expected.active.pop(trial)
        if rung == len(units):
            del search.active[trial]
            promotions.end(trial, completed=True)
        else:
            score = data.draw(scores)
            reference.scores[expected.label(trial)][rung][trial] = score
            reached[trial] = rung + 1
            del search.active[trial]
            if promotions.report(trial, units[rung], score):
                search.active[trial] = reached[trial]
                search.log.append(("promoted", trial))
        expected.fill_with(reference)
        search.fill(promotions, reached)
        assert search.log == expected.log
        assert search.active == expected.active


def pauses(promotions: Promotions, *reported: float, unit: int = 1, label: str = "full") -> None:
    """Trials 0, 1 … of an entry report a rung's scores, one after another."""
    for trial, score in enumerate(reported):
        promotions.add(trial, label)
        promotions.report(trial, unit, score)


def test_a_trial_waits_until_its_rung_has_enough_trials() -> None:
    promotions = Promotions((1, 3), reduction=3, labels=["full"])
    pauses(promotions, 0.5, 0.4)
    assert promotions.waiting == [0, 1]
    assert promotions.promote_next() is None  # ⌊2/3⌋ = 0
    promotions.add(2, "full")
    assert not promotions.report(2, 1, 0.3)  # ⌊3/3⌋ = 1, and trial 0 is better
    assert promotions.promote_next() == 0
    assert promotions.promote_next() is None
    assert not promotions.waits(0)
    assert promotions.report(0, 1, 0.5), "a rung does not stop a trial twice"
    assert promotions.report(0, 2, 0.9), "between rungs"


def test_the_best_of_its_rung_goes_on_without_a_pause() -> None:
    promotions = Promotions((1, 3), reduction=2, labels=["full"])
    pauses(promotions, 0.5)
    promotions.add(1, "full")
    assert promotions.report(1, 1, 0.6)
    assert promotions.waiting == [0]


def test_higher_rungs_come_first() -> None:
    promotions = Promotions((1, 2), reduction=2, labels=["full"])
    pauses(promotions, 0.9, 0.8, 0.7, 0.6)
    assert promotions.promote_next() == 0
    assert promotions.promote_next() == 1
    assert not promotions.report(0, 2, 0.5)
    promotions.add(4, "full")
    promotions.add(5, "full")
    promotions.report(4, 1, 0.1)
    promotions.report(5, 1, 0.2)  # three of six may go on: trial 2 can
    assert not promotions.report(1, 2, 0.4)  # one of two at rung 2 may go on: trial 0, before trial 2 of rung 1
    assert promotions.promote_next() == 0
    assert promotions.promote_next() == 2


def test_entries_are_not_compared_with_each_other() -> None:
    promotions = Promotions((1,), reduction=2, labels=["lp_ft", "daft"])
    for trial, (label, score) in enumerate([("lp_ft", 0.9), ("daft", 0.1), ("lp_ft", 0.8), ("daft", 0.2)]):
        promotions.add(trial, label)
        promotions.report(trial, 1, score)
    assert promotions.promote_next() == 0
    assert promotions.promote_next() == 3
    assert promotions.promote_next() is None


@pytest.mark.parametrize("score", [math.nan, -math.inf, math.inf])
def test_p24_a_score_that_is_not_finite_is_the_lowest(score: float) -> None:
    promotions = Promotions((1,), reduction=2, labels=["full"])
    pauses(promotions, score, -1e9)
    assert promotions.waiting == [0]


def test_what_may_still_be_promoted_is_not_withdrawn() -> None:
    promotions = Promotions((1, 3), reduction=3, labels=["full"])
    pauses(promotions, 0.5, 0.4, 0.3, 0.2)
    promotions.promote_next()
    assert not promotions.withdraw(remaining=8)  # twelve trials at most: four may go on
    assert promotions.waiting == [1, 2, 3]


def test_ranks_that_the_quota_cannot_reach_are_withdrawn() -> None:
    promotions = Promotions((1, 3), reduction=3, labels=["full"])
    pauses(promotions, 0.5, 0.4, 0.3, 0.2)
    promotions.promote_next()
    promotions.withdraw(remaining=2)  # at most six trials at the rung: ranks 1 and 2
    assert promotions.withdrawn == {2, 3}
    assert promotions.waits(2), "paused until it has ended"
    promotions.end(2)
    promotions.end(3)
    assert promotions.waiting == [1]
    assert not promotions.withdraw(remaining=2)
    promotions.end(0, completed=True)
    assert promotions.withdraw(remaining=1)  # ⌊5/3⌋ = 1, and trial 0 had it
    assert promotions.withdrawn == {1}


def test_an_entry_without_a_completed_trial_promotes_its_best_until_there_is_one() -> None:
    promotions = Promotions((1, 3), reduction=3, labels=["full"])
    pauses(promotions, 0.4, 0.5)
    assert promotions.withdraw(remaining=0)
    assert promotions.withdrawn == {0}  # trial 1 is kept, though ⌊2/3⌋ = 0
    assert promotions.promote_next() is None
    assert promotions.promote_last() == 1
    assert promotions.promote_last() is None, "it runs"
    assert not promotions.report(1, 3, 0.6)
    assert promotions.promote_last() == 1
    promotions.end(1, completed=True)
    assert promotions.promote_last() is None
    assert promotions.waiting == []


def test_where_the_last_hope_fails_the_next_one_is_promoted() -> None:
    promotions = Promotions((1, 3), reduction=3, labels=["full"])
    pauses(promotions, 0.4, 0.5)
    assert promotions.promote_last() == 1
    promotions.end(1)  # it failed
    assert promotions.promote_last() == 0


def record(number: int, values: Sequence[float], state: str, reason: str | None = None) -> TrialRecord:
    return TrialRecord(
        trial_id=f"old{number}",
        number=number,
        strategy="full",
        label="full",
        state=state,  # type: ignore[arg-type]
        reason=reason,
        history=tuple({"unit": float(unit), "val/acc": value} for unit, value in enumerate(values, start=1)),
    )


def replayed(*records: TrialRecord, maximise: bool = True, units: Sequence[int] = (1, 3)) -> Promotions:
    return Promotions.replay(units, 2, records, "val/acc", maximise, ["full"])


def test_paused_trials_of_an_earlier_run_wait_with_their_scores() -> None:
    promotions = replayed(
        record(0, [0.5], "paused"),
        record(1, [0.7], "paused"),
        record(2, [0.6, 0.6, 0.6], "paused"),
        record(3, [0.1], "pruned"),
    )
    assert promotions.waiting == [0, 1, 2]
    assert promotions.promote_next() == 1  # of four at unit 1, two may go on: 1, and 2 has already
    assert promotions.promote_next() is None


def test_a_loss_is_compared_the_other_way_round() -> None:
    assert replayed(record(0, [0.5], "paused"), record(1, [0.7], "paused"), maximise=False).promote_next() == 0


def test_a_trial_interrupted_at_a_rung_is_decided_when_it_reports_it_again() -> None:
    promotions = replayed(record(0, [0.5], "paused"), record(1, [0.4], "failed", "interrupted"))
    assert promotions.promote_next() is None
    promotions.add(1, "full")
    assert not promotions.report(1, 1, 0.4)
    assert promotions.promote_next() == 0


def test_a_trial_whose_checkpoint_is_newer_than_the_journal_has_passed_its_rung() -> None:
    """Its process trained on while the driver died: it reports the unit after the rung first."""
    promotions = replayed(record(0, [0.5], "paused"), record(1, [0.4], "failed", "interrupted"), units=(1, 4))
    promotions.add(1, "full")
    assert promotions.promote_next() is None
    assert promotions.report(1, 2, 0.9)
    assert promotions.promote_next() == 0, "the better of two"


def test_a_trial_interrupted_past_a_rung_is_not_stopped_there_again() -> None:
    promotions = replayed(record(0, [0.5], "paused"), record(1, [0.9, 0.9], "failed", "interrupted"))
    promotions.add(1, "full")
    assert promotions.report(1, 1, 0.9)


def test_a_paused_trial_continues_where_its_unit_is_no_rung_any_more() -> None:
    promotions = replayed(record(0, [0.5], "paused"), units=(2,))
    assert promotions.waiting == []
    promotions.add(0, "full")
    assert not promotions.report(0, 2, 0.5)


def test_a_short_trial_that_finished_by_itself_sets_no_bar() -> None:
    promotions = replayed(record(0, [0.9], "complete"), record(1, [0.5], "paused"), record(2, [0.4], "paused"))
    assert promotions.promote_next() == 1


def test_other_roles_and_entries_that_the_study_no_longer_has_are_left_out() -> None:
    confirm = dataclasses.replace(record(0, [0.9], "paused"), role="confirm")
    other = dataclasses.replace(record(1, [0.9], "paused"), label="gone")
    assert replayed(confirm, other).waiting == []


def test_rungs_end_below_the_budget() -> None:
    promotions = Promotions(rungs(1), reduction=3, labels=["full"])
    promotions.add(0, "full")
    assert promotions.report(0, 1, 0.5), "a budget of one unit has no rung"


class TestLaterFirstRung:
    """Entries whose trials start at an optimum of the head pass the first rung."""

    def test_they_wait_at_the_second_rung_only(self) -> None:
        promotions = Promotions(rungs=(1, 3), reduction=2, labels=["full", "lp_ft"], later=["lp_ft"])
        for trial, label in enumerate(["full", "lp_ft"]):
            promotions.add(trial, label)
            assert promotions.report(trial, 1, 0.5) == (label == "lp_ft")
        assert promotions.waiting == [0]
        assert not promotions.report(1, 3, 0.5)
        assert promotions.waiting == [0, 1]

    def test_earlier_runs_say_the_same(self) -> None:
        def record(label: str) -> TrialRecord:
            history = [{"unit": unit, "val/acc": 0.5} for unit in (1, 2)]
            return TrialRecord(
                trial_id=label, number=0, strategy=label, label=label, hparams={}, seed=0, role="search",
                config_hash=label, state="failed", reason="user", history=history,
            )  # fmt: skip

        for label, reached in (("full", 1), ("lp_ft", 0)):
            promotions = Promotions.replay((1, 3), 2, [record(label)], "val/acc", True, [label], later=["lp_ft"])
            assert promotions.describe() == f"{label}: unit 1: {reached} (0 waiting) | unit 3: 0 (0 waiting)"
