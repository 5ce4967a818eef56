"""One replayed search, and what it found."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import search_spaces
from benchmarks.search.policies import Policy, Tried
from benchmarks.search.samplers import End, Proposal
from benchmarks.search.surrogate import VAL, Array, Landscape, accuracy_of_best_epoch
from orchestrator.search.warm_start import WarmStart

CONFIRMATIONS = 3
"""Fresh seeds of every strategy's best configuration."""


@dataclass(frozen=True)
class Outcome:
    """A search's end at one budget."""

    budget: int
    chosen: str
    regret: float
    """Expected test accuracy of the best configuration of all, less that of the chosen one."""
    regrets: dict[str, float]
    """The same within each strategy that has a complete trial."""
    seconds: float
    """Of training, confirmations left out."""
    progress: list[tuple[float, float]]
    """(seconds, expected validation accuracy) whenever another configuration became the best on validation."""


def search(
    landscape: Landscape, policy: Policy, budgets: tuple[int, ...], seed: int, warm: WarmStart | None = None
) -> list[Outcome]:
    """Replay one search per budget, since a division of the budget depends on it.

    Args:
        landscape: what is searched.
        policy: how.
        budgets: trials.
        seed: of the sampler and of the noise.
        warm: what the other landscapes give.
    """
    return [_Search(landscape, policy, budget, seed, warm or WarmStart()).run() for budget in budgets]


@dataclass
class _Trial:
    """A trial of which some epochs are trained."""

    number: int
    strategy: str
    curve: Array
    """(epochs, columns), noise included."""
    diverges: int | None
    """Epoch in which it diverges."""
    handle: Any = None
    values: list[float] = field(default_factory=list)
    """Validation accuracy of the epochs so far."""


class _Search:
    """One search, one trial at a time."""

    def __init__(self, landscape: Landscape, policy: Policy, budget: int, seed: int, warm: WarmStart) -> None:
        self._landscape = landscape
        self._policy = policy
        self._generator = np.random.default_rng(seed)
        strategies = list(landscape.surrogates)
        self._searched = [strategy for strategy in strategies if search_spaces.space(strategy)]
        self._epochs = next(iter(landscape.surrogates.values())).shape[0]
        self._sampler = policy.sampler(self._searched, seed, warm)
        self._scheduler = policy.scheduler(self._epochs, self._searched)
        self._first = deque(self._sampler.first())
        self._budget = budget
        self._tried: list[Tried] = []
        self._open: dict[int, _Trial] = {}
        self._seconds = 0.0
        self._progress: list[tuple[float, float]] = []
        self._best = -1.0
        for strategy in strategies:
            if strategy not in self._searched:
                self._solve(strategy)
        self._solved = len(self._tried)

    def run(self) -> Outcome:
        """In the order of `orchestrator.search.searcher.StudySearcher.suggest`."""
        while True:
            self._end_withdrawn(self._budget - len(self._tried))
            number = self._scheduler.promote()
            if number is None:
                number = self._propose()
            if number is None:
                number = self._scheduler.promote_last()
            if number is None:
                self._end_withdrawn(0)
                return self._conclude()
            self._train(self._open[number])

    def _solve(self, strategy: str) -> None:
        """Enter a strategy without hyperparameters: one trial of one unit."""
        surrogate = self._landscape.surrogates[strategy]
        value = float(surrogate.draw({}, self._generator)[:, VAL].max())
        self._seconds += surrogate.unit_seconds
        self._tried.append(Tried(strategy, {}, value, 1))
        self._note_best(self._tried[-1])

    def _propose(self) -> int | None:
        """Number of a new trial; None = the budget is used, or the sampler has no more."""
        if len(self._tried) >= self._budget:
            return None
        proposal: Proposal | None
        if self._first:
            proposal = self._first.popleft()
        else:
            tried = self._tried[self._solved :]
            strategy = self._policy.division(tried, self._searched, self._budget - self._solved)
            proposal = self._sampler.ask(strategy)
        if proposal is None:
            return None
        chosen, hparams, handle = proposal
        number = len(self._tried)
        surrogate = self._landscape.surrogates[chosen]
        curve = surrogate.draw(hparams, self._generator)
        diverges = surrogate.diverges(hparams, self._generator)
        self._tried.append(Tried(chosen, hparams, float("nan"), 0, complete=False))
        self._open[number] = _Trial(number, chosen, curve, diverges, handle)
        self._scheduler.add(number, chosen)
        return number

    def _train(self, trial: _Trial) -> None:
        """Train epoch by epoch until the trial ends or pauses."""
        tried = self._tried[trial.number]
        for unit in range(len(trial.values) + 1, self._epochs + 1):
            self._seconds += self._landscape.surrogates[trial.strategy].unit_seconds
            if unit == trial.diverges:
                self._end(trial, "failed")
                return
            trial.values.append(float(trial.curve[unit - 1, VAL]))
            tried.value = max(trial.values)
            tried.units = unit
            if unit == self._epochs:
                break
            if self._scheduler.stops(trial.number, trial.strategy, unit, trial.values):
                self._end(trial, "stopped")
                return
            if self._scheduler.pauses(trial.number, unit, trial.values[-1]):
                return
        self._end(trial, "complete")

    def _end_withdrawn(self, remaining: int) -> None:
        for number in self._scheduler.withdraw(remaining):
            self._end(self._open[number], "stopped")

    def _end(self, trial: _Trial, end: End) -> None:
        del self._open[trial.number]
        tried = self._tried[trial.number]
        tried.complete = end == "complete"
        self._scheduler.end(trial.number, tried.complete)
        self._sampler.tell(trial.handle, trial.values, end)
        if tried.complete:
            self._note_best(tried)

    def _note_best(self, tried: Tried) -> None:
        if tried.value > self._best:
            self._best = tried.value
            expected = self._landscape.surrogates[tried.strategy].expected([tried.hparams])[0]
            self._progress.append((self._seconds, float(expected[:, VAL].max())))

    def _conclude(self) -> Outcome:
        """Confirm every strategy's best trial and choose by the mean validation of its fresh seeds."""
        means: dict[str, float] = {}
        expected: dict[str, float] = {}
        for strategy, surrogate in self._landscape.surrogates.items():
            # As in a study, a trial that was stopped is no candidate.
            finished = [t for t in self._tried if t.strategy == strategy and t.complete]
            if not finished:
                continue
            best = max(finished, key=lambda t: t.value)
            seeds = [surrogate.draw(best.hparams, self._generator)[:, VAL].max() for _ in range(CONFIRMATIONS)]
            means[strategy] = float(np.mean(seeds))
            expected[strategy] = float(accuracy_of_best_epoch(surrogate.expected([best.hparams]))[0])
        chosen = max(means, key=lambda strategy: means[strategy])
        best_of = self._landscape.best
        return Outcome(
            budget=self._budget,
            chosen=chosen,
            regret=self._landscape.optimum - expected[chosen],
            regrets={strategy: best_of[strategy] - accuracy for strategy, accuracy in expected.items()},
            seconds=self._seconds,
            progress=self._progress,
        )
