"""The space of a study: which entries are swept, which are searched, and what an Optuna trial over them means."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.trial import BaseTrial

import search_spaces
from orchestrator.search.paper_sweep import Sweep, sweep_of
from orchestrator.search.sampling import FLAT
from orchestrator.search.stages import Entry, search_seed
from trainables.specs.trial_spec import Task, TrialSpec


class SearchError(ValueError):
    """The search cannot be run as asked."""


class SearchSpace:
    """The entries of a study as the sampler sees them.

    Args: see `orchestrator.search.searcher.StudySearcher`; `maximise` is per objective.

    Raises:
        SearchError: no entries, or two of one label.
        ValueError: an unknown strategy or preset.
    """

    def __init__(self, entries: Sequence[Entry], task: Task, sampler: str, seed: int, maximise: Sequence[bool]) -> None:
        repeated = sorted(label for label, n in Counter(e.label for e in entries).items() if n > 1)
        if repeated or not entries:
            got = f"{', '.join(repeated)} twice" if repeated else "no entry"
            raise SearchError(f"A study needs entries with distinct labels, but got {got}. Add or change `label`.")
        self.task, self.sampler, self.seed = task, sampler, seed
        self.labels = tuple(entry.label for entry in entries)
        self.sweeps: dict[str, Sweep] = {}
        """Label → sweep, of entries that follow a given sequence of points."""
        self.searched: dict[str, Entry] = {}
        """Label → entry, of those that the sampler searches."""
        for entry in entries:
            sweep = sweep_of(entry, sampler, task, maximise[0])
            if sweep is None:
                self.searched[entry.label] = entry
            else:
                self.sweeps[entry.label] = sweep

    @property
    def given(self) -> int:
        """Trials that are run whatever the sampler thinks: default points and whole sweeps."""
        return sum(sweep.preset.size for sweep in self.sweeps.values()) + len(self.searched)

    def check_budget(self, trials: int) -> None:
        """Whether a budget holds the given trials.

        Raises:
            SearchError: it does not.
        """
        if trials < self.given:
            raise SearchError(
                f"The default points and sweeps of {', '.join(self.labels)} take {self.given} trials, but "
                f"search.trials is {trials}. Raise it to {self.given} or more, or leave entries out."
            )

    def default(self, entry: Entry) -> dict[str, Any]:
        """Optuna's parameters of an entry's default point (under a flat space with the others' defaults beside)."""
        point: dict[str, Any] = {"strategy": entry.label}
        for other in self.searched.values() if self.sampler in FLAT else [entry]:
            fixed = set(other.fixed)
            for key, value in search_spaces.default_point(other.strategy, other.fixed).items():
                if key not in fixed:
                    point[f"{other.label}.{key}"] = value
        return point

    def configuration(self, trial: BaseTrial) -> TrialSpec:
        """The search trial that an Optuna trial means; asks it for entry and values."""
        label = trial.suggest_categorical("strategy", tuple(self.searched))
        drawn: dict[str, dict[str, Any]] = {}
        for other in self.searched.values() if self.sampler in FLAT else [self.searched[label]]:
            drawn[other.label] = search_spaces.suggest(trial, other.strategy, other.label, other.fixed)
        entry = self.searched[label]
        return TrialSpec(
            task=self.task,
            strategy=entry.strategy,
            label=label,
            hparams=drawn[label],
            seed=search_seed(self.seed),
        )


def space_contents(entries: Sequence[Entry]) -> dict[str, Any]:
    """What the entries search, as JSON, to tell studies apart."""
    return {
        entry.label: {
            "strategy": entry.strategy,
            "fixed": dict(entry.fixed),
            "preset": entry.preset,
            "space": {
                key: json.loads(distribution_to_json(hyperparameter.distribution))
                for key, hyperparameter in search_spaces.space(entry.strategy).items()
            },
        }
        for entry in entries
    }
