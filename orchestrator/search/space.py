"""Search space of a study: which entries follow a preset, which are searched, and their parameters in Optuna."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.trial import BaseTrial

import search_spaces
from orchestrator.search.paper_sweep import preset_of
from orchestrator.search.sampling import FLAT
from orchestrator.search.stages import Entry
from search_spaces import Preset


class SearchError(ValueError):
    """The search cannot be run as configured."""


class SearchSpace:
    """The entries of a study, split into those that follow a preset and those that the sampler searches.

    Args:
        entries: what competes; their labels are unique.
        sampler: one of `orchestrator.search.sampling.SAMPLERS`.
        allocation: one of `orchestrator.search.allocation.ALLOCATIONS`.

    Raises:
        SearchError: no entries, or two of one label.
        ValueError: an unknown strategy or preset, or an entry that fixes what its preset sweeps.

    Example:
        >>> space = SearchSpace([Entry("", "full"), Entry("", "linear_probe")], "tpe")
        >>> list(space.searched), list(space.presets), space.prescribed
        (['full'], ['linear_probe'], 2)
    """

    def __init__(self, entries: Sequence[Entry], sampler: str, allocation: str = "sampler") -> None:
        repeated = sorted(label for label, n in Counter(e.label for e in entries).items() if n > 1)
        if repeated or not entries:
            got = f"{', '.join(repeated)} twice" if repeated else "no entry"
            raise SearchError(f"A study needs entries with distinct labels, but got {got}. Add or change `label`.")
        self.sampler = sampler
        self.allocation = allocation
        self._is_flat = sampler in FLAT and allocation == "sampler"
        self.entries = {entry.label: entry for entry in entries}
        """Label → entry, in the order of the study."""
        self.presets: dict[str, Preset] = {}
        """Label → preset, of entries that follow a prescribed sequence of points."""
        self.searched: dict[str, Entry] = {}
        """Label → entry, of those that the sampler searches."""
        for entry in entries:
            preset = preset_of(entry, sampler)
            if preset is None:
                self.searched[entry.label] = entry
            else:
                self.presets[entry.label] = preset

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of all entries."""
        return tuple(self.entries)

    @property
    def prescribed(self) -> int:
        """Trials that run regardless of the sampler: default points and whole sweeps."""
        return sum(preset.size for preset in self.presets.values()) + len(self.searched)

    def check_budget(self, trials: int) -> None:
        """Check that a budget covers the prescribed trials.

        Raises:
            SearchError: it does not.
        """
        if trials < self.prescribed:
            raise SearchError(
                f"The default points and sweeps of {', '.join(self.labels)} take {self.prescribed} trials, but "
                f"search.trials is {trials}. Raise it to {self.prescribed} or more, or leave entries out."
            )

    def default(self, entry: Entry) -> dict[str, Any]:
        """Optuna's parameters of an entry's default point (in a flat space, with the defaults of the other entries)."""
        point: dict[str, Any] = {"strategy": entry.label}
        for other in self.searched.values() if self._is_flat else [entry]:
            fixed = set(other.fixed)
            for key, value in search_spaces.default_point(other.strategy, other.fixed, other.task).items():
                if key not in fixed:
                    point[f"{other.label}.{key}"] = value
        return point

    def point(self, entry: Entry, values: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's parameters of a configuration of an entry (in a flat space, with the defaults of the other entries).

        Args:
            entry: one that is searched.
            values: its sampled hyperparameters, by bare name.
        """
        prefix = f"{entry.label}."
        others = {name: value for name, value in self.default(entry).items() if not name.startswith(prefix)}
        return others | {f"{prefix}{key}": value for key, value in values.items()}

    def suggest(self, trial: BaseTrial) -> tuple[Entry, dict[str, Any]]:
        """The entry and hyperparameters of an Optuna trial, suggested by it."""
        label = trial.suggest_categorical("strategy", tuple(self.searched))
        hparams: dict[str, dict[str, Any]] = {}
        # A flat sampler needs every parameter in every trial, also those of entries that this trial does not use.
        for other in self.searched.values() if self._is_flat else [self.searched[label]]:
            hparams[other.label] = search_spaces.suggest(trial, other.strategy, other.label, other.fixed, other.task)
        return self.searched[label], hparams[label]


def space_contents(entries: Sequence[Entry]) -> dict[str, Any]:
    """The entries and their search spaces as JSON, to compare studies."""
    return {
        entry.label: {
            "strategy": entry.strategy,
            "fixed": dict(entry.fixed),
            "preset": entry.preset,
            "space": {
                key: json.loads(distribution_to_json(hyperparameter.distribution))
                for key, hyperparameter in search_spaces.space(entry.strategy, entry.task).items()
            },
        }
        for entry in entries
    }
