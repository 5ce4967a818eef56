"""What a replayed search proposes: Optuna's samplers as the product uses them, and the papers' sweeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

import search_spaces
from orchestrator.record.records import TrialRecord
from orchestrator.search.entry_sampling import with_earlier
from orchestrator.search.paper_sweep import Later, Sweep
from orchestrator.search.sampling import make_sampler
from orchestrator.search.space import SearchSpace
from orchestrator.search.stages import Entry
from orchestrator.search.warm_start import EARLIER, EntryWarmStart, WarmStart
from search_spaces import Preset
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings

Proposal = tuple[str, dict[str, Any], Any]
"""Strategy, hyperparameters and a handle for `tell`."""
End = Literal["complete", "stopped", "failed"]
"""`failed`: it diverged, of which a sampler learns nothing, as in a study."""
MakeOptuna = Callable[[int], optuna.samplers.BaseSampler]
"""Seed → Optuna's sampler."""


class Sampler(Protocol):
    """Proposes configurations and learns from their values."""

    def first(self) -> list[Proposal]:
        """What is tried before anything is asked for."""

    def ask(self, strategy: str | None) -> Proposal | None:
        """A configuration; of any strategy where none is named. None = there is no other one."""

    def tell(self, handle: Any, values: Sequence[float], end: End) -> None:
        """Enter a trial that has ended: how, and the validation accuracy of each of its epochs."""


class Shared:
    """One Optuna study over all strategies, of which the strategy is a parameter.

    Args:
        strategies: that compete.
        make: the sampler.
        seed: of the search.
        default_first: whether every strategy's default point comes first.
    """

    def __init__(self, strategies: Sequence[str], make: MakeOptuna, seed: int, default_first: bool = True) -> None:
        self._space = SearchSpace([Entry("", strategy) for strategy in strategies], "tpe")
        self._study = optuna.create_study(direction="maximize", sampler=make(seed))
        self._default_first = default_first

    def first(self) -> list[Proposal]:
        if not self._default_first:
            return []
        return [self._ask(self._space.default(entry)) for entry in self._space.searched.values()]

    def ask(self, strategy: str | None) -> Proposal:
        return self._ask({} if strategy is None else {"strategy": strategy})

    def tell(self, handle: Any, values: Sequence[float], end: End) -> None:
        _tell(self._study, handle, values, end)

    def _ask(self, parameters: dict[str, Any]) -> Proposal:
        if parameters:
            self._study.enqueue_trial(parameters)
        trial = self._study.ask()
        entry, hparams = self._space.suggest(trial)
        return entry.strategy, hparams, trial


@dataclass
class PerStrategy:
    """An Optuna study of its own for each strategy, after the default points and those of a warm start."""

    strategies: Sequence[str]
    make: MakeOptuna
    seed: int
    points: WarmStart = field(default_factory=WarmStart)
    """Whose first points are tried."""
    earlier: Mapping[str, EntryWarmStart] = field(default_factory=dict)
    """Strategy → earlier trials that its sampler sees."""

    def __post_init__(self) -> None:
        self._studies = {
            strategy: optuna.create_study(direction="maximize", sampler=self.make(self.seed + i))
            for i, strategy in enumerate(self.strategies)
        }

    def first(self) -> list[Proposal]:
        entries = {strategy: Entry("", strategy) for strategy in self.strategies}
        defaults = [(strategy, search_spaces.default_point(strategy)) for strategy in self.strategies]
        points = [(entry.strategy, values) for entry, values in self.points.first_points(entries)]
        return [self._enqueued(strategy, point) for strategy, point in defaults + points]

    def ask(self, strategy: str | None) -> Proposal:
        if strategy is None:
            raise ValueError("A study per strategy needs a division of the budget that names the strategy.")
        taken = self.earlier.get(strategy, EntryWarmStart()).trials
        trials = self._studies[strategy].get_trials(deepcopy=False)
        ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        if taken and len(ended) < EARLIER:
            return self._enqueued(strategy, self._parameters(strategy, ended, taken))
        trial = self._studies[strategy].ask()
        return strategy, search_spaces.suggest(trial, strategy), (strategy, trial)

    def tell(self, handle: Any, values: Sequence[float], end: End) -> None:
        strategy, trial = handle
        _tell(self._studies[strategy], trial, values, end)

    def _parameters(self, strategy: str, trials: Sequence[FrozenTrial], taken: Sequence[Any]) -> dict[str, Any]:
        sampler = self.make(self.seed + 1000 * len(trials) + self.strategies.index(strategy))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(with_earlier(trials, Entry("", strategy), taken, prefix=""))
        trial = study.ask()
        search_spaces.suggest(trial, strategy)
        return dict(trial.params)

    def _enqueued(self, strategy: str, parameters: Mapping[str, Any]) -> Proposal:
        study = self._studies[strategy]
        study.enqueue_trial(dict(parameters))
        trial = study.ask()
        return strategy, search_spaces.suggest(trial, strategy), (strategy, trial)


