"""Ways to search: a sampler, a division of the budget among the strategies, and a scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from benchmarks.search.samplers import PerStrategy, Sampler, Shared, Sweeps, optuna_sampler
from benchmarks.search.schedulers import MakeScheduler, asha, median, never, promote, rays_asha, third
from orchestrator.search.allocation import next_entry
from orchestrator.search.entry_sampling import STARTUP
from orchestrator.search.proposals import ROUNDS
from orchestrator.search.sampling import STARTUP as SHARED_STARTUP
from orchestrator.search.warm_start import WarmStart


@dataclass
class Tried:
    """A trial of a replayed search."""

    strategy: str
    hparams: dict[str, Any]
    value: float
    """Best validation accuracy over its epochs; NaN before the first."""
    units: int
    complete: bool = True
    """Whether it has used its whole budget; not yet, or never if it was stopped."""


# --------------------------------------------------------------------------------------- division of the budget

Division = Callable[[Sequence[Tried], Sequence[str], int], str | None]
"""(trials so far, strategies, budget) → strategy of the next trial; None = the sampler's choice."""


def in_turn(tried: Sequence[Tried], strategies: Sequence[str], budget: int) -> str | None:
    """As `search.allocation: equal`."""
    return next_entry("equal", strategies, [t.strategy for t in tried], {}, budget)


def halving(tried: Sequence[Tried], strategies: Sequence[str], budget: int) -> str | None:
    """As `search.allocation: halving`."""
    values = {index: t.value for index, t in enumerate(tried) if t.complete and math.isfinite(t.value)}
    return next_entry("halving", strategies, [t.strategy for t in tried], values, budget)


def rounds_then_sampler(tried: Sequence[Tried], strategies: Sequence[str], budget: int) -> str | None:
    """As `search.allocation: sampler`: the default point and up to `ROUNDS` random ones of every strategy first."""
    rounds = min(ROUNDS, (budget - len(strategies)) // (2 * len(strategies)))
    counts = {strategy: sum(t.strategy == strategy for t in tried) for strategy in strategies}
    fewest = min(strategies, key=lambda strategy: counts[strategy])
    return fewest if counts[fewest] <= rounds else None


def _samplers_choice(tried: Sequence[Tried], strategies: Sequence[str], budget: int) -> str | None:
    return None


# --------------------------------------------------------------------------------------------------------- policies

MakeSampler = Callable[[Sequence[str], int, WarmStart], Sampler]
"""(strategies, seed, what the other landscapes give) → a sampler."""


@dataclass(frozen=True)
class Policy:
    """One way to search."""

    name: str
    sampler: MakeSampler
    division: Division
    scheduler: MakeScheduler
    warm: bool = False
    """Whether it starts from the other landscapes."""


def _shared(name: str) -> MakeSampler:
    return lambda strategies, seed, warm: Shared(strategies, optuna_sampler(name, SHARED_STARTUP), seed)


def _per_strategy(name: str) -> MakeSampler:
    return lambda strategies, seed, warm: PerStrategy(strategies, optuna_sampler(name, STARTUP), seed)


def _warm(name: str, points: bool = True, trials: bool = True) -> MakeSampler:
    def make(strategies: Sequence[str], seed: int, warm: WarmStart) -> Sampler:
        earlier: Mapping[str, Any] = warm.entries if trials else {}
        start = warm if points else WarmStart()
        return PerStrategy(strategies, optuna_sampler(name, STARTUP), seed, start, earlier)

    return make


def _rays(strategies: Sequence[str], seed: int, warm: WarmStart) -> Sampler:
    return Shared(strategies, lambda s: optuna.samplers.TPESampler(seed=s), seed, default_first=False)


RANDOM = "random, equal"
SWEEPS = "the papers' sweeps (DAFT's in two steps)"
RAY = "Ray: OptunaSearch, one ASHA"

POLICIES = (
    Policy(RANDOM, _per_strategy("random"), in_turn, never()),
    Policy("today: shared TPE, ASHA from epoch 1", _shared("tpe"), rounds_then_sampler, asha(lambda epochs: 1)),
    Policy("shared TPE", _shared("tpe"), rounds_then_sampler, never()),
    Policy("TPE per strategy, equal", _per_strategy("tpe"), in_turn, never()),
    Policy("TPE per strategy, halving", _per_strategy("tpe"), halving, never()),
    Policy("GP per strategy, equal", _per_strategy("gp"), in_turn, never()),
    Policy("GP per strategy, halving", _per_strategy("gp"), halving, never()),
    Policy("random, halving", _per_strategy("random"), halving, never()),
    Policy("TPE per strategy, halving, ASHA from epochs/3", _per_strategy("tpe"), halving, asha(third)),
    Policy(
        "TPE per strategy, halving, ASHA from epochs/3, not LP-FT",
        _per_strategy("tpe"),
        halving,
        asha(third, exempt=("lp_ft",)),
    ),
    Policy("TPE per strategy, halving, promote from epoch 1", _per_strategy("tpe"), halving, promote(lambda epochs: 1)),
    Policy("TPE per strategy, halving, promote from epochs/3", _per_strategy("tpe"), halving, promote(third)),
    Policy("TPE per strategy, halving, median", _per_strategy("tpe"), halving, median()),
    Policy("GP per strategy, halving, ASHA from epochs/3", _per_strategy("gp"), halving, asha(third)),
    Policy("GP per strategy, halving, promote from epochs/3", _per_strategy("gp"), halving, promote(third)),
    Policy("TPE per strategy, halving, warm points", _warm("tpe", trials=False), halving, never(), warm=True),
    Policy("TPE per strategy, halving, warm trials", _warm("tpe", points=False), halving, never(), warm=True),
    Policy("TPE per strategy, halving, warm start", _warm("tpe"), halving, never(), warm=True),
    Policy("GP per strategy, halving, warm start", _warm("gp"), halving, never(), warm=True),
    Policy(SWEEPS, lambda strategies, seed, warm: Sweeps(strategies), _samplers_choice, never()),
    Policy(RAY, _rays, _samplers_choice, rays_asha()),
)
