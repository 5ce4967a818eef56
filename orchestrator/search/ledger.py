"""Ledger of a study's trials: their states and objectives, in step with Optuna.

Rebuilt from Optuna's storage (orchestrator/search/optuna_store.py), which in turn is reconciled with the journal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from orchestrator.record.records import TrialRecord, declared_metrics
from orchestrator.search.optuna_store import OptunaStorage
from orchestrator.search.space import SearchError
from trainables.specs.trial_spec import TrialSpec

if TYPE_CHECKING:
    from orchestrator.record.journal import Journal

__all__ = ["Identity", "Ledger", "SearchError", "identity"]

_STATES: dict[TrialState, Any] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
Identity = tuple[str, int, str, str | None, str | None]
"""(config_hash, seed, role, held_out, sample): equal for a trial and its resumed run."""


def identity(trial: TrialSpec | TrialRecord) -> Identity:
    """The key by which a resumed study recognises a trial."""
    return trial.config_hash, trial.seed, trial.role, trial.held_out, trial.sample


class Ledger:
    """All trials of a study in Optuna's storage, and those that run now.

    Args:
        storage: Optuna's.
        journal: journals duplicate proposals, which `Replay` needs.
        open_trials: `History.open` of the storage; None = the study pauses no trials, and unfinished ones do not stay
            RUNNING in Optuna.
    """

    def __init__(
        self,
        storage: OptunaStorage,
        journal: Journal | None = None,
        open_trials: Mapping[int, TrialRecord] | None = None,
    ) -> None:
        self._storage = storage
        self._journal = journal
        self.records: dict[str, TrialRecord] = {}
        """Trials of this and earlier drivers by Tune's id, without the unfinished ones of earlier drivers."""
        self.values: dict[str, list[float]] = {}
        """Objectives of complete trials by Tune's id."""
        self.interrupted: dict[Identity, TrialRecord] = {}
        """Unfinished trials of earlier drivers that have not been proposed again."""
        self.open: dict[int, TrialRecord] = {}
        """Number → unfinished trial of an earlier driver that is RUNNING in Optuna and not in Tune yet."""
        self.sampled = storage.sampled
        """Optuna study of the trials that the sampler may learn from."""
        self.fixed = storage.fixed
        """Optuna study of the trials whose configuration was fixed."""
        self._reported: dict[Identity, dict[int, float]] = {}
        """Interrupted trial → unit → objective."""
        self._keeps_open = open_trials is not None
        self._open_trials = open_trials or {}
        self._optuna_trials: dict[int, tuple[Trial, int]] = {}
        """Those of `open`, each with the last unit that Optuna has a value of."""
        self._live: dict[str, Trial] = {}
        self._last_unit: dict[str, int] = {}
        self._next = 0
        for study in (self.sampled, self.fixed):
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
        """Enter a proposed trial; an unfinished trial of an earlier driver keeps its number."""
        interrupted = self.interrupted.pop(identity(spec), None)
        number = self._next if interrupted is None else interrupted.number
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
        if interrupted is not None:  # resumed: report its intermediate values from the first unit
            for unit, value in self._reported.pop(identity(spec), {}).items():
                self.report(trial_id, unit, value)
        return record

    def reopen(self, trial_id: str, number: int) -> TrialRecord:
        """Enter a trial of `open` again, under Tune's new id."""
        record = dataclasses.replace(self.open.pop(number), trial_id=trial_id, state="running")
        trial, self._last_unit[trial_id] = self._optuna_trials.pop(number)
        trial.set_user_attr("tune_trial_id", trial_id)
        self.records[trial_id] = record
        self._live[trial_id] = trial
        return record

    def pause(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Keep the metrics of a trial that pauses, should it end without another result."""
        record = self.records[trial_id]
        self.records[trial_id] = dataclasses.replace(record, metrics=declared_metrics(result))

    def report(self, trial_id: str, unit: int, value: float) -> None:
        """Report an intermediate value to Optuna; a unit that was reported before is ignored."""
        trial = self._live.get(trial_id)
        # With several objectives Optuna accepts no intermediate values.
        if trial is not None and unit > self._last_unit.get(trial_id, -1) and len(trial.study.directions) == 1:
            trial.report(value, unit)
            self._last_unit[trial_id] = unit

    def end(
        self, trial_id: str, state: TrialState, values: Sequence[float] | None, result: Mapping[str, Any] | None
    ) -> None:
        """Tell Optuna how a trial ended. Unknown or ended trials are ignored."""
        trial = self._live.pop(trial_id, None)
        if trial is None:
            return
        # A trial that ends while it is paused has no new result.
        metrics = declared_metrics(result) if result else dict(self.records[trial_id].metrics)
        # Before `tell`: Optuna accepts no attributes of a trial that has ended.
        trial.set_user_attr("metrics", metrics)
        trial.study.tell(trial, list(values) if values is not None else None, state=state)
        self.records[trial_id] = dataclasses.replace(self.records[trial_id], state=_STATES[state], metrics=metrics)
        if state == TrialState.COMPLETE and values is not None:
            self.values[trial_id] = list(values)

    def duplicate(self, trial: Trial, twin: TrialRecord) -> None:
        """Tell Optuna the objectives of the earlier trial that a proposal repeats.

        FAIL if it has none yet.
        """
        trial.set_user_attr("duplicate_of", twin.number)
        values = self.values.get(twin.trial_id)
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        if self._journal is not None:
            self._journal.append(
                "proposal_repeated",
                number=twin.number,
                search_values=dict(trial.params),
                values=values,
                state=state.name,
            )
        trial.study.tell(trial, values, state=state)

    def close(self) -> None:
        """Withdraw the running trials: Optuna gets FAIL, and the next driver proposes them again.

        Search trials of a study that pauses trials stay RUNNING.
        """
        for trial_id, trial in list(self._live.items()):
            if not (self._keeps_open and self.records[trial_id].role == "search"):
                trial.set_user_attr("interrupted", True)
                trial.study.tell(trial, state=TrialState.FAIL)
            del self._live[trial_id]
            del self.records[trial_id]
        self._storage.close()

    def _read(self, study: optuna.Study) -> None:
        """Take over the trials of earlier drivers.

        Ended ones as they are, unfinished ones as FAIL, to be repeated.
        """
        while any(t.state == TrialState.WAITING for t in study.get_trials(deepcopy=False)):
            study.ask()  # Optuna cannot end a waiting trial, only a running one
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING and not self._is_open(trial):
                self._storage.interrupt(study, trial.number)
        for trial in study.get_trials(deepcopy=False):
            if self._is_open(trial):
                self._keep_open(study, trial)
            else:
                self._take_over(trial)

    def _is_open(self, trial: FrozenTrial) -> bool:
        number = trial.user_attrs.get("trial", {}).get("number")
        return trial.state == TrialState.RUNNING and number in self._open_trials

    def _keep_open(self, study: optuna.Study, trial: FrozenTrial) -> None:
        number = int(trial.user_attrs["trial"]["number"])
        self.open[number] = self._open_trials[number]
        # Of a driver that died between Optuna's entry and the journal's.
        self.interrupted.pop(identity(self.open[number]), None)
        last_unit = max(trial.intermediate_values, default=-1)
        self._optuna_trials[number] = self._storage.running_trial(study, trial.number), last_unit
        self._next = max(self._next, number + 1)

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
            self._reported[identity(record)] = dict(sorted(trial.intermediate_values.items()))
            return
        self.interrupted.pop(identity(record), None)
        self.records[record.trial_id] = record
        if trial.state == TrialState.COMPLETE:
            self.values[record.trial_id] = list(trial.values)
