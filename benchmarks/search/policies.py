"""What a search does: which entry is next, which configuration, and when a trial is stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.trial import TrialState

import search_spaces
from orchestrator.search.allocation import next_entry
from orchestrator.search.asha import EntryRungs
from orchestrator.search.proposals import ROUNDS
from orchestrator.search.sampling import make_sampler
from orchestrator.search.space import SearchSpace
from orchestrator.search.stages import Entry


@dataclass
class Tried:
    """A finished or stopped trial of a replayed search."""

    strategy: str
    hparams: dict[str, Any]
    value: float
    """Best validation accuracy over its epochs."""
    units: int
    stopped: bool = False


class Sampler(Protocol):
    """Proposes configurations and learns from their values."""

    def ask(self, strategy: str | None) -> tuple[str, dict[str, Any], Any]:
        """Strategy, hyperparameters and a handle for `tell`; None = the sampler chooses the strategy."""

    def default(self, strategy: str) -> tuple[str, dict[str, Any], Any]:
        """As `ask`, the default point of a strategy."""

    def tell(self, handle: Any, values: Sequence[float], stopped: bool) -> None:
        """The validation accuracy of every epoch of a trial."""


class Shared:
    """One Optuna study over all strategies, of which the strategy is a parameter."""

    def __init__(
        self, strategies: Sequence[str], make: Callable[[int], optuna.samplers.BaseSampler], seed: int
    ) -> None:
        self._space = SearchSpace([Entry("", strategy) for strategy in strategies], "tpe")
        self._study = optuna.create_study(direction="maximize", sampler=make(seed))

    def ask(self, strategy: str | None) -> tuple[str, dict[str, Any], Any]:
        return self._ask({} if strategy is None else {"strategy": strategy})

    def default(self, strategy: str) -> tuple[str, dict[str, Any], Any]:
        return self._ask(self._space.default(self._space.searched[strategy]))

    def tell(self, handle: Any, values: Sequence[float], stopped: bool) -> None:
        _tell(self._study, handle, values, stopped)

    def _ask(self, parameters: dict[str, Any]) -> tuple[str, dict[str, Any], Any]:
        if parameters:
            self._study.enqueue_trial(parameters)
        trial = self._study.ask()
        entry, hparams = self._space.suggest(trial)
        return entry.strategy, hparams, trial


class PerStrategy:
    """An Optuna study of its own for each strategy."""

    def __init__(
        self, strategies: Sequence[str], make: Callable[[int], optuna.samplers.BaseSampler], seed: int
    ) -> None:
        self._studies = {
            strategy: optuna.create_study(direction="maximize", sampler=make(seed + i))
            for i, strategy in enumerate(strategies)
        }

    def ask(self, strategy: str | None) -> tuple[str, dict[str, Any], Any]:
        if strategy is None:
            raise ValueError("A study per strategy needs a division of the budget that names the strategy.")
        study = self._studies[strategy]
        trial = study.ask()
        return strategy, search_spaces.suggest(trial, strategy), (study, trial)

    def default(self, strategy: str) -> tuple[str, dict[str, Any], Any]:
        self._studies[strategy].enqueue_trial(search_spaces.default_point(strategy))
        return self.ask(strategy)

    def tell(self, handle: Any, values: Sequence[float], stopped: bool) -> None:
        study, trial = handle
        _tell(study, trial, values, stopped)


def _tell(study: optuna.Study, trial: optuna.Trial, values: Sequence[float], stopped: bool) -> None:
    for unit, value in enumerate(values, 1):
        trial.report(value, unit)
    if stopped:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, max(values))


# --------------------------------------------------------------------------------------- division of the budget


def in_turn(tried: Sequence[Tried], strategies: Sequence[str], budget: int) -> str | None:
    """Every strategy as often as the others."""
    return next_entry("equal", strategies, [t.strategy for t in tried], {}, budget)


def halving(tried: Sequence[Tried], strategies: Sequence[str], budget: int) -> str | None:
    """As `search.allocation: halving`."""
    # A trial that was stopped has no objective, as in a study.
    values = {index: t.value for index, t in enumerate(tried) if not t.stopped}
    return next_entry("halving", strategies, [t.strategy for t in tried], values, budget)


def rounds_then_sampler(tried: Sequence[Tried], strategies: Sequence[str], budget: int) -> str | None:
    """The default point and `ROUNDS` random ones of every strategy, then the sampler's choice."""
    counts = {strategy: sum(t.strategy == strategy for t in tried) for strategy in strategies}
    fewest = min(strategies, key=lambda strategy: counts[strategy])
    return fewest if counts[fewest] <= ROUNDS else None


