"""Replayed searches on a landscape whose answer is known (`benchmarks.search`)."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import search_spaces
from benchmarks.landscapes.design import Point, first_points, hyperparameters, repeated_points
from benchmarks.landscapes.pairs import Pair
from benchmarks.search.policies import POLICIES, RANDOM, SWEEPS, Policy, Tried, halving, in_turn
from benchmarks.search.replay import Outcome, search
from benchmarks.search.samplers import PerStrategy, optuna_sampler, sweep_size, sweep_within
from benchmarks.search.schedulers import Asha, Median, Promote
from benchmarks.search.surrogate import (
    TEST,
    VAL,
    Landscape,
    Surrogate,
    Trials,
    accuracy_of_best_epoch,
    features,
    read,
)
from benchmarks.search.tables import Task, rank_correlations, replay, report
from benchmarks.search.warm import warm_start_without

EPOCHS = 4
LEVEL = {"full": 0.80, "daft": 0.90}
CONFIGURATIONS = 40
NOISE = 0.01


def truth(strategy: str, hparams: dict[str, Any]) -> float:
    """Final accuracy: a strategy's level less the squared distance of the backbone's rate from 0.01, in decades."""
    return LEVEL[strategy] - 0.05 * math.log10(hparams["lr_backbone"] / 0.01) ** 2


def write_table(file: Path, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    rows = []
    for strategy in LEVEL:
        for configuration in range(CONFIGURATIONS):
            hparams = hyperparameters(strategy, configuration)
            for seed in range(3 if configuration < 10 else 1):
                shift = generator.normal(0, NOISE)
                for unit in range(1, EPOCHS + 1):
                    accuracy = truth(strategy, hparams) * (0.7 + 0.3 * unit / EPOCHS) + shift
                    rows.append({
                        "strategy": strategy, "configuration": configuration, "seed": seed, "diverged": False,
                        "hparams": json.dumps(hparams), "unit": unit, "val/acc": accuracy, "test/acc": accuracy,
                        "ood/mean/acc": accuracy / 2, "cost/unit_seconds": 2.0 if strategy == "daft" else 1.0,
                    })  # fmt: skip
    pd.DataFrame(rows).to_parquet(file)
    return file


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two landscapes, whose optimum is the same."""
    folder = tmp_path_factory.mktemp("landscapes")
    return [write_table(folder / f"{name}.parquet", seed) for seed, name in enumerate(("toy", "other"))]


@pytest.fixture(scope="module")
def table(tables: list[Path]) -> Path:
    return tables[0]


@pytest.fixture(scope="module")
def landscape(table: Path) -> Landscape:
    return Landscape.load(table)


