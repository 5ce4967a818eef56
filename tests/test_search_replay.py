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
from benchmarks.search.policies import POLICIES, Asha, Median, Tried, halving, in_turn
from benchmarks.search.replay import search
from benchmarks.search.surrogate import TEST, VAL, Landscape, Surrogate, features, read

EPOCHS = 4
LEVEL = {"full": 0.80, "daft": 0.90}
CONFIGURATIONS = 40
NOISE = 0.01


def truth(strategy: str, hparams: dict[str, Any]) -> float:
    """Final accuracy: a strategy's level less the squared distance of the backbone's rate from 0.01, in decades."""
    return LEVEL[strategy] - 0.05 * math.log10(hparams["lr_backbone"] / 0.01) ** 2


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
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
    file = tmp_path_factory.mktemp("landscape") / "toy.parquet"
    pd.DataFrame(rows).to_parquet(file)
    return file


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


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_policy_finds_the_right_strategy(policy: Any, landscape: Landscape) -> None:
    (outcome,) = search(landscape, policy, (12,), seed=3)
    assert outcome.budget == 12
    assert outcome.chosen == "daft"
    assert -0.01 < outcome.regret < 0.3
    # Four epochs at most of twelve trials, at one or two seconds each.
    assert 12 <= outcome.seconds <= 2 * EPOCHS * 12


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
