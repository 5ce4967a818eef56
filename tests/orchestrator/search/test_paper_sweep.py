"""The papers' sweeps as a sequential searcher."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import search_spaces
from orchestrator.record.records import TrialRecord
from orchestrator.search.paper_sweep import Later, Sweep, preset_of
from orchestrator.search.searcher import Entry
from search_spaces import Preset
from tests.support.driving import Config, accuracy, drive, finished, optuna_trials, searcher, task

TWO_STEPS = Preset(steps=({"a": (1, 2, 3)}, {"b": (5, 6)}), fixed={"b": 4, "c": 0})


class Played:
    """A sweep whose trials end as `outcome` prescribes."""

    def __init__(self, preset: Preset = TWO_STEPS, maximise: bool = True) -> None:
        self.sweep = Sweep(Entry("mine", "full", {"extra": True}), preset, task(), maximise)
        self.finished: dict[str, TrialRecord] = {}
        self.running: set[str] = set()
        self.values: dict[str, float] = {}

    def next(self) -> Any:
        return self.sweep.next(self.finished, self.running, self.values)

    def start(self) -> dict[str, Any]:
        point = self.next()
        assert isinstance(point, dict)
        self.running.add(self.sweep.hash_of(point))
        return point

    def end(self, point: dict[str, Any], value: float | None) -> None:
        key = self.sweep.hash_of(point)
        self.running.discard(key)
        self.finished[key] = TrialRecord(trial_id=key, number=0, strategy="full", label="mine", config_hash=key)
        if value is not None:
            self.values[key] = value


def test_the_second_step_starts_at_the_best_point_of_the_first() -> None:
    played = Played()
    for value, expected in ((0.1, 1), (0.9, 2), (0.5, 3)):
        point = played.start()
        assert point == {"a": expected, "b": 4, "c": 0, "extra": True}
        played.end(point, value)
    assert played.start() == {"a": 2, "b": 5, "c": 0, "extra": True}
    assert played.start() == {"a": 2, "b": 6, "c": 0, "extra": True}
    assert played.next() is Later.DONE


def test_the_best_of_a_loss_is_its_lowest_and_ties_go_to_the_first() -> None:
    played = Played(maximise=False)
    for value in (0.5, 0.2, 0.2):
        played.end(played.start(), value)
    assert played.start()["a"] == 2


def test_the_second_step_waits_for_the_first_whatever_the_order_of_ends() -> None:
    played = Played()
    points = [played.start() for _ in range(3)]
    assert played.next() is Later.WAIT
    played.end(points[2], 0.9)
    played.end(points[0], 0.2)
    assert played.next() is Later.WAIT
    played.end(points[1], None)
    assert played.start() == {"a": 3, "b": 5, "c": 0, "extra": True}


def test_a_step_without_a_complete_trial_ends_the_sweep_with_a_message(caplog: pytest.LogCaptureFixture) -> None:
    played = Played()
    for _ in range(3):
        played.end(played.start(), None)
    assert played.next() is Later.DONE
    assert played.next() is Later.DONE
    assert played.sweep.ended_early
    message = "The sweep of mine ends after step 1 of 2: none of its 3 trials completed."
    assert [record.getMessage() for record in caplog.records] == [message]


def test_a_preset_without_steps_is_one_point() -> None:
    played = Played(Preset(fixed={"C": 1.0}))
    point = played.start()
    assert point == {"C": 1.0, "extra": True}
    assert played.next() is Later.DONE
    played.end(point, 0.5)
    assert played.next() is Later.DONE


def test_a_study_of_the_papers_sweeps(tmp_path: Path) -> None:
    proposed = drive(searcher(tmp_path, sampler="paper", trials=29))
    assert Counter(c["label"] for c in proposed) == {"linear_probe": 1, "full": 8, "lp_ft": 6, "daft": 14}
    daft = [c for c in proposed if c["label"] == "daft"]
    first, second = daft[:10], daft[10:]
    assert {c["hparams"]["lr_head"] for c in first} == {1.0}
    assert {c["hparams"]["head_rate"] for c in daft} == {"absolute"}
    best = max(first, key=accuracy)["hparams"]["lr_backbone"]
    assert [c["hparams"] for c in second] == [
        {"head_rate": "absolute", "lr_head": lr_head, "lr_backbone": best} for lr_head in (10.0, 3.0, 0.3, 0.1)
    ]
    assert all(c["hparams"]["lr_head"] is None for c in proposed if c["label"] in ("full", "lp_ft"))
    parameters = optuna_trials(tmp_path)[-1].params
    assert parameters == {"strategy": "daft", "daft.lr_backbone": best, "daft.lr_head": 0.1}


def test_four_workers_wait_for_step_one_but_never_for_ever(tmp_path: Path) -> None:
    proposed = drive(searcher(tmp_path, ("daft",), sampler="paper", trials=14), concurrent=4)
    best = max(proposed[:10], key=accuracy)["hparams"]["lr_backbone"]
    assert {c["hparams"]["lr_backbone"] for c in proposed[10:]} == {best}
    assert len(proposed) == 14


@pytest.mark.parametrize("concurrent", [1, 3])
def test_an_entry_whose_trials_all_fail_ends_and_the_others_continue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, concurrent: int
) -> None:
    def outcome(config: Config) -> dict[str, Any] | None:
        return None if config["label"] == "daft" else finished(config)

    proposed = drive(searcher(tmp_path, ("daft", "full"), sampler="paper", trials=22), outcome, concurrent)
    assert Counter(c["label"] for c in proposed) == {"daft": 10, "full": 8}
    assert "The sweep of daft ends after step 1 of 2: none of its 10 trials completed." in caplog.text


def test_a_killed_sweep_continues_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = drive(searcher(tmp_path / "whole", ("daft",), sampler="paper", trials=14))
    (tmp_path / "parts").mkdir()
    parts: dict[int, Config] = {}
    for stop in (4, 7, 3, None):
        search = searcher(tmp_path / "parts", ("daft",), sampler="paper", trials=14)
        parts |= {c["_number"]: c for c in drive(search, stop_after=stop)}
    assert [parts[n]["hparams"] for n in sorted(parts)] == [c["hparams"] for c in whole]


def test_an_entry_may_run_its_sweep_beside_a_search(tmp_path: Path) -> None:
    entries = [Entry("", "full", {}, "paper"), Entry("free", "full"), Entry("", "daft")]
    proposed = drive(searcher(tmp_path, entries=entries, trials=16))
    count = Counter(c["label"] for c in proposed)
    assert count["full"] == 8
    assert count["free"] + count["daft"] == 8
    assert [c["label"] for c in proposed[:3]] == ["full", "free", "daft"]
    swept = optuna_trials(tmp_path, "s/given")
    assert {t.user_attrs["label"] for t in swept} == {"full"}  # the sampler does not see them
    assert len(swept) == 8


def test_which_entries_follow_a_preset() -> None:
    assert preset_of(Entry("", "full"), "tpe") is None
    assert preset_of(Entry("", "full"), "paper") == search_spaces.preset("full", "paper")
    fixed = {"lr_backbone": 0.1, "lr_head": 0.1}
    settled = preset_of(Entry("", "full", fixed), "tpe")
    assert settled == Preset(fixed=fixed)


def test_a_strategy_without_a_paper_sweep_gets_its_default_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search_spaces.full.PRESETS", {})
    entry = Entry("", "full")
    preset = preset_of(entry, "paper")
    assert preset is not None
    assert Sweep(entry, preset, task()).next({}, (), {}) == search_spaces.default_point("full")
