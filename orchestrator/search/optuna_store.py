"""Optuna's storage of a study, reconciled with the journal (source of truth).

Two Optuna studies share one database. `<name>` holds the trials that the sampler may learn from; `<name>/given` holds
those with a fixed configuration: folds, confirmations, single points, and (beside a learning sampler) published sweeps.

Storage and journal disagree after most crashes of a driver (a trial's end is told to Optuna shortly before it is
journalled), when the database was deleted, damaged, restored from an old copy or written by an incompatible version of
Optuna, and when a change of the search space was allowed. The storage is then rebuilt from the journal.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.record.costs import objective_value
from orchestrator.record.records import TrialRecord, fold
from orchestrator.search.sampling import LEARNING
from orchestrator.search.space import SearchError, SearchSpace

if TYPE_CHECKING:
    from orchestrator.record.journal import Event


log = logging.getLogger("luthier")

FIXED_SUFFIX = "/given"
"""Suffix of the Optuna study with fixed configurations; part of stored studies, so it cannot change."""

FinalState = tuple[str, tuple[float, ...]]
"""Name of Optuna's state, and the objectives, of a trial that has ended."""


@dataclass(frozen=True)
class History:
    """The search as recorded in the journal."""

    records: Sequence[TrialRecord]
    """All trials, by number."""
    repeats: Sequence[Mapping[str, Any]]
    """`proposal_repeated` events."""
    order: Mapping[int, int]
    """Number of a trial → sequence number of its first event."""
    objectives: Sequence[str]
    """As `orchestrator.search.searcher.SearchSettings.objectives`."""
    open: Mapping[int, TrialRecord] = field(default_factory=dict)
    """Number → unfinished search trial that stays RUNNING in Optuna between two drivers."""

    @classmethod
    def of(cls, events: Sequence[Event], objectives: Sequence[str], promotes: bool = False) -> History:
        """From a journal's events.

        Args:
            events: all of them, in order.
            objectives: see the class.
            promotes: whether the study pauses trials (`orchestrator.search.promotion`). A paused trial keeps its place
                among Optuna's trials, in whose order a sampler reads them. Without pauses an unfinished trial gets FAIL
                and is asked for again: with one trial at a time it is the last one anyway.
        """
        order: dict[int, int] = {}
        for event in events:
            if event["kind"] == "trial_suggested":
                order.setdefault(int(event["number"]), int(event["seq"]))
        records = fold(events)
        repeats = [e for e in events if e["kind"] == "proposal_repeated"]
        unfinished = {r.number: r for r in records if promotes and r.role == "search" and r.resumable}
        return cls(records, repeats, order, objectives, unfinished)

    def agrees(self, sampled: Sequence[FrozenTrial], fixed: Sequence[FrozenTrial]) -> bool:
        """Whether Optuna's trials match the journal.

        Every trial of the journal is in the storage, ended trials ended the same way in both, open ones are RUNNING,
        and the duplicate proposals are the same.
        """
        trials = [trial for trial in (*sampled, *fixed) if "trial" in trial.user_attrs]
        stored = {int(trial.user_attrs["trial"]["number"]) for trial in trials}
        stored_ends = {
            int(trial.user_attrs["trial"]["number"]): _final_state(trial)
            for trial in trials
            if trial.state.is_finished() and "interrupted" not in trial.user_attrs
        }
        journal_ends = {r.number: self.ended(r) for r in self.records if not _may_be_repeated(r)}
        stored_repeats = [
            (trial.user_attrs["duplicate_of"], _final_state(trial))
            for trial in sampled
            if "duplicate_of" in trial.user_attrs
        ]
        journal_repeats = [(e["number"], (e["state"], tuple(e["values"] or ()))) for e in self.repeats]
        running = {int(t.user_attrs["trial"]["number"]) for t in trials if t.state == TrialState.RUNNING}
        complete = {r.number for r in self.records} <= stored and self.open.keys() <= running
        return complete and stored_ends == journal_ends and stored_repeats == journal_repeats

    def ended(self, record: TrialRecord) -> FinalState:
        """The final state that `StudySearcher.on_trial_complete` tells Optuna for an ended trial."""
        if record.state == "pruned":
            steps = self.intermediate(record)
            return "PRUNED", (steps[max(steps)],) if steps else ()
        reported = [objective_value(record.metrics, name) for name in self.objectives]
        values = tuple(value for value in reported if value is not None and math.isfinite(value))
        if record.state == "complete" and len(values) == len(reported):
            return "COMPLETE", values
        return "FAIL", ()

    def intermediate(self, record: TrialRecord) -> dict[int, float]:
        """Unit → objective, where finite; empty with several objectives, for which Optuna takes no such values."""
        if len(self.objectives) > 1:
            return {}
        values = {int(past["unit"]): past.get(self.objectives[0], math.nan) for past in record.history}
        return {unit: value for unit, value in values.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Replay:
    """Rebuilds a study's Optuna storage from its journal."""

    history: History
    searched: SearchSpace
    """The present search space."""

    def fill(self, sampled: optuna.Study, fixed: optuna.Study) -> None:
        """Enter all trials of the journal into two empty studies, in the order of the journal."""
        entries: list[tuple[int, optuna.Study, FrozenTrial]] = []
        for record in self.history.records:
            space = self.space(record)
            study = fixed if space is None else sampled
            entries.append((self.history.order[record.number], study, self._trial(record, space or {})))
        for event in self.history.repeats:
            space = self._searched_space(event["search_values"]) or {}
            trial = create_trial(
                state=TrialState[event["state"]],
                values=event["values"],
                params={name: event["search_values"][name] for name in space},
                distributions=space,
                user_attrs={"duplicate_of": event["number"]},
            )
            entries.append((int(event["seq"]), sampled, trial))
        for _, study, trial in sorted(entries, key=lambda entry: entry[0]):
            study.add_trial(trial)

    def space(self, record: TrialRecord) -> dict[str, BaseDistribution] | None:
        """The distributions of a trial's search values, possibly empty.

        None if the sampler must not learn from it: its configuration was fixed, or is outside of the present space.
        """
        searched = self.searched
        values = record.search_values
        if record.role != "search":
            return None
        preset = searched.presets.get(record.label)
        if preset is None:
            return self._searched_space(values)
        if searched.sampler in LEARNING:
            return None
        choices: dict[str, Sequence[Any]] = {"strategy": searched.labels}
        for step in preset.steps:
            choices |= {f"{record.label}.{key}": tuple(grid) for key, grid in step.items()}
        return {
            name: CategoricalDistribution(choices[name]) for name in values if values[name] in choices.get(name, ())
        }

    def _searched_space(self, values: Mapping[str, Any]) -> dict[str, BaseDistribution] | None:
        trial = FixedTrial(dict(values))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # Optuna only warns about a value outside its range
                self.searched.suggest(trial)
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
        state: str = "RUNNING"
        values: tuple[float, ...] = ()
        if _may_be_repeated(record) and record.number not in self.history.open:
            attrs["interrupted"] = True
            state = "FAIL"
        elif not _may_be_repeated(record):
            attrs["metrics"] = dict(record.metrics)
            state, values = self.history.ended(record)
        return create_trial(
            state=TrialState[state],
            values=list(values) or None,
            params={name: record.search_values[name] for name in space},
            distributions=dict(space),
            user_attrs=attrs,
            intermediate_values=self.history.intermediate(record),
        )


def _may_be_repeated(record: TrialRecord) -> bool:
    """Whether a later run may propose the trial again under its number."""
    return record.resumable or record.state == "withdrawn"


def set_aside(database: Path) -> None:
    """Rename a SQLite database to `<name>.replaced`, overwriting an earlier one."""
    # A write-ahead log left behind would be taken for that of the new database.
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)
    if database.exists():
        os.replace(database, database.with_name(f"{database.name}.replaced"))


