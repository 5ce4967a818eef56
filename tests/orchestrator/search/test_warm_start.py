"""What a search takes over from earlier studies: which trials count, in which order, and what the samplers see."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import search_spaces
from orchestrator.record.journal import Journal
from orchestrator.record.records import TrialRecord
from orchestrator.search.entry_sampling import entry_parameters
from orchestrator.search.searcher import StudySearcher
from orchestrator.search.stages import Entry
from orchestrator.search.warm_start import (
    EARLIER,
    POINTS,
    EntryWarmStart,
    WarmStart,
    learns_from_trials,
    normal_scores,
    take_over,
)
from tests.support.driving import drive, searcher, shown

VAL = "val/acc"
FULL = Entry("", "full")


def trial(number: int, rate: float, value: float, head: float = 10.0, **fields: Any) -> TrialRecord:
    """A complete search trial of full fine-tuning."""
    return TrialRecord(**{
        "trial_id": f"t{number}", "number": number, "strategy": "full", "label": "full", "state": "complete",
        "hparams": {"lr_backbone": rate, "lr_head": head}, "metrics": {"val/acc": value - 0.1, "best/val/acc": value},
        **fields,
    })  # fmt: skip


def taken(*studies: Sequence[TrialRecord], entry: Entry = FULL, maximise: bool = True) -> EntryWarmStart:
    named = {f"study{index}": records for index, records in enumerate(studies)}
    return take_over(named, entry, VAL, maximise)


def rates(entry: EntryWarmStart) -> list[float]:
    return [point.hparams["lr_backbone"] for point in entry.points]


class TestWhatCounts:
    def test_the_best_configurations_come_first(self) -> None:
        result = taken([trial(0, 0.001, 0.5), trial(1, 0.002, 0.9), trial(2, 0.003, 0.7)])
        assert rates(result) == [0.002, 0.003]
        assert [point.value for point in result.points] == [0.9, 0.7]
        assert (result.fitting, result.examined) == (3, 3)

    def test_of_a_metric_that_is_minimised_the_lowest_is_best(self) -> None:
        records = [trial(0, 0.001, 0.5), trial(1, 0.002, 0.9), trial(2, 0.003, 0.7)]
        assert rates(taken(records, maximise=False)) == [0.001, 0.003]

    def test_studies_take_turns_whatever_their_level(self) -> None:
        high = [trial(0, 0.001, 0.99), trial(1, 0.002, 0.98)]
        low = [trial(0, 0.003, 0.11), trial(1, 0.004, 0.12)]
        assert rates(taken(low, high)) == [0.004, 0.001]

    @pytest.mark.parametrize(
        "fields",
        [
            {"state": "pruned"}, {"state": "failed"}, {"role": "confirm"}, {"strategy": "daft"}, {"metrics": {}},
            {"metrics": {"best/val/acc": math.nan}},
        ],
        ids=str,
    )  # fmt: skip
    def test_other_trials_do_not(self, fields: dict[str, Any]) -> None:
        assert taken([trial(0, 0.001, 0.9, **fields)]).points == ()

    @pytest.mark.parametrize(
        "hparams",
        [
            {"lr_backbone": 3.0, "lr_head": 10.0},  # out of range
            {"lr_backbone": 0.001},  # one rate is missing
            {"lr_backbone": 0.001, "lr_head": 10.0, "warmup": 0.1},  # fixed there
            {"lr_backbone": 0.001, "lr_head": None},
        ],
        ids=str,
    )
    def test_configurations_that_the_entry_could_not_propose_do_not(self, hparams: dict[str, Any]) -> None:
        result = taken([trial(0, 0.001, 0.9, hparams=hparams)])
        assert (result.points, result.fitting, result.examined) == ((), 0, 1)

    def test_fixed_values_must_be_equal_and_labels_need_not(self) -> None:
        entry = Entry("fast", "full", {"lr_head": 10})
        records = [trial(0, 0.001, 0.5), trial(1, 0.002, 0.9, head=3.0)]
        assert rates(taken(records, entry=entry)) == [0.001]
        assert rates(taken([trial(0, 0.001, 0.5, label="slow")], entry=entry)) == [0.001]

    def test_the_default_point_and_repetitions_are_left_out(self) -> None:
        default = search_spaces.default_point("full")
        records = [trial(0, 0.1, 0.9, hparams=default), trial(1, 0.001, 0.8), trial(2, 0.001, 0.7)]
        assert rates(taken(records, records[1:])) == [0.001]

    def test_an_integer_becomes_what_the_sampler_would_have_drawn(self) -> None:
        result = taken([trial(0, 0.001, 0.9, head=3)])
        ((_, values),) = WarmStart(("a",), {"full": result}).first_points({"full": FULL})
        assert repr(values) == "{'lr_backbone': 0.001, 'lr_head': 3.0}"

    def test_ranks_are_those_within_a_study(self) -> None:
        high = [trial(n, 0.001 * (n + 1), 0.9 + n / 100) for n in range(3)]
        low = [trial(n, 0.01 * (n + 1), 0.1 + n / 100) for n in range(3)]
        scores = sorted(past.score for past in taken(high, low).trials)
        assert scores == pytest.approx(sorted(normal_scores([1, 2, 3]) * 2))

    def test_two_trials_have_no_ranks_for_a_sampler(self) -> None:
        assert taken([trial(0, 0.001, 0.5), trial(1, 0.002, 0.9)]).trials == ()

    def test_many_trials_are_thinned_out_evenly(self) -> None:
        records = [trial(n, 0.0002 * (n + 1), n / 100) for n in range(60)]
        numbers = [past.number for past in taken(records).trials]
        assert len(numbers) == EARLIER
        assert (numbers[0], numbers[-1]) == (59, 0)
        assert {a - b for a, b in itertools.pairwise(numbers)} <= {5, 6}
        assert Counter(past.study for past in taken(records, records[:30]).trials) == {"study0": 6, "study1": 6}


def test_equal_values_share_a_normal_score() -> None:
    assert normal_scores([0.5, 0.5]) == [0.0, 0.0]


def test_one_sampler_over_all_entries_and_several_objectives_take_points_alone() -> None:
    assert learns_from_trials("tpe", "equal", ())
    assert not learns_from_trials("random", "equal", ())
    assert not learns_from_trials("tpe", "sampler", ())
    assert not learns_from_trials("tpe", "equal", ("device_seconds",))


@pytest.mark.parametrize(
    ("entry", "learns", "sentence"),
    [
        (EntryWarmStart(), True, "nothing, no trial of this strategy is complete there"),
        (
            EntryWarmStart(examined=4), True,
            "nothing, none of 4 trials is a configuration that this entry could propose (its fixed values, its ranges)",
        ),
        (EntryWarmStart(examined=4, fitting=3), False, "0 first points of 3 earlier trials"),
        (EntryWarmStart(examined=4, fitting=3), True, "0 first points, and 0 of 3 earlier trials for its sampler"),
    ],
)  # fmt: skip
def test_a_line_says_what_an_entry_takes_over(entry: EntryWarmStart, learns: bool, sentence: str) -> None:
    assert entry.sentence(learns) == sentence


class TestSampler:
    """Proposals of an entry whose earlier trials have their best rate at `best`."""

    def proposals(self, best: float, trials_here: int, sampler: str = "gp") -> list[float]:
        records = []
        for number in range(30):
            rate = 1.1e-4 * 1.3**number
            records.append(trial(number, rate, 0.9 - 0.1 * math.log10(rate / best) ** 2, head=1.0))
        entry = Entry("", "full", {"lr_head": 1.0})
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
        for number in range(trials_here):
            study.enqueue_trial({"full.lr_backbone": 1.1e-4 * 1.8**number})
            asked = study.ask()
            asked.suggest_categorical("strategy", ("full",))
            rate = search_spaces.suggest(asked, "full", "full", entry.fixed)["lr_backbone"]
            study.tell(asked, -abs(math.log10(rate / 1e-3)), state=TrialState.COMPLETE)
        earlier = taken(records, entry=entry).trials
        return [entry_parameters(study, entry, sampler, seed, earlier)["full.lr_backbone"] for seed in range(8)]

    def test_it_learns_from_them_before_it_has_trials_here(self) -> None:
        # 0.03 is in the upper third of the range in its logarithm, and 0.0004 in the lowest.
        assert sum(rate > 0.01 for rate in self.proposals(0.03, trials_here=0)) >= 6
        assert sum(rate < 0.002 for rate in self.proposals(0.0004, trials_here=0)) >= 6

    def test_enough_trials_here_take_their_place(self) -> None:
        assert self.proposals(0.03, EARLIER, "tpe") == self.proposals(0.0004, EARLIER, "tpe")
        assert self.proposals(0.03, 4, "tpe") != self.proposals(0.0004, 4, "tpe")


def warm(*labels: str) -> WarmStart:
    entry = taken([trial(n, 0.001 * (n + 1), n / 10, head=5.0) for n in range(6)])
    return WarmStart(("before",), dict.fromkeys(labels, entry))


def search(folder: Path, labels: Sequence[str] = ("full",), **fields: Any) -> StudySearcher:
    given = {"trials": 12, "allocation": "equal", "warm_start": warm(*labels)}
    return searcher(folder, ("full", "daft"), **{**given, **fields})


FIRST = [{"lr_backbone": 0.006, "lr_head": 5.0}, {"lr_backbone": 0.005, "lr_head": 5.0}]


class TestSearch:
    @pytest.mark.parametrize(
        ("sampler", "allocation"), [("tpe", "halving"), ("gp", "sampler"), ("random", "equal"), ("tpe", "sampler")]
    )
    def test_first_points_follow_the_default_points(self, tmp_path: Path, sampler: str, allocation: str) -> None:
        configs = drive(search(tmp_path, sampler=sampler, allocation=allocation))
        assert [config["label"] for config in configs[:4]] == ["full", "daft", "full", "full"]
        assert [config["hparams"] for config in configs[2:4]] == FIRST
        assert len(configs) == 12
        assert len({str(config["hparams"]) + config["label"] for config in configs}) == 12

    def test_the_best_of_every_entry_come_before_the_second_best(self, tmp_path: Path) -> None:
        configs = drive(search(tmp_path, ("full", "daft"), trials=5))
        assert [(c["label"], c["hparams"]["lr_backbone"]) for c in configs[2:]] == [
            ("full", 0.006), ("daft", 0.006), ("full", 0.005),
        ]  # fmt: skip
        assert POINTS == 2

    def test_the_samplers_learn_from_earlier_trials_where_each_entry_has_its_own(self, tmp_path: Path) -> None:
        points_alone = WarmStart(("before",), {"full": EntryWarmStart(warm("full").entries["full"].points)})
        for allocation, same in (("equal", False), ("sampler", True)):
            (tmp_path / allocation).mkdir()
            both = [
                list(
                    shown(
                        drive(search(tmp_path / allocation, study_name=name, allocation=allocation, warm_start=start))
                    )
                )
                for name, start in (("trials", warm("full")), ("points", points_alone))
            ]
            assert (both[0] == both[1]) == same

    def test_an_entry_that_can_no_longer_propose_a_point_leaves_it_out(self, tmp_path: Path) -> None:
        configs = drive(search(tmp_path, entries=[Entry("", "full", {"lr_head": 1.0}), Entry("", "daft")], trials=4))
        assert all(config["hparams"] not in FIRST for config in configs)

    @pytest.mark.parametrize(("allocation", "sampler"), [("sampler", "gp"), ("equal", "tpe")])
    def test_killed_it_continues_as_if_it_had_not_been(self, tmp_path: Path, allocation: str, sampler: str) -> None:
        whole = tmp_path / "whole"
        parts = tmp_path / "parts"
        whole.mkdir()
        parts.mkdir()
        fields = {"allocation": allocation, "sampler": sampler, "trials": 10}
        undisturbed = list(shown(drive(search(whole, **fields))))
        ran: dict[int, Any] = {}
        with Journal(parts / "journal.jsonl") as journal:
            for stop in (3, 4, 3, None):
                started = shown(drive(search(parts, journal=journal, **fields), stop_after=stop))
                ran |= {config[0]: config for config in started}
        assert [ran[number] for number in sorted(ran)] == undisturbed

    def test_the_journal_gives_back_what_was_taken(self) -> None:
        taken_over = warm("full", "daft")
        assert WarmStart.from_fields(taken_over.fields()) == taken_over