class TestSurrogate:
    def test_it_predicts_configurations_that_it_has_not_seen(self, landscape: Landscape) -> None:
        surrogate = landscape.surrogates["daft"]
        points = [hyperparameters("daft", configuration) for configuration in range(100, 160)]
        predicted = surrogate.expected(points)[:, -1, TEST]
        errors = predicted - np.array([truth("daft", point) for point in points])
        assert math.sqrt(float(np.mean(errors**2))) < 0.015
        assert surrogate.error < 0.02

    def test_noise_is_that_between_seeds(self, landscape: Landscape) -> None:
        surrogate = landscape.surrogates["full"]
        generator = np.random.default_rng(1)
        point = hyperparameters("full", 0)
        draws = np.stack([surrogate.draw(point, generator) for _ in range(400)])
        assert float(draws[:, -1, VAL].std()) == pytest.approx(NOISE, rel=0.35)
        # One seed shifts the whole curve: epochs move together.
        assert float(np.corrcoef(draws[:, 0, VAL], draws[:, -1, VAL])[0, 1]) > 0.95

    def test_a_seed_that_falls_in_between_makes_no_peak(self) -> None:
        trials = self.trials(repeated=3)
        # One seed of every configuration falls to 0.2 at the second epoch.
        trials.curves[1::3, 1, VAL] = 0.2
        surrogate = Surrogate(trials)
        generator = np.random.default_rng(0)
        for point in trials.hparams[:2]:
            peaks = [surrogate.draw(point, generator)[:, VAL].max() for _ in range(30)]
            assert peaks == pytest.approx([float(surrogate.expected([point])[0, :, VAL].max())] * 30, abs=0.001)

    def test_trials_diverge_where_those_of_the_table_did(self) -> None:
        trials = self.trials(repeated=1)
        trials.diverged[:] = [point["lr_backbone"] > 0.03 for point in trials.hparams]
        trials.units[trials.diverged] = 2
        trials.curves[trials.diverged] = 0.0
        surrogate = Surrogate(trials)
        generator = np.random.default_rng(0)
        stable = {"lr_backbone": 0.003, "lr_head": 3.0}
        lost = {"lr_backbone": 0.2, "lr_head": 3.0}
        assert [surrogate.diverges(stable, generator) for _ in range(20)].count(None) >= 18
        assert [surrogate.diverges(lost, generator) for _ in range(20)].count(3) >= 18
        assert surrogate.stable([stable, lost]).tolist() == [True, False]
        # The cliff is no part of the curves.
        assert surrogate.error < 0.02

    @staticmethod
    def trials(repeated: int) -> Trials:
        """Configurations of `full` with curves as in `truth`, without noise."""
        hparams = [hyperparameters("full", configuration) for configuration in range(CONFIGURATIONS)]
        configuration = np.repeat(np.arange(CONFIGURATIONS), repeated)
        final = np.array([truth("full", hparams[i]) for i in configuration])
        curves = final[:, None, None] * np.linspace(0.8, 1.0, EPOCHS)[None, :, None] * np.ones((1, 1, 3))
        count = len(configuration)
        return Trials(
            strategy="full",
            hparams=hparams,
            configuration=configuration,
            curves=curves,
            diverged=np.zeros(count, dtype=bool),
            units=np.full(count, EPOCHS),
            unit_seconds=1.0,
        )

    def test_the_best_configuration_is_the_optimum(self, landscape: Landscape) -> None:
        assert landscape.best["daft"] == pytest.approx(0.90, abs=0.015)
        assert landscape.best["full"] == pytest.approx(0.80, abs=0.015)

    def test_bootstrap_samples_differ(self, table: Path) -> None:
        trials = read(table)["daft"]
        point = [hyperparameters("daft", 5)]
        one, two, again = (Surrogate(trials, seed).expected(point)[0, -1, VAL] for seed in (0, 1, 0))
        assert one == again != two

    def test_features_are_on_the_ranges_own_scale(self) -> None:
        space = search_spaces.space("full")
        ends = [{"lr_backbone": space["lr_backbone"].distribution.low, "lr_head": 100.0}]  # type: ignore[attr-defined]
        assert features("full", ends[0]).tolist() == pytest.approx([0.0, 1.0])
        assert features("linear_probe", {}).tolist() == [0.0]


def named(name: str) -> Policy:
    (policy,) = [policy for policy in POLICIES if policy.name == name]
    return policy


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_policy_finds_the_right_strategy(policy: Policy, landscape: Landscape, tables: list[Path]) -> None:
    warm = warm_start_without(tables[0], tables, list(LEVEL))
    (outcome,) = search(landscape, policy, (12,), 3, warm)
    assert outcome.budget == 12
    assert outcome.chosen == "daft"
    assert -0.01 < outcome.regret < 0.3
    # Four epochs at most of twelve trials, at one or two seconds each.
    assert 12 <= outcome.seconds <= 2 * EPOCHS * 12
    times, accuracies = zip(*outcome.progress, strict=True)
    assert list(times) == sorted(times)
    assert max(times) <= outcome.seconds
    assert 0.3 < accuracies[-1] <= 0.92


