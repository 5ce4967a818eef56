"""What is trained for a landscape: random points of every search space, and the best ones on further seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna

import search_spaces
from benchmarks.landscapes.pairs import SEEDS, Pair
from trainables.specs.seeds import stream_seed

SELECTION = "val/acc"


@dataclass(frozen=True, order=True)
class Point:
    """One trial of a landscape."""

    strategy: str
    configuration: int
    """Number of the configuration within its strategy; 0 = the default point."""
    seed: int


def hyperparameters(strategy: str, configuration: int) -> dict[str, Any]:
    """The default point, or a random one of the strategy's search space; the same for all pairs."""
    if configuration == 0:
        return search_spaces.default_point(strategy)
    sampler = optuna.samplers.RandomSampler(seed=stream_seed(0, "landscape", strategy, configuration) % 2**32)
    study = optuna.create_study(sampler=sampler)
    return search_spaces.suggest(study.ask(), strategy)


def first_points(pair: Pair) -> list[Point]:
    """Every configuration on the first seed, strategies in turn, so that an interrupted landscape is balanced."""
    return [
        Point(strategy, configuration, SEEDS[0])
        for configuration in range(pair.configurations)
        for strategy in pair.strategies
        if configuration == 0 or search_spaces.space(strategy)
    ]


def repeated_points(pair: Pair, trials: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The best configurations of each strategy on the further seeds.

    Args:
        trials: all of `first_points`, as they were recorded.
    """
    by_strategy: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for trial in trials:
        if trial["seed"] == SEEDS[0]:
            score = max((unit[SELECTION] for unit in trial["units"]), default=float("-inf"))
            by_strategy[trial["strategy"]].append((-score, trial["configuration"]))
    chosen = [
        (rank, strategy, configuration)
        for strategy, scores in by_strategy.items()
        for rank, (_, configuration) in enumerate(sorted(scores)[: pair.repeated])
        # The linear probe is deterministic.
        if search_spaces.space(strategy)
    ]
    return [Point(strategy, configuration, seed) for _, strategy, configuration in sorted(chosen) for seed in SEEDS[1:]]