def _tell(study: optuna.Study, trial: optuna.Trial, values: Sequence[float], end: End) -> None:
    for unit, value in enumerate(values, 1):
        trial.report(value, unit)
    if end == "complete":
        study.tell(trial, max(values))
    else:
        study.tell(trial, state=TrialState.PRUNED if end == "stopped" else TrialState.FAIL)


def optuna_sampler(name: str, startup: int) -> MakeOptuna:
    """One of the product's samplers, which learns after `startup` trials."""
    return lambda seed: make_sampler(name, seed, startup)


# ---------------------------------------------------------------------------------------------- the papers' sweeps


class Sweeps:
    """The papers' sweeps (`orchestrator.search.paper_sweep`), one strategy after another; DAFT's has two steps."""

    def __init__(self, strategies: Sequence[str]) -> None:
        task = SharedTrialSettings(store="", model=ModelSpec(name="replayed"))
        self._sweeps = [Sweep(Entry("", strategy), sweep_within(strategy), task) for strategy in strategies]
        self._finished: dict[str, TrialRecord] = {}
        self._values: dict[str, float] = {}

    def first(self) -> list[Proposal]:
        return []

    def ask(self, strategy: str | None) -> Proposal | None:
        for sweep in self._sweeps:
            point = sweep.next(self._finished, (), self._values)
            if not isinstance(point, Later):
                return sweep.entry.strategy, point, (sweep, point)
        return None

    def tell(self, handle: Any, values: Sequence[float], end: End) -> None:
        sweep, point = handle
        key = sweep.hash_of(point)
        number = len(self._finished)
        self._finished[key] = TrialRecord(
            trial_id=str(number), number=number, strategy=sweep.entry.strategy, label=sweep.entry.label
        )
        if end == "complete":
            self._values[key] = max(values)


def sweep_size(strategies: Sequence[str]) -> int:
    """Trials of the papers' sweeps of the strategies."""
    return sum(sweep_within(strategy).size for strategy in strategies)


def sweep_within(strategy: str) -> Preset:
    """A strategy's preset `paper` in terms of its search space, in which alone a landscape knows its curves.

    Where the search has another parametrisation than the paper, its own default takes the place of the paper's fixed
    value, and the paper's grid keeps its distances: head rates are multiples of the default (10, 3, 0.3 and 0.1 of
    DAFT), and LP-FT's rates lie as far below the upper end of the relative rate as they do below the largest of the
    paper. Values outside of the searched range are left out. Strategies without such a preset are tried at their
    default point.
    """
    default = search_spaces.default_point(strategy)
    paper = search_spaces.presets(strategy).get("paper", Preset())
    steps = []
    for grids in paper.steps:
        step: dict[str, tuple[Any, ...]] = {}
        for key, values in grids.items():
            translated = _translated(strategy, key, values, default)
            step |= translated
        steps.append(step)
    return Preset(steps=tuple(steps), fixed=default)


def _translated(
    strategy: str, key: str, values: Sequence[Any], default: Mapping[str, Any]
) -> dict[str, tuple[Any, ...]]:
    space = search_spaces.space(strategy)
    if key == "lr_head":
        values = [value * default[key] for value in values]
    elif f"{key}_relative" in space:
        key = f"{key}_relative"
        top = space[key].distribution
        assert isinstance(top, FloatDistribution)
        # Rounded: 1.0 · 3e-7 / 1e-4 would lie below a range that begins at 0.003.
        values = [round(top.high * value / max(values), 12) for value in values]
    distribution = space[key].distribution
    if isinstance(distribution, FloatDistribution):
        values = [value for value in values if distribution.low <= value <= distribution.high]
    return {key: tuple(values)}