class TestWarmStart:
    def test_it_comes_from_the_other_landscapes(self, tables: list[Path]) -> None:
        warm = warm_start_without(tables[0], tables, list(LEVEL))
        assert warm.studies == ("other",)
        entry = warm.entries["daft"]
        assert entry.fitting == CONFIGURATIONS
        assert {past.study for past in entry.points} == {"other"}
        # Noise of one seed: the best two are near the optimum, a rate of 0.01.
        assert all(abs(math.log10(past.hparams["lr_backbone"] / 0.01)) < 0.7 for past in entry.points)

    def test_its_points_follow_the_defaults(self, tables: list[Path]) -> None:
        warm = warm_start_without(tables[0], tables, list(LEVEL))
        first = PerStrategy(list(LEVEL), optuna_sampler("tpe", 3), 0, warm).first()
        assert [(strategy, hparams) for strategy, hparams, _ in first] == [
            *((strategy, search_spaces.default_point(strategy)) for strategy in LEVEL),
            *((strategy, warm.entries[strategy].points[rank].hparams) for rank in range(2) for strategy in LEVEL),
        ]

    def test_its_trials_lead_a_sampler_to_the_optimum(self, tables: list[Path]) -> None:
        warm = warm_start_without(tables[0], tables, list(LEVEL))
        distances = []
        for earlier in ({}, warm.entries):
            samplers = [PerStrategy(["full"], optuna_sampler("tpe", 3), seed, earlier=earlier) for seed in range(12)]
            rates = [sampler.ask("full")[1]["lr_backbone"] for sampler in samplers]
            distances.append(np.mean([abs(math.log10(rate / 0.01)) for rate in rates]))
        assert distances[1] < 0.8 * distances[0]

    def test_one_landscape_has_none(self, table: Path) -> None:
        policies = (RANDOM, "TPE per strategy, halving, warm start")
        rows = replay(Task(table, 0, (table,), policies, (8,), repeats=1))
        assert [row["policy"] for row in rows] == [RANDOM]


class TestSweeps:
    def test_a_sweep_is_that_of_the_paper_in_terms_of_the_search_space(self) -> None:
        daft = sweep_within("daft")
        paper = search_spaces.presets("daft")["paper"]
        head = search_spaces.space("daft")["lr_head"].default
        assert daft.steps[0] == paper.steps[0]
        assert daft.steps[1] == {"lr_head": tuple(head * multiple for multiple in (10, 3, 0.3, 0.1))}
        assert daft.fixed == search_spaces.default_point("daft")
        relative = sweep_within("lp_ft").steps[0]["lr_backbone_relative"]
        assert relative == pytest.approx((1.0, 0.3, 0.1, 0.03, 0.01, 0.003))
        assert sweep_within("bitfit").size == 1

    def test_the_second_step_is_at_the_best_of_the_first(self, landscape: Landscape) -> None:
        size = sweep_size(list(LEVEL))
        (outcome,) = search(landscape, named(SWEEPS), (3 * size,), seed=0)
        # The sweep ends by itself: all of its trials for four epochs, DAFT's at two seconds each.
        assert outcome.seconds == EPOCHS * (sweep_within("full").size + 2 * sweep_within("daft").size)
        assert outcome.regret < 0.02


class TestReport:
    def row(self, policy: str, sample: int, regret: float, seconds: float) -> dict[str, Any]:
        outcome = Outcome(12, "daft", regret, {"daft": regret}, seconds, [(1.0, 0.5), (0.25 * seconds, 0.9 - regret)])
        return {
            "landscape": "toy", "policy": policy, "sample": sample, "repeat": sample, "right": True, **vars(outcome),
        }  # fmt: skip

    def test_figures(self) -> None:
        rows = [self.row(RANDOM, sample, 0.04 + 0.01 * sample, 100) for sample in range(2)]
        rows += [self.row("shared TPE", sample, 0.02, 50) for sample in range(2)]
        rows += [self.row(SWEEPS, sample, 0.03, 200) for sample in range(2)]
        lines = list(report(rows))
        # Mean and standard deviation over the two surrogates: 4 and 5 points, and 2 and 3 less for shared TPE.
        assert f"| toy | 12 | {RANDOM} | 4.50 | 0.71 | 0.00 | 0.00 | 100% | 1.00 |" in lines
        assert "| toy | 12 | shared TPE | 2.00 | 0.00 | 2.50 | 0.71 | 100% | 0.50 |" in lines
        # It is as good as the sweep after 12.5 of 200 seconds, random search never; Ray's was not replayed.
        assert "| toy | 12 | shared TPE | 0.06 | 100% | - | nan% |" in lines
        assert f"| toy | 12 | {RANDOM} | - | 0% | - | nan% |" in lines


