"""One replayed search, and what it found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import search_spaces
from benchmarks.search.policies import Policy, Tried
from benchmarks.search.surrogate import TEST, VAL, Landscape

CONFIRMATIONS = 3
"""Fresh seeds of every strategy's best configuration."""


@dataclass(frozen=True)
class Outcome:
    """A search's end at one budget."""

    budget: int
    chosen: str
    regret: float
    """Expected final test accuracy of the best configuration of all, less that of the chosen one."""
    regrets: dict[str, float]
    """The same within each strategy."""
    seconds: float
    """Of training, confirmations left out."""


def search(landscape: Landscape, policy: Policy, budgets: tuple[int, ...], seed: int) -> list[Outcome]:
    """Replay one search per budget, since a division of the budget depends on it."""
    return [_search(landscape, policy, budget, seed) for budget in budgets]


def _search(landscape: Landscape, policy: Policy, budget: int, seed: int) -> Outcome:
    generator = np.random.default_rng(seed)
    strategies = list(landscape.surrogates)
    searched = [strategy for strategy in strategies if search_spaces.space(strategy)]
    tried: list[Tried] = []
    seconds = 0.0
    # A strategy without hyperparameters is one trial.
    for strategy in strategies:
        if strategy not in searched:
            surrogate = landscape.surrogates[strategy]
            curve = surrogate.draw({}, generator)
            tried.append(Tried(strategy, {}, float(curve[:, VAL].max()), 1))
            seconds += surrogate.unit_seconds
    solved = len(tried)
    sampler = policy.sampler(searched, seed)
    epochs = next(iter(landscape.surrogates.values())).shape[0]
    scheduler = policy.scheduler(epochs)
    defaults = list(searched) if policy.default_first else []
    while len(tried) < budget:
        if defaults:
            chosen, hparams, handle = sampler.default(defaults.pop(0))
        else:
            chosen, hparams, handle = sampler.ask(policy.division(tried[solved:], searched, budget - solved))
        surrogate = landscape.surrogates[chosen]
        curve = surrogate.draw(hparams, generator)
        values: list[float] = []
        stopped = False
        for unit in range(1, epochs + 1):
            values.append(float(curve[unit - 1, VAL]))
            if unit < epochs and scheduler.stops(len(tried), chosen, unit, values):
                stopped = True
                break
        sampler.tell(handle, values, stopped)
        tried.append(Tried(chosen, hparams, max(values), len(values), stopped))
        seconds += len(values) * surrogate.unit_seconds
    return _conclude(landscape, tried, budget, seconds, generator)


def _conclude(
    landscape: Landscape, tried: list[Tried], budget: int, seconds: float, generator: np.random.Generator
) -> Outcome:
    """Confirm every strategy's best trial and choose by the mean validation of its fresh seeds."""
    means: dict[str, float] = {}
    expected: dict[str, float] = {}
    for strategy, surrogate in landscape.surrogates.items():
        # As in a study, a trial that was stopped is no candidate.
        finished = [t for t in tried if t.strategy == strategy and not t.stopped]
        if not finished:
            continue
        best = max(finished, key=lambda t: t.value)
        seeds = [surrogate.draw(best.hparams, generator)[:, VAL].max() for _ in range(CONFIRMATIONS)]
        means[strategy] = float(np.mean(seeds))
        expected[strategy] = float(surrogate.expected([best.hparams])[0, -1, TEST])
    chosen = max(means, key=lambda strategy: means[strategy])
    return Outcome(
        budget=budget,
        chosen=chosen,
        regret=landscape.optimum - expected[chosen],
        regrets={s: landscape.best[s] - expected.get(s, 0.0) for s in landscape.best},
        seconds=seconds,
    )