def _final_state(trial: FrozenTrial) -> FinalState:
    return trial.state.name, tuple(trial.values or ())


LOCK_SECONDS = 30
"""Timeout for another connection's transaction."""


def _storage(url: str) -> optuna.storages.RDBStorage:
    """Optuna's storage; SQLite with a write-ahead log.

    Commits (some twenty per trial) then do not wait for the disk, and a dashboard can read meanwhile. A killed driver
    loses nothing; a power cut may lose the last trials, never the file, and these are rebuilt from the journal.
    """
    if not url.startswith("sqlite"):
        return optuna.storages.RDBStorage(url)
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}})

    def prepare(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    sqlalchemy_event.listen(storage.engine, "connect", prepare)
    storage.engine.dispose()  # the constructor's connection was opened without these settings
    return storage


class OptunaStorage:
    """Both Optuna studies, open.

    Args:
        url: Optuna storage, e.g. `sqlite:////abs/study/optuna.db`.
        name: of the Optuna study.
        maximise: per objective, whether higher is better.
        contents: settings that make trials comparable; a study of this name with other contents is an error.
        replay: rebuilds the storage where it disagrees with the journal or cannot be read; None = there is no journal.
        changed: whether a change of the contents was allowed; the storage is then rebuilt, too.

    Raises:
        SearchError: a study of that name exists with other directions or contents, or the storage is locked.
    """

    sampled: optuna.Study
    """Trials that the sampler may learn from."""
    fixed: optuna.Study
    """Trials with a fixed configuration."""

    def __init__(
        self,
        url: str,
        name: str,
        maximise: Sequence[bool],
        contents: Mapping[str, Any],
        replay: Replay | None = None,
        changed: bool = False,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # Luthier reports what the user needs
        self.url = url
        self._name = name
        self._directions = [StudyDirection.MAXIMIZE if m else StudyDirection.MINIMIZE for m in maximise]
        # As Optuna returns them (tuples become lists), since they are compared with stored ones.
        self._contents = json.loads(json.dumps(contents))
        self._database: optuna.storages.RDBStorage | None = None
        problem = self._connect(replay, changed)
        if problem is not None and replay is not None:
            log.log(*problem)
            self.close()
            set_aside(Path(url.removeprefix("sqlite:///")))
            self._connect(None, False)
            replay.fill(self.sampled, self.fixed)

    def interrupt(self, study: optuna.Study, number: int) -> None:
        """End a running trial whose driver is gone; a later trial continues it."""
        assert self._database is not None
        study_id = self._database.get_study_id_from_name(study.study_name)
        trial_id = self._database.get_trial_id_from_study_id_trial_number(study_id, number)
        self._database.set_trial_user_attr(trial_id, "interrupted", True)
        study.tell(number, state=TrialState.FAIL)

    def running_trial(self, study: optuna.Study, number: int) -> optuna.trial.Trial:
        """A RUNNING trial of an earlier driver, to report to and to end."""
        assert self._database is not None
        study_id = self._database.get_study_id_from_name(study.study_name)
        return optuna.trial.Trial(study, self._database.get_trial_id_from_study_id_trial_number(study_id, number))

    def close(self) -> None:
        """Close the database; SQLite then checkpoints its write-ahead log into the database file."""
        if self._database is not None:
            self._database.remove_session()
            self._database.engine.dispose()

    def _connect(self, replay: Replay | None, changed: bool) -> tuple[int, str] | None:
        """Open both studies; returns a problem that `replay` can mend, else None.

        The problem is a log level and a message.
        """
        try:
            self._database = _storage(self.url)
            # Adds Optuna's cache, so that a trial that has ended is read from the database once.
            cached = optuna.storages.get_storage(self._database)
            self.sampled = self._open(cached, self._name)
            self.fixed = self._open(cached, f"{self._name}{FIXED_SUFFIX}")
            if replay is None or _agrees(replay.history, self.sampled, self.fixed):
                return None
            return logging.INFO, f"{self.url} is rebuilt from the journal, with which it disagrees."
        except SearchError as error:
            if not changed:
                raise
            return logging.WARNING, f"{self.url} is rebuilt for the changed study. {error}"
        except (SQLAlchemyError, StorageInternalError, RuntimeError, sqlite3.Error) as error:
            if "locked" in f"{error} {error.__cause__}":
                raise SearchError(
                    f"Optuna's storage is written by one process at a time, but another one holds {self.url}. Close "
                    "the program that writes to it, such as another study or a database browser, and run again."
                ) from error
            if replay is None:
                raise
            reason = str(error).partition("\n")[0]
            return logging.WARNING, f"{self.url} cannot be read ({reason}): it is rebuilt from the journal."

    def _open(self, storage: optuna.storages.BaseStorage, name: str) -> optuna.Study:
        directions = self._directions
        contents = self._contents
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, directions=directions)
        if study.directions != directions:
            raise SearchError(
                f"The Optuna study {name!r} at {self.url} has the directions {_names(study.directions)}, but this "
                f"study needs {_names(directions)}. Give the study another name."
            )
        before = study.user_attrs.get("luthier")
        if before is None and study.get_trials(deepcopy=False):
            raise SearchError(
                f"The Optuna study {name!r} at {self.url} was not made by Luthier. Give the study another name."
            )
        if before is None:
            study.set_user_attr("luthier", contents)
        elif before != contents:
            keys = sorted(k for k in {*before, *contents} if before.get(k) != contents.get(k))
            raise SearchError(
                f"The Optuna study {name!r} at {self.url} was made for something else: {', '.join(keys)} "
                f"{'differs' if len(keys) == 1 else 'differ'}. Its trials cannot be compared with new ones. Give the "
                "study another name, or put the old values back."
            )
        return study


def disagreement(url: str, name: str, history: History) -> str | None:
    """How a study's storage disagrees with its journal; None = it agrees.

    May write to the database.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = _storage(url)
        sampled = optuna.load_study(study_name=name, storage=storage)
        fixed = optuna.load_study(study_name=f"{name}{FIXED_SUFFIX}", storage=storage)
        agrees = _agrees(history, sampled, fixed)
        storage.engine.dispose()
    except (SQLAlchemyError, StorageInternalError, RuntimeError, KeyError, sqlite3.Error) as error:
        return f"cannot be read ({str(error).partition(chr(10))[0]})"
    return None if agrees else "does not agree with the journal"


def _agrees(history: History, sampled: optuna.Study, fixed: optuna.Study) -> bool:
    return history.agrees(sampled.get_trials(deepcopy=False), fixed.get_trials(deepcopy=False))


def _names(directions: Sequence[StudyDirection]) -> str:
    return ", ".join(direction.name.lower() for direction in directions)