Division = Callable[[Sequence[Tried], Sequence[str], int], str | None]


# ------------------------------------------------------------------------------------------------------ schedulers


class Scheduler(Protocol):
    """Decides after each epoch whether a trial is stopped."""

    def stops(self, trial: int, strategy: str, unit: int, values: Sequence[float]) -> bool:
        """Whether to stop trial number `trial` after `unit` epochs; `values` are its validation accuracies so far."""


class Never:
    """Every trial runs to its end."""

    def stops(self, trial: int, strategy: str, unit: int, values: Sequence[float]) -> bool:
        return False


class Asha:
    """Stopping at rungs, per strategy or over all of them.

    Args:
        exempt: strategies that are never stopped.
    """

    def __init__(
        self, epochs: int, grace: int, reduction: float, shared: bool = False, exempt: Sequence[str] = ()
    ) -> None:
        self._settings = (epochs, grace, reduction)
        self._epochs = epochs
        self._shared = shared
        self._exempt = frozenset(exempt)
        self._rungs: dict[str, EntryRungs] = {}

    def stops(self, trial: int, strategy: str, unit: int, values: Sequence[float]) -> bool:
        if strategy in self._exempt:
            return False
        rungs = self._rungs.setdefault("" if self._shared else strategy, EntryRungs(*self._settings))
        # Tune sees the value of the epoch, not the best so far.
        return rungs.report(str(trial), unit, values[-1]) and unit < self._epochs


class Median:
    """Stop a trial below the median of the running means of earlier trials of its strategy (Golovin et al., 2017)."""

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


@dataclass(frozen=True)
class Policy:
    """One way to search."""

    name: str
    sampler: Callable[[Sequence[str], int], Any]
    """Strategies and seed → `Sampler`."""
    division: Division
    scheduler: Callable[[int], Scheduler]
    """Epochs → scheduler."""
    default_first: bool = True
    """Whether every strategy's default point is its first one."""


def _shared(name: str) -> Callable[[Sequence[str], int], Any]:
    return lambda strategies, seed: Shared(strategies, lambda s: make_sampler(name, s), seed)


def _per_strategy(make: Callable[[int], optuna.samplers.BaseSampler]) -> Callable[[Sequence[str], int], Any]:
    return lambda strategies, seed: PerStrategy(strategies, make, seed)


def _tpe(startup: int) -> Callable[[int], optuna.samplers.BaseSampler]:
    return lambda seed: make_sampler("tpe", seed, startup)


def _gp(startup: int) -> Callable[[int], optuna.samplers.BaseSampler]:
    return lambda seed: make_sampler("gp", seed, startup)


def _random(seed: int) -> optuna.samplers.BaseSampler:
    return make_sampler("random", seed)


def _never(epochs: int) -> Scheduler:
    return Never()


def _asha(first: Callable[[int], int], reduction: float = 3, exempt: Sequence[str] = ()) -> Callable[[int], Scheduler]:
    return lambda epochs: Asha(epochs, first(epochs), reduction, exempt=exempt)


def _third(epochs: int) -> int:
    return max(2, epochs // 3)


POLICIES = (
    Policy("random, in turn", _per_strategy(_random), in_turn, _never),
    Policy("today: shared TPE, ASHA from epoch 1", _shared("tpe"), rounds_then_sampler, _asha(lambda epochs: 1)),
    Policy("shared TPE", _shared("tpe"), rounds_then_sampler, _never),
    Policy("TPE per strategy", _per_strategy(_tpe(3)), in_turn, _never),
    Policy("GP per strategy", _per_strategy(_gp(3)), in_turn, _never),
    Policy("GP per strategy, halving", _per_strategy(_gp(3)), halving, _never),
    Policy("TPE per strategy, halving", _per_strategy(_tpe(3)), halving, _never),
    Policy("random, halving", _per_strategy(_random), halving, _never),
    Policy("GP per strategy, halving, ASHA from epochs/3", _per_strategy(_gp(3)), halving, _asha(_third)),
    Policy(
        "GP per strategy, halving, ASHA from epochs/3, not LP-FT",
        _per_strategy(_gp(3)),
        halving,
        _asha(_third, exempt=("lp_ft",)),
    ),
    Policy("GP per strategy, halving, median", _per_strategy(_gp(3)), halving, lambda epochs: Median(_third(epochs))),
    Policy(
        "Ray: OptunaSearch, one ASHA",
        lambda strategies, seed: Shared(strategies, lambda s: optuna.samplers.TPESampler(seed=s), seed),
        lambda tried, strategies, budget: None,
        lambda epochs: Asha(epochs, 1, 4, shared=True),
        default_first=False,
    ),
)
