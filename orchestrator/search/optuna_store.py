"""Optuna's storage of a study: opened, checked, and made again from the journal where that knows better.

Two Optuna studies share one database. `<name>` holds the trials that the sampler may learn from; `<name>/given` holds
those whose configuration was given to it: folds, confirmations, single points, and (beside a learning sampler) the
papers' sweeps.

Optuna's storage made again from the journal, wherever the two disagree: the journal is the truth.

They disagree after most deaths of a driver (Optuna hears of the end of a trial a moment before the journal does), when
the database was deleted, damaged, put back from an old copy or written by an Optuna that this one cannot read, and when
a person allowed a change of what is searched.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.record.records import TrialRecord, fold
from orchestrator.search.sampling import LEARNING
from orchestrator.search.space import SearchError, SearchSpace

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


log = logging.getLogger("luthier")

LOCK_SECONDS = 30
"""How long SQLite waits for somebody else's transaction."""


def _storage(url: str) -> optuna.storages.RDBStorage:
    """Optuna's storage; SQLite with a write-ahead log, so that a commit (some twenty per trial) does not wait for the
    disk and a dashboard may read meanwhile. Killing the driver loses nothing; a power cut may lose the last trials,
    never the file, and what the journal knows of them is joined again by their numbers."""
    if not url.startswith("sqlite"):
        return optuna.storages.RDBStorage(url)
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}})

    def prepare(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    sqlalchemy_event.listen(storage.engine, "connect", prepare)
    storage.engine.dispose()  # the constructor's connection was opened without
    return storage


class OptunaStorage:
    """Both studies, open.

    Args:
        url: Optuna storage, e.g. `sqlite:////abs/study/optuna.db`.
        name: the Optuna study.
        maximise: per objective, whether higher is better.
        contents: what the study is about; a study of this name with other contents is an error.
        replay: the journal's side; where the storage disagrees with it, or cannot be read, it is made again.
        changed: a person allowed a change of the contents: then it is made again, too.

    Raises:
        SearchError: a study of that name exists with other directions or contents, or the storage is locked.
    """

    drawn: optuna.Study
    given: optuna.Study

    def __init__(
        self,
        url: str,
        name: str,
        maximise: Sequence[bool],
        contents: Mapping[str, Any],
        replay: Replay | None = None,
        changed: bool = False,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # what a person has to know, Luthier says itself
        self.url, self._name = url, name
        self._directions = [StudyDirection.MAXIMIZE if m else StudyDirection.MINIMIZE for m in maximise]
        self._contents = json.loads(json.dumps(contents))
        self._database: optuna.storages.RDBStorage | None = None
        problem = self._connect(replay, changed)
        if problem is not None and replay is not None:
            log.log(*problem)
            self.close()
            set_aside(Path(url.removeprefix("sqlite:///")))
            self._connect(None, False)
            replay.fill(self.drawn, self.given)

    def interrupt(self, study: optuna.Study, number: int) -> None:
        """End a running trial that nobody runs any more; a later one continues it."""
        trial = study.get_trials(deepcopy=False)[number]
        study._storage.set_trial_user_attr(trial._trial_id, "interrupted", True)
        study.tell(number, state=optuna.trial.TrialState.FAIL)

    def close(self) -> None:
        """Let go of the database; SQLite then folds its write-ahead log into its one file."""
        if self._database is not None:
            self._database.remove_session()
            self._database.engine.dispose()

    def _connect(self, replay: Replay | None, changed: bool) -> tuple[int, str] | None:
        """Open both studies. What is wrong with them, as level and line of the log, if `replay` can mend it."""
        try:
            self._database = _storage(self.url)
            cached = optuna.storages.get_storage(self._database)
            self.drawn, self.given = (self._open(cached, name) for name in (self._name, f"{self._name}/given"))
            if replay is None or replay.history.agrees(
                *(s.get_trials(deepcopy=False) for s in (self.drawn, self.given))
            ):
                return None
            return logging.INFO, f"{self.url} is made again from the journal, which knows better."
        except SearchError as error:
            if not changed:
                raise
            return logging.WARNING, f"{self.url} is made again for the changed study. {error}"
        except (SQLAlchemyError, StorageInternalError, RuntimeError, sqlite3.Error) as error:
            if "locked" in f"{error} {error.__cause__}":
                raise SearchError(
                    f"Optuna's storage is written by one process at a time, but another one holds {self.url}. Close "
                    "the program that writes to it, such as another study or a database browser, and run again."
                ) from error
            if replay is None:
                raise
            reason = str(error).partition("\n")[0]
            return logging.WARNING, f"{self.url} cannot be read ({reason}): it is made again from the journal."

    def _open(self, storage: optuna.storages.BaseStorage, name: str) -> optuna.Study:
        directions, contents = self._directions, self._contents
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, directions=directions)
        if study.directions != directions:
            found, asked = (", ".join(d.name.lower() for d in ds) for ds in (study.directions, directions))
            raise SearchError(
                f"The Optuna study {name!r} at {self.url} has the directions {found}, but this study needs {asked}. "
                "Give the study another name."
            )
        before = study.user_attrs.get("luthier")
        if before is None and study.get_trials(deepcopy=False):
            raise SearchError(
                f"The Optuna study {name!r} at {self.url} was not made by Luthier. Give the study another name."
            )
        if before is None:
            study.set_user_attr("luthier", contents)
        elif before != contents:
            differ = sorted(k for k in {*before, *contents} if before.get(k) != contents.get(k))
            raise SearchError(
                f"The Optuna study {name!r} at {self.url} was made for something else: {', '.join(differ)} "
                f"{'differs' if len(differ) == 1 else 'differ'}. Its trials cannot be compared with new ones. Give the "
                "study another name, or put the old values back."
            )
        return study


def disagreement(url: str, name: str, history: History) -> str | None:
    """What is wrong with the storage of a study, seen from its journal; None = nothing. May write to the database."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = _storage(url)
        studies = [optuna.load_study(study_name=found, storage=storage) for found in (name, f"{name}/given")]
        agrees = history.agrees(*(study.get_trials(deepcopy=False) for study in studies))
        storage.engine.dispose()
    except (SQLAlchemyError, StorageInternalError, RuntimeError, KeyError, sqlite3.Error) as error:
        return f"cannot be read ({str(error).partition(chr(10))[0]})"
    return None if agrees else "does not agree with the journal"
