"""When a trial of a replayed search is stopped or paused; the rules are those of the product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from orchestrator.search.asha import EntryRungs
from orchestrator.search.grace import later_graces
from orchestrator.search.promotion import Promotions
from orchestrator.search.rungs import rungs
from orchestrator.search.stages import Entry


class Scheduler:
    """Base: every trial runs to its end."""

    def add(self, trial: int, strategy: str) -> None:
        """Enter a new trial, by its number."""

    def stops(self, trial: int, strategy: str, unit: int, values: Sequence[float]) -> bool:
        """Whether a trial ends after `unit` epochs, before its last one.

        Args:
            trial: its number.
            strategy: of the trial.
            unit: 1-based.
            values: its validation accuracies so far.
        """
        return False

    def pauses(self, trial: int, unit: int, value: float) -> bool:
        """Whether a trial waits after `unit` epochs, with validation accuracy `value`."""
        return False

    def end(self, trial: int, completed: bool) -> None:
        """Enter the end of a trial."""

    def withdraw(self, remaining: int) -> list[int]:
        """Paused trials that end now, with `remaining` trials still to be proposed."""
        return []

    def promote(self) -> int | None:
        """The paused trial that continues before a new one is proposed."""
        return None

    def promote_last(self) -> int | None:
        """The paused trial that continues when no new one comes."""
        return None


class Asha(Scheduler):
    """Stopping at rungs, per strategy or over all of them.

    Args:
        epochs: of a full trial.
        grace: the first rung.
        reduction: η.
        shared: one set of rungs for all strategies, as Ray's own scheduler has it.
        exempt: strategies that are never stopped.
    """

    def __init__(
        self, epochs: int, grace: int, reduction: float, shared: bool = False, exempt: Sequence[str] = ()
    ) -> None:
        self._epochs = epochs
        self._grace = grace
        self._reduction = reduction
        self._shared = shared
        self._exempt = frozenset(exempt)
        self._rungs: dict[str, EntryRungs] = {}

    def stops(self, trial: int, strategy: str, unit: int, values: Sequence[float]) -> bool:
        if strategy in self._exempt:
            return False
        key = "" if self._shared else strategy
        if key not in self._rungs:
            later = {} if self._shared else later_graces([Entry("", strategy)], self._grace, self._reduction)
            self._rungs[key] = EntryRungs(self._epochs, later.get(strategy, self._grace), self._reduction)
        # Tune sees the value of the epoch, not the best so far.
        return self._rungs[key].report(str(trial), unit, values[-1]) and unit < self._epochs


class Promote(Scheduler):
    """Pause and promote, with one trial at a time.

    Args:
        epochs: of a full trial.
        strategies: that compete.
        grace: the first rung.
        reduction: η.
    """

    def __init__(self, epochs: int, strategies: Sequence[str], grace: int, reduction: float) -> None:
        later = later_graces([Entry("", strategy) for strategy in strategies], grace, reduction)
        self._promotions = Promotions(rungs(epochs, grace, reduction), reduction, strategies, later)

    def add(self, trial: int, strategy: str) -> None:
        self._promotions.add(trial, strategy)

    def pauses(self, trial: int, unit: int, value: float) -> bool:
        return not self._promotions.report(trial, unit, value)

    def end(self, trial: int, completed: bool) -> None:
        self._promotions.end(trial, completed)

    def withdraw(self, remaining: int) -> list[int]:
        self._promotions.withdraw(remaining)
        return sorted(self._promotions.withdrawn)

    def promote(self) -> int | None:
        return self._promotions.promote_next()

    def promote_last(self) -> int | None:
        trial = self._promotions.promote_last()
        if trial is None:
            # Nothing runs or comes any more that could promote one.
            self._promotions.withdraw_all()
        return trial


class Median(Scheduler):
    """Stop a trial below the median of the running means of earlier trials of its strategy (Golovin et al., 2017).

    Args:
        grace: epochs that every trial gets.
        least: earlier trials of the strategy, below which none is stopped.
    """

    def __init__(self, grace: int, least: int = 3) -> None:
        self._grace = grace
        self._least = least
        self._curves: dict[str, dict[int, list[float]]] = {}

    def stops(self, trial: int, strategy: str, unit: int, values: Sequence[float]) -> bool:
        curves = self._curves.setdefault(strategy, {})
        curves[trial] = list(values)
        others = [float(np.mean(c[:unit])) for number, c in curves.items() if number != trial and len(c) >= unit]
        if unit < self._grace or len(others) < self._least:
            return False
        return max(values) < float(np.median(others))


MakeScheduler = Callable[[int, Sequence[str]], Scheduler]
"""(epochs, strategies) → a scheduler."""


def third(epochs: int) -> int:
    """A first rung after a third of the epochs."""
    return max(2, epochs // 3)


def never() -> MakeScheduler:
    """No early stopping."""
    return lambda epochs, strategies: Scheduler()


def asha(grace: Callable[[int], int], reduction: float = 3, exempt: Sequence[str] = ()) -> MakeScheduler:
    """ASHA per strategy; `grace`: epochs → first rung."""
    return lambda epochs, strategies: Asha(epochs, grace(epochs), reduction, exempt=exempt)


def rays_asha() -> MakeScheduler:
    """Ray's `ASHAScheduler` with its own defaults: one set of rungs from epoch 1, η = 4."""
    return lambda epochs, strategies: Asha(epochs, 1, 4, shared=True)


def promote(grace: Callable[[int], int], reduction: float = 3) -> MakeScheduler:
    """Pause and promote per strategy; `grace`: epochs → first rung."""
    return lambda epochs, strategies: Promote(epochs, strategies, grace(epochs), reduction)


def median() -> MakeScheduler:
    """Median stopping after a third of the epochs."""
    return lambda epochs, strategies: Median(third(epochs))
