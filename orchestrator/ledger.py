"""The Optuna side of a study: which trials exist, in what state, and what they are worth.

Two Optuna studies share one database. `<name>` holds the trials that the sampler may learn from; `<name>/given` holds
those whose configuration was given to it: folds, confirmations, single points, and (beside a learning sampler) the
papers' sweeps. Optuna's storage is the truth: everything here is rebuilt from it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import event

from orchestrator.records import TrialRecord, declared_metrics
from trainables.core.task import TrialSpec

log = logging.getLogger(__name__)

_STATES: dict[TrialState, Any] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
Identity = tuple[str, int, str, str | None, str | None]
"""(config_hash, seed, role, held_out, sample): what makes a trial the same trial for a resumed study."""


class SearchError(ValueError):
    """The search cannot be run as asked."""


def identity(trial: TrialSpec | TrialRecord) -> Identity:
    """What a resumed study knows a trial by."""
    return trial.config_hash, trial.seed, trial.role, trial.held_out, trial.sample


def _storage(url: str) -> optuna.storages.RDBStorage:
    """Optuna's storage; SQLite with a write-ahead log, so that a commit (some twenty per trial) does not wait for the
    disk and a dashboard may read meanwhile. Killing the driver loses nothing; a power cut may lose the last trials,
    never the file, and what the journal knows of them is joined again by their numbers."""
    if not url.startswith("sqlite"):
        return optuna.storages.RDBStorage(url)
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})

    def prepare(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(storage.engine, "connect", prepare)
    storage.engine.dispose()  # the constructor's connection was opened without
    return storage


class Ledger:
    """All trials of a study in Optuna's storage, and those that run now.

    Args:
        url: Optuna storage, e.g. `sqlite:////abs/study/optuna.db`.
        name: the Optuna study.
        maximise: per objective, whether higher is better.
        contents: what the study is about; a study of this name with other contents is an error.

    Raises:
        SearchError: a study of that name exists with other directions or contents.
    """

    def __init__(self, url: str, name: str, maximise: Sequence[bool], contents: Mapping[str, Any]) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # what a person has to know, Luthier says itself
        self._database = _storage(url)
        self._storage = optuna.storages.get_storage(self._database)
        self.url = url
        self.records: dict[str, TrialRecord] = {}
        """Trials of this and earlier drivers by Tune's id, without those that an earlier driver left unfinished."""
        self.values: dict[str, list[float]] = {}
        """Objectives of complete trials by Tune's id."""
        self.interrupted: dict[Identity, TrialRecord] = {}
        """Trials that an earlier driver left unfinished and that have not been proposed again."""
        self._live: dict[str, Trial] = {}
        self._reported: dict[str, int] = {}
        self._next = 0
        plain = json.loads(json.dumps(contents))
        self.drawn = self._open(name, maximise, plain)
        self.given = self._open(f"{name}/given", maximise, plain)
        for study in (self.drawn, self.given):
            self._read(study)

    @property
    def running(self) -> list[TrialRecord]:
        """Trials that this driver has started and that have not ended."""
        return [self.records[trial_id] for trial_id in self._live]

    @property
    def finished(self) -> list[TrialRecord]:
        """Trials that ended (complete, pruned or failed), in order of their numbers."""
        done = (record for trial_id, record in self.records.items() if trial_id not in self._live)
        return sorted(done, key=lambda record: record.number)

    def start(self, trial_id: str, trial: Trial, spec: TrialSpec) -> TrialRecord:
        """Enter a proposed trial. One that an earlier driver left unfinished gets its old number again."""
        before = self.interrupted.pop(identity(spec), None)
        number = self._next if before is None else before.number
        self._next = max(self._next, number + 1)
        record = TrialRecord(
            trial_id=trial_id,
            number=number,
            strategy=spec.strategy,
            label=spec.label or spec.strategy,
            hparams=dict(spec.hparams),
            seed=spec.seed,
            role=spec.role,
            held_out=spec.held_out,
            sample=spec.sample,
            config_hash=spec.config_hash,
            state="running",
            search_values=dict(trial.params),
        )
        fields = ("number", "strategy", "hparams", "seed", "role", "held_out", "sample")
        trial.set_user_attr("tune_trial_id", trial_id)
        trial.set_user_attr("config_hash", record.config_hash)
        trial.set_user_attr("label", record.label)
        trial.set_user_attr("trial", {key: getattr(record, key) for key in fields})
        self.records[trial_id] = record
        self._live[trial_id] = trial
        return record

    def report(self, trial_id: str, unit: int, value: float) -> None:
        """Keep an intermediate value; a unit that was reported before is ignored."""
        trial = self._live.get(trial_id)
        if trial is not None and unit > self._reported.get(trial_id, -1) and len(trial.study.directions) == 1:
            trial.report(value, unit)
            self._reported[trial_id] = unit

    def end(
        self, trial_id: str, state: TrialState, values: Sequence[float] | None, result: Mapping[str, Any] | None
    ) -> None:
        """Tell Optuna how a trial ended. Unknown or ended trials are ignored."""
        trial = self._live.pop(trial_id, None)
        if trial is None:
            return
        metrics = declared_metrics(result or {})
        trial.set_user_attr("metrics", metrics)
        trial.study.tell(trial, list(values) if values is not None else None, state=state)
        self.records[trial_id] = dataclasses.replace(self.records[trial_id], state=_STATES[state], metrics=metrics)
        if state == TrialState.COMPLETE and values is not None:
            self.values[trial_id] = list(values)

    def duplicate(self, trial: Trial, twin: TrialRecord) -> None:
        """Tell a proposal whose configuration is known already the known value (FAIL where there is none yet)."""
        trial.set_user_attr("duplicate_of", twin.number)
        values = self.values.get(twin.trial_id)
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        trial.study.tell(trial, values, state=state)

    def close(self) -> None:
        """Withdraw the trials that still run: Optuna gets FAIL, and the next driver proposes them again."""
        for trial_id, trial in list(self._live.items()):
            trial.set_user_attr("interrupted", True)
            trial.study.tell(trial, state=TrialState.FAIL)
            del self._live[trial_id]
            del self.records[trial_id]
        self._database.remove_session()
        self._database.engine.dispose()  # folds SQLite's write-ahead log into its one file

    def _open(self, name: str, maximise: Sequence[bool], contents: Mapping[str, Any]) -> optuna.Study:
        directions = [StudyDirection.MAXIMIZE if m else StudyDirection.MINIMIZE for m in maximise]
        study = optuna.create_study(storage=self._storage, study_name=name, load_if_exists=True, directions=directions)
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

    def _read(self, study: optuna.Study) -> None:
        """Take over what an earlier driver left: ended trials as they are, unfinished ones as FAIL, to be repeated."""
        while any(t.state == TrialState.WAITING for t in study.get_trials(deepcopy=False)):
            study.ask()  # a waiting trial cannot be told; asked for, it is a running one
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING:
                self._storage.set_trial_user_attr(trial._trial_id, "interrupted", True)
                study.tell(trial.number, state=TrialState.FAIL)
        for trial in study.get_trials(deepcopy=False):
            self._take_over(trial)

    def _take_over(self, trial: FrozenTrial) -> None:
        attrs = trial.user_attrs
        if "trial" not in attrs or "duplicate_of" in attrs:
            return
        record = TrialRecord(
            trial_id=attrs["tune_trial_id"],
            label=attrs["label"],
            config_hash=attrs["config_hash"],
            state=_STATES[trial.state],
            metrics=attrs.get("metrics", {}),
            search_values=dict(trial.params),
            **attrs["trial"],
        )
        self._next = max(self._next, record.number + 1)
        if attrs.get("interrupted"):
            self.interrupted[identity(record)] = record
            return
        self.interrupted.pop(identity(record), None)
        self.records[record.trial_id] = record
        if trial.state == TrialState.COMPLETE:
            self.values[record.trial_id] = list(trial.values)