def test_an_epoch_of_the_toy_ranks_as_the_last_one_does(table: Path) -> None:
    # A curve is proportional to its end, but for the noise of its seed.
    *_, line = rank_correlations([table])
    name, strategy, *cells = line.strip("| ").split(" | ")
    assert (name, strategy) == ("toy", "full")
    assert len(cells) == EPOCHS
    assert float(cells[0]) > 0.9
    assert cells[-1] == "1.00"


def test_the_tested_weights_are_those_of_the_best_epoch() -> None:
    curve = np.zeros((1, 3, 3))
    curve[0, :, VAL] = [0.5, 0.9, 0.7]
    curve[0, :, TEST] = [0.4, 0.6, 0.8]
    assert accuracy_of_best_epoch(curve) == pytest.approx([0.6])


class TestDivision:
    def test_in_turn(self) -> None:
        tried = [Tried("full", {}, 0.5, 4)]
        assert in_turn(tried, ["full", "daft"], 10) == "daft"

    def test_the_worse_half_leaves_after_a_third(self) -> None:
        tried = [Tried(strategy, {}, LEVEL[strategy], 4) for strategy in ("full", "daft") * 3]
        assert halving(tried[:-1], ["full", "daft"], 18) == "daft"
        assert {halving(tried + tried[1:2] * n, ["full", "daft"], 18) for n in range(6)} == {"daft"}


class TestSchedulers:
    def test_asha_stops_below_the_best_of_the_strategy(self) -> None:
        asha = Asha(epochs=9, grace=1, reduction=3, exempt=["lp_ft"])
        assert not asha.stops(0, "full", 1, [0.5])
        assert asha.stops(1, "full", 1, [0.4])
        assert not asha.stops(2, "daft", 1, [0.1])
        assert not asha.stops(3, "lp_ft", 1, [0.0])

    def test_asha_waits_for_the_second_rung_where_a_trial_starts_at_an_optimum(self) -> None:
        asha = Asha(epochs=9, grace=1, reduction=3)
        for trial, value in enumerate([0.5, 0.1]):
            assert not asha.stops(trial, "lp_ft", 1, [value])
        assert not asha.stops(0, "lp_ft", 3, [0.5, 0.5, 0.6])
        assert asha.stops(1, "lp_ft", 3, [0.1, 0.1, 0.2])

    def test_promote_continues_the_best_third_and_ends_the_others(self) -> None:
        promote = Promote(epochs=9, strategies=["full"], grace=3, reduction=3)
        waiting = []
        for trial, value in enumerate([0.5, 0.7, 0.6]):
            promote.add(trial, "full")
            if promote.pauses(trial, 3, value):
                waiting.append(trial)
        assert waiting == [0, 1, 2]
        assert promote.promote() == 1
        assert promote.withdraw(remaining=0) == [0]

    def test_median_waits_for_enough_trials(self) -> None:
        median = Median(grace=2)
        assert [median.stops(trial, "full", 2, [0.5, 0.6]) for trial in range(3)] == [False] * 3
        assert median.stops(3, "full", 2, [0.1, 0.2])
        assert not median.stops(4, "full", 1, [0.1])


class TestDesign:
    pair = Pair("digits_cnn", ("linear_probe", "full", "daft"), configurations=6, repeated=2)

    def test_the_default_comes_first_and_strategies_take_turns(self) -> None:
        points = first_points(self.pair)
        assert points[:3] == [Point("linear_probe", 0, 0), Point("full", 0, 0), Point("daft", 0, 0)]
        assert Counter(point.strategy for point in points) == {"linear_probe": 1, "full": 6, "daft": 6}
        assert hyperparameters("full", 0) == search_spaces.default_point("full")
        assert hyperparameters("full", 3) == hyperparameters("full", 3) != hyperparameters("full", 4)

    def test_the_best_are_repeated(self) -> None:
        trials = [
            {"strategy": "full", "configuration": i, "seed": 0, "units": [{"val/acc": 0.1 * i}, {"val/acc": 0.0}]}
            for i in range(6)
        ]
        diverged = {"strategy": "full", "configuration": 6, "seed": 0, "units": []}
        assert repeated_points(self.pair, [*trials, diverged]) == [
            Point("full", configuration, seed) for configuration in (5, 4) for seed in (1, 2)
        ]
