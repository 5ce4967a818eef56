"""Optuna's storage made again from the journal, wherever the two disagree: the journal is the truth.

They disagree after most deaths of a driver (Optuna hears of the end of a trial a moment before the journal does), when
the database was deleted, damaged, put back from an old copy or written by an Optuna that this one cannot read, and when
a person allowed a change of what is searched.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from orchestrator.record.folding import fold
from orchestrator.record.records import TrialRecord
from orchestrator.search.sampling import LEARNING
from orchestrator.search.space import SearchSpace

if TYPE_CHECKING:
    from orchestrator.record.journal import Event

log = logging.getLogger("luthier")

Fate = tuple[str, tuple[float, ...]]
"""Name of the Optuna state and the values, of a trial that has ended."""


@dataclass(frozen=True)
class History:
    """What the journal says of the search."""

    records: Sequence[TrialRecord]
    """All trials, by number."""
    repeats: Sequence[Mapping[str, Any]]
    """`proposal_repeated` events."""
    order: Mapping[int, int]
    """Number of a trial → place of its first event in the journal."""
    metrics: Sequence[str]
    """The objectives."""

    @classmethod
    def of(cls, events: Sequence[Event], metrics: Sequence[str]) -> History:
        """From a journal's events."""
        order: dict[int, int] = {}
        for event in events:
            if event["kind"] == "trial_suggested":
                order.setdefault(int(event["number"]), int(event["seq"]))
        return cls(fold(events), [e for e in events if e["kind"] == "proposal_repeated"], order, metrics)

    def agrees(self, drawn: Sequence[FrozenTrial], given: Sequence[FrozenTrial]) -> bool:
        """Whether the storage tells the same story: every trial of the journal is there, every ended one ended the
        same way in both, and the sampler's repetitions are the same ones."""
        every = [trial for trial in (*drawn, *given) if "trial" in trial.user_attrs]
        told = {
            int(trial.user_attrs["trial"]["number"]): _fate(trial)
            for trial in every
            if trial.state.is_finished() and "interrupted" not in trial.user_attrs
        }
        mine = {r.number: self.ended(r) for r in self.records if not r.resumable}
        there = {int(trial.user_attrs["trial"]["number"]) for trial in every}
        repeated = [(t.user_attrs["duplicate_of"], _fate(t)) for t in drawn if "duplicate_of" in t.user_attrs]
        known = [(e["number"], (e["state"], tuple(e["values"] or ()))) for e in self.repeats]
        return told == mine and {r.number for r in self.records} <= there and repeated == known

    def ended(self, record: TrialRecord) -> Fate:
        """What `StudySearcher.on_trial_complete` tells Optuna of a trial that ended so."""
        if record.state == "pruned":
            steps = self.intermediate(record)
            return "PRUNED", (steps[max(steps)],) if steps else ()
        found = [record.metrics.get(f"best/{name}", record.metrics.get(name)) for name in self.metrics]
        values = tuple(value for value in found if value is not None and math.isfinite(value))
        if record.state == "complete" and len(values) == len(found):
            return "COMPLETE", values
        return "FAIL", ()

    def intermediate(self, record: TrialRecord) -> dict[int, float]:
        """Unit → value of the objective, as far as it is finite; empty where there are several objectives."""
        if len(self.metrics) > 1:
            return {}
        values = {int(past["unit"]): past.get(self.metrics[0], math.nan) for past in record.history}
        return {unit: value for unit, value in values.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Replay:
    """The journal's side of a study's Optuna storage.

    Args:
        history: what the journal says.
        searched: what is searched.
    """

    history: History
    searched: SearchSpace

    def fill(self, drawn: optuna.Study, given: optuna.Study) -> None:
        """Enter all trials of the journal into two empty studies, in the order of the journal."""
        entries: list[tuple[int, optuna.Study, FrozenTrial]] = []
        for record in self.history.records:
            space = self.space(record)
            study = given if space is None else drawn
            entries.append((self.history.order[record.number], study, self._trial(record, space or {})))
        for event in self.history.repeats:
            space = self._searched_space(event["search_values"]) or {}
            values, state = event["values"], TrialState[event["state"]]
            trial = create_trial(
                state=state, values=values, params={name: event["search_values"][name] for name in space},
                distributions=space, user_attrs={"duplicate_of": event["number"]},
            )  # fmt: skip
            entries.append((int(event["seq"]), drawn, trial))
        for _, study, trial in sorted(entries, key=lambda entry: entry[0]):
            study.add_trial(trial)

    def space(self, record: TrialRecord) -> dict[str, BaseDistribution] | None:
        """The distributions of a trial's search values, maybe none; None = the sampler must not learn from it: it was
        given to the search, or lies outside of what is searched now."""
        searched, values = self.searched, record.search_values
        if record.role != "search":
            return None
        sweep = searched.sweeps.get(record.label)
        if sweep is None:
            return self._searched_space(values)
        if searched.sampler in LEARNING:
            return None
        choices: dict[str, Sequence[Any]] = {"strategy": searched.labels}
        for step in sweep.preset.steps:
            choices |= {f"{record.label}.{key}": tuple(grid) for key, grid in step.items()}
        return {
            name: CategoricalDistribution(choices[name]) for name in values if values[name] in choices.get(name, ())
        }

    def _searched_space(self, values: Mapping[str, Any]) -> dict[str, BaseDistribution] | None:
        trial = FixedTrial(dict(values))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # Optuna only warns of a value outside of its range
                self.searched.configuration(trial)
        except (ValueError, KeyError, UserWarning):
            return None
        return dict(trial.distributions) if trial.distributions.keys() == values.keys() else None

    def _trial(self, record: TrialRecord, space: Mapping[str, BaseDistribution]) -> FrozenTrial:
        fields = ("number", "strategy", "hparams", "seed", "role", "held_out", "sample")
        attrs: dict[str, Any] = {
            "tune_trial_id": record.trial_id,
            "config_hash": record.config_hash,
            "label": record.label,
            "trial": {name: getattr(record, name) for name in fields},
        }
        state, values = ("FAIL", ()) if record.resumable else self.history.ended(record)
        attrs |= {"interrupted": True} if record.resumable else {"metrics": dict(record.metrics)}
        return create_trial(
            state=TrialState[state],
            values=list(values) or None,
            params={name: record.search_values[name] for name in space},
            distributions=dict(space),
            user_attrs=attrs,
            intermediate_values=self.history.intermediate(record),
        )


def set_aside(database: Path) -> None:
    """Move a SQLite database out of the way, over the one that was moved before."""
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    if database.exists():
        os.replace(database, database.with_name(f"{database.name}.replaced"))


def _fate(trial: FrozenTrial) -> Fate:
    return trial.state.name, tuple(trial.values or ())
