"""Allocation of the search's trials to entries, and the samplers that learn from one entry alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

from orchestrator.search.allocation import next_entry
from orchestrator.search.entry_sampling import STARTUP, entry_parameters
from orchestrator.search.proposals import ATTEMPTS
from orchestrator.search.stages import Entry
from tests.support.driving import accuracy, drive, finished, searcher, shown

LEVEL = {"full": 0.7, "daft": 0.9, "lora": 0.8, "bitfit": 0.6}


def allocated(allocation: str, labels: list[str], budget: int) -> list[str]:
    """Labels of all trials where every trial of an entry has its `LEVEL`."""
    started: list[str] = []
    for _ in range(budget):
        values = {index: LEVEL[label] for index, label in enumerate(started)}
        started.append(next_entry(allocation, labels, started, values, budget))
    return started


class TestNextEntry:
    def test_equal_takes_turns_in_the_order_of_the_study(self) -> None:
        assert allocated("equal", ["full", "daft", "lora"], 7) == ["full", "daft", "lora"] * 2 + ["full"]

    def test_halving_drops_the_worse_half_after_each_third(self) -> None:
        started = allocated("halving", list(LEVEL), 36)
        assert Counter(started[:12]) == dict.fromkeys(LEVEL, 3)
        assert set(started[12:24]) == {"daft", "lora"}
        assert set(started[24:]) == {"daft"}

    def test_an_odd_number_of_entries_is_rounded_up(self) -> None:
        started = allocated("halving", ["full", "daft", "lora"], 27)
        assert set(started[9:18]) == {"daft", "lora"}

    def test_no_entry_is_dropped_before_it_has_three_trials(self) -> None:
        assert Counter(allocated("halving", list(LEVEL), 13)) == {"daft": 4, "full": 3, "lora": 3, "bitfit": 3}

    def test_trials_without_a_value_count_as_trials(self) -> None:
        started = ["full", "daft"] * 3
        assert next_entry("halving", ["full", "daft"], started, {0: 0.1}, budget=12) == "full"

    def test_of_equal_entries_the_first_one_stays(self) -> None:
        started = ["full", "daft"] * 3
        assert next_entry("halving", ["full", "daft"], started, dict.fromkeys(range(6), 0.5), budget=12) == "full"

    @pytest.mark.parametrize(("allocation", "labels"), [("sampler", ["full"]), ("thirds", ["full"]), ("equal", [])])
    def test_what_allocates_nothing_is_an_error(self, allocation: str, labels: list[str]) -> None:
        with pytest.raises(ValueError, match="equal, halving"):
            next_entry(allocation, labels, [], {}, 10)


class TestEntrySampling:
    def parameters(self, sampler: str, others: float, seed: int = 5, best: int = 7) -> dict[str, Any]:
        """Proposal for `full` after ten of its trials, and ten of `daft` whose objective is `others`.

        Of `full`, rate number `best` of 0 … 9 is the best.
        """
        storage = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
        for label, level in (("full", 0.0), ("daft", others)):
            for rate in range(10):
                distribution = optuna.distributions.FloatDistribution(1e-4, 0.3, log=True)
                trial = optuna.trial.create_trial(
                    params={"strategy": label, f"{label}.lr_backbone": 2e-4 * 2**rate},
                    distributions={
                        "strategy": optuna.distributions.CategoricalDistribution(("full", "daft")),
                        f"{label}.lr_backbone": distribution,
                    },
                    value=level - abs(rate - best),
                )
                storage.add_trial(trial)
        return entry_parameters(storage, Entry("full", "full", {"lr_head": 1.0}), sampler, seed)

    @pytest.mark.parametrize("sampler", ["tpe", "gp"])
    def test_it_learns_from_the_entry_and_from_nothing_else(self, sampler: str) -> None:
        proposal = self.parameters(sampler, others=0.0)
        assert proposal == self.parameters(sampler, others=100.0)
        assert set(proposal) == {"strategy", "full.lr_backbone"}
        assert proposal["strategy"] == "full"
        assert proposal != self.parameters(sampler, others=0.0, best=1)

    def test_a_gaussian_process_proposes_near_the_best(self) -> None:
        # 2e-4 · 2⁷ = 0.0256. The interval is a third of the range in its logarithm: random points hit 7 times of 20.
        rates = [self.parameters("gp", 0.0, seed)["full.lr_backbone"] for seed in range(20)]
        assert sum(0.006 < rate < 0.11 for rate in rates) >= 16

    def test_random_ignores_the_trials(self) -> None:
        assert self.parameters("random", 0.0) == self.parameters("random", 0.0, best=1)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
class TestSearch:
    def test_equal_gives_every_entry_as_many(self, tmp_path: Path, sampler: str) -> None:
        search = searcher(tmp_path, sampler=sampler, allocation="equal", trials=13)
        counts = Counter(config["label"] for config in drive(search))
        assert counts == {"linear_probe": 1, "full": 4, "lp_ft": 4, "daft": 4}

    def test_halving_ends_with_the_best_entry(self, tmp_path: Path, sampler: str) -> None:
        search = searcher(tmp_path, ("full", "lp_ft", "daft"), sampler=sampler, allocation="halving", trials=27)
        labels = [config["label"] for config in drive(search)]
        assert set(labels[18:]) == {"daft"}

    def test_killed_it_continues_as_if_it_had_not_been(self, tmp_path: Path, sampler: str) -> None:
        settings: dict[str, Any] = {"sampler": sampler, "allocation": "halving", "trials": 20}
        (tmp_path / "whole").mkdir()
        (tmp_path / "killed").mkdir()
        whole = drive(searcher(tmp_path / "whole", **settings))
        part = drive(searcher(tmp_path / "killed", **settings), stop_after=11)
        rest = drive(searcher(tmp_path / "killed", **settings))
        assert list(shown(part[:10] + rest)) == list(shown(whole))


def test_an_entrys_own_sampler_finds_what_random_does_not(tmp_path: Path) -> None:
    best = {}
    for sampler in ("gp", "random"):
        (tmp_path / sampler).mkdir()
        search = searcher(tmp_path / sampler, ("full", "daft"), sampler=sampler, allocation="equal", trials=30)
        best[sampler] = max(accuracy(config) for config in drive(search) if config["label"] == "daft")
    assert best["gp"] > best["random"]


def test_an_entry_without_new_configurations_leaves_its_trials_to_the_others(tmp_path: Path) -> None:
    entries = [Entry("ranks", "lora", {"lr_backbone": 1e-2, "lr_head": 1.0}), Entry("", "full")]
    settings: dict[str, Any] = {"entries": entries, "sampler": "tpe", "allocation": "equal", "trials": 20}

    def outcome(config: dict[str, Any]) -> dict[str, Any]:
        return {"val/acc": 0.5, "best/val/acc": 0.5, "unit": 4, "finished": True}

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = drive(searcher(tmp_path / "whole", **settings), outcome)
    counts = Counter(config["label"] for config in whole)
    assert counts == {"ranks": 5, "full": 15}
    drive(searcher(tmp_path / "killed", **settings), outcome, stop_after=17)
    rest = drive(searcher(tmp_path / "killed", **settings), outcome)
    assert list(shown(rest)) == list(shown(whole[16:]))


def test_parallel_proposals_differ(tmp_path: Path) -> None:
    search = searcher(tmp_path, ("full", "daft"), sampler="gp", allocation="equal", trials=24)
    configs = drive(search, finished, concurrent=4)
    assert len({str(config["hparams"]) + config["label"] for config in configs}) == 24


def test_an_entry_has_a_default_and_two_random_points_before_its_sampler_learns() -> None:
    assert STARTUP == 3
    assert ATTEMPTS > STARTUP
