"""Entries of a study, and the stages that follow its search."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from orchestrator.record.records import TrialRecord
from trainables.specs.metrics import CLASSIFICATION
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import SharedTrialSettings, TrialSpec

log = logging.getLogger(__name__)

Configuration = tuple[str, str, Mapping[str, Any]]
"""(label, strategy, hparams)"""
Choose = Callable[[list[TrialRecord]], Sequence[TrialRecord | Configuration]]
"""Chooses configurations from the finished trials of a search, best first; ValueError = none can be chosen."""


@dataclass(frozen=True)
class Entry:
    """One line of a study's `strategies`."""

    label: str
    """Unique within the study; empty = the strategy's name."""
    strategy: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters that are not searched."""
    preset: str | None = None
    """Published sweep of the strategy that replaces the search."""
    task: str = CLASSIFICATION.task
    """What is learned: spaces, sweeps and the strategy's own meaning depend on it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.strategy)


class Stage(Protocol):
    """Trials that depend on finished ones. Runs in the same Tuner as the search, after it."""

    @property
    def name(self) -> str:
        """For messages."""

    def next(self, history: Sequence[TrialRecord]) -> list[TrialSpec]:
        """The trials of the stage, in order, given all finished trials; called whenever no trial is running.

        Stages are stateless: the caller drops trials that were run before, also by an earlier driver. A stage is over
        once it has no new trial.
        """


@dataclass(frozen=True)
class FoldStage:
    """Leave-one-domain-out: each chosen configuration once per ID domain, trained without that domain."""

    task: SharedTrialSettings
    choose: Choose
    domains: tuple[str, ...]
    seed: int
    """The study's seed; folds use the seed of the search trials, so that only the data differ."""
    name: str = "folds"

    def __post_init__(self) -> None:
        if len(self.domains) < 2:
            raise ValueError(
                f"Leaving one domain out needs at least 2 ID domains, but got {len(self.domains)}: "
                f"{', '.join(self.domains) or 'none'}. List more under data.id, or select by id_val."
            )

    def next(self, history: Sequence[TrialRecord]) -> list[TrialSpec]:
        """Every chosen configuration with every domain held out."""
        searched = [record for record in history if record.role == "search"]
        return [
            trial(self.task, configuration, search_seed(self.seed), "fold", held_out=domain)
            for configuration in _chosen(self, searched)
            for domain in self.domains
        ]


@dataclass(frozen=True)
class ConfirmStage:
    """Confirmation: the chosen configurations on fresh seeds, from which the leaderboard's intervals are computed."""

    task: SharedTrialSettings
    choose: Choose
    seeds: int
    """How many fresh seeds per configuration."""
    seed: int
    """The study's seed."""
    name: str = "confirm"
    deterministic: Callable[[str, Mapping[str, Any]], bool] = lambda strategy, hparams: False
    """(strategy, hparams) → whether all seeds give the same trial: one seed is enough then."""

    def next(self, history: Sequence[TrialRecord]) -> list[TrialSpec]:
        """Seed by seed, so that an interrupted confirmation has covered all configurations equally often."""
        # Without confirmations, whose results would change the choice while the stage runs.
        before = [record for record in history if record.role != "confirm"]
        chosen = _chosen(self, before)
        return [
            trial(self.task, configuration, confirm_seed(self.seed, number), "confirm")
            for number in range(self.seeds)
            for configuration in chosen
            if number == 0 or not self.deterministic(configuration[1], configuration[2])
        ]


def trial(
    task: SharedTrialSettings,
    configuration: Configuration,
    seed: int,
    role: Literal["fold", "confirm", "reference"],
    *,
    held_out: str | None = None,
    sample: str | None = None,
) -> TrialSpec:
    """A trial of a stage: a configuration on a task, with a seed and a role (see `TrialSpec`).

    It is evaluated once, at its end: no scheduler stops it before.
    """
    label, strategy, hparams = configuration
    return TrialSpec(
        shared=dataclasses.replace(task, evaluate_at=(), interim_splits=None),
        strategy=strategy,
        label=label,
        hparams=dict(hparams),
        seed=seed,
        role=role,
        held_out=held_out,
        sample=sample,
    )


def search_seed(seed: int) -> int:
    """Seed of every search trial: one for all, so that configurations differ in nothing else."""
    return stream_seed(seed, "search")


def confirm_seed(seed: int, number: int) -> int:
    """Seed of the confirmation runs with this number (0, 1 …); the search never used it."""
    return stream_seed(seed, "confirm", number)


def _chosen(stage: FoldStage | ConfirmStage, history: list[TrialRecord]) -> list[Configuration]:
    try:
        choices = stage.choose(history)
    except ValueError as error:
        log.warning("Nothing to run for the stage %r: %s", stage.name, error)
        return []
    return [(c.label, c.strategy, c.hparams) if isinstance(c, TrialRecord) else c for c in choices]
