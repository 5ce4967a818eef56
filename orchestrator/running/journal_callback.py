"""Tune callback that journals every event of a run.

Callbacks must not raise, because Tune then aborts the experiment, nor block. The exception is a journal that cannot be
written: continuing would lose results, while trials re-report their last result when they are resumed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune import Callback

from orchestrator.record.checkpoints import discard
from orchestrator.record.journal import Journal, JournalWriteError
from orchestrator.record.kept_files import Retention, discard_kept
from orchestrator.record.records import (
    INTERRUPTED,
    RESUMED,
    LiveRecords,
    declared_metrics,
    fold,
    interruption,
    unfinished,
)
from orchestrator.running.failure_policy import classify, error_line
from orchestrator.running.progress import Progress
from trainables.specs.metrics import is_cost
from trainables.specs.trial_spec import TrialSpec

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

    from orchestrator.search.promotion import Promotions

logger = logging.getLogger("luthier")


def _never_raises(hook: Callable[..., None]) -> Callable[..., None]:
    """Turn an exception of a hook into a problem and a line of the log.

    `JournalWriteError` passes.
    """

    @functools.wraps(hook)
    def guarded(self: RecordCallback, *args: Any, **kwargs: Any) -> None:
        try:
            hook(self, *args, **kwargs)
        except JournalWriteError:
            raise
        except Exception as error:
            problem = f"{hook.__name__}: {type(error).__name__}: {error}"
            if problem not in self.problems:
                logger.error("The record of the study is incomplete (%s)", problem)
            self.problems.append(problem)

    return guarded


class RecordCallback(Callback):  # type: ignore[misc]  # ray is untyped
    """Journals every event of a Tune experiment.

    Each trial's `config` is a `TrialSpec.to_dict()` plus `_number`. A trial that the searcher has not journalled is
    journalled when it starts. A trial that ends without a result with `finished=True` was stopped by the scheduler:
    `pruned`. At the end of the experiment every trial still open (Ctrl-C: Tune calls no hook for those) is closed as
    `interrupted`; paused ones stay paused, for they have no process that could have been interrupted.

    A result with `failure` (a traceback) ends a trial as failed. A unit that the journal has with the same metrics is
    not written again: resumed trials re-report the result of their checkpoint.

    Args:
        journal: the study's journal, shared with the searcher.
        progress: the display of the events; None = none.
        folder: of the study; checkpoints of trials that have ended are removed from it. None = there are none.
        verdicts: trial id → why the watchdog killed its process; removed as failures are recorded.
        errors: trial id → text of its last failure in Tune.
        retention: whose weights and predictions are retained; None = nothing is removed.
        promotions: which trials are paused; None = no trial ever is.
    """

    def __init__(
        self,
        journal: Journal,
        progress: Progress | None = None,
        folder: Path | None = None,
        verdicts: dict[str, str] | None = None,
        errors: Mapping[str, str] | None = None,
        retention: Retention | None = None,
        promotions: Promotions | None = None,
    ) -> None:
        self.journal = journal
        self.folder = folder
        self._verdicts = {} if verdicts is None else verdicts
        self._errors = {} if errors is None else errors
        self._retention = retention
        self._promotions = promotions
        if progress is not None:
            journal.subscribe(progress.event)
        self.problems: list[str] = []
        """Events that could not be journalled, as error texts; empty after a healthy run."""
        self._finished: dict[str, bool] = {}
        self._failures: dict[str, str] = {}
        self._records = LiveRecords(journal.events())
        journal.subscribe(self._records.add)
        self._histories = {record.number: list(record.history) for record in self._records.all()}
        self._located: set[str] = set()
        """Trials whose present attempt has its node and process in the journal."""

    @_never_raises
    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record that an attempt of a trial starts, or that a paused trial continues."""
        if not self.journal.knows(trial.trial_id):
            self.journal.append("trial_suggested", **_announcement(trial))
        # A retry may run on another machine.
        self._located.discard(trial.trial_id)
        record = self._records.get(trial.trial_id)
        if record is not None and record.state == "paused":
            self.journal.append("trial_promoted", trial_id=trial.trial_id)
        else:
            self.journal.append("trial_started", trial_id=trial.trial_id, node=None, pid=None)

    @_never_raises
    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Record a unit of budget, or keep the traceback of a trial that failed."""
        for problem in result.get("checkpoint_problems") or ():
            self.journal.append("checkpoint_problem", trial_id=trial.trial_id, problem=problem)
            logger.warning("A checkpoint of %s: %s", trial, problem)
        if "failure" in result:
            self._failures[trial.trial_id] = str(result["failure"])
            return
        self._finished[trial.trial_id] = bool(result.get("finished"))
        self._record_result(trial, result)
        # Tune has no hook for it; the scheduler has decided before this hook is called.
        if self._promotions is not None and self._promotions.waits(trial.config.get("_number", -1)):
            self.journal.append("trial_paused", trial_id=trial.trial_id)

    @_never_raises
    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the end of a trial that Tune takes for complete.

        It used its budget, was stopped by the scheduler, or reported a failure.
        """
        # An error that no retry cures is returned as a result, which Tune takes for the trial's last one.
        failure = self._failures.pop(trial.trial_id, None)
        if failure is not None:
            self._failed(trial, {"reason": classify(failure), "error": error_line(failure)})
            return
        finished = self._finished.get(trial.trial_id, bool((trial.last_result or {}).get("finished")))
        self.journal.append("trial_finished", trial_id=trial.trial_id, state="complete" if finished else "pruned")
        # After the event: without it a repeated run resumes from these checkpoints.
        self._discard(trial)
        self._discard_superseded()

    @_never_raises
    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record a failed attempt that Tune retries."""
        self.journal.append("trial_retried", trial_id=trial.trial_id, **self._reason(trial))

    @_never_raises
    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record a trial that has no retry left."""
        self._failed(trial, self._reason(trial))

    @_never_raises
    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Close the trials that Tune left open."""
        close_open_trials(self.journal)

    def _record_result(self, trial: Trial, result: Mapping[str, Any]) -> None:
        unit = int(result.get("unit") or result["training_iteration"])
        metrics = declared_metrics(result)
        history = self._histories.setdefault(trial.config.get("_number", trial.trial_id), [])
        # Costs are left out of the comparison: they differ where a resumed trial repeats the unit itself.
        if any(past["unit"] == unit and _same(past, metrics) for past in history):
            return
        details: dict[str, Any] = {}
        if trial.trial_id not in self._located:  # node and process are in the results of an attempt, not in its start
            details = {"node": result.get("hostname") or result.get("node_ip"), "pid": result.get("pid")}
            self._located.add(trial.trial_id)
        details |= {kind: result[kind] for kind in ("curves", "weights", "predictions") if result.get(kind)}
        self.journal.append("result", trial_id=trial.trial_id, unit=unit, metrics=metrics, **details)
        history.append({"unit": float(unit), **metrics})

    def _reason(self, trial: Trial) -> dict[str, Any]:
        verdict = self._verdicts.pop(trial.trial_id, None)
        if verdict is not None:
            return {"reason": "stalled", "error": verdict}
        text = self._errors.get(trial.trial_id, "")
        return {"reason": classify(text), "error": error_line(text)}

    def _failed(self, trial: Trial, reason: dict[str, Any]) -> None:
        self.journal.append("trial_failed", trial_id=trial.trial_id, **reason)
        if reason["reason"] not in RESUMED:
            self._discard(trial)

    def _discard_superseded(self) -> None:
        """Remove weights and predictions that are no longer retained.

        The trial that is better has its end in the journal by now: a driver killed in between removes them at its next
        start.
        """
        if self.folder is None or self._retention is None:
            return
        for record in self._retention.superseded(self._records.all()):
            if record.weights is not None or record.predictions is not None:
                # Before the removal: a record never lists files that are gone.
                self.journal.append("weights_discarded", trial_id=record.trial_id, why="superseded")
                discard_kept(self.folder, record.number)

    def _discard(self, trial: Trial) -> None:
        if self.folder is not None and "_number" in trial.config:
            discard(self.folder, int(trial.config["_number"]))


def close_open_trials(journal: Journal) -> list[dict[str, Any]]:
    """Mark every suggested or running trial as interrupted and return the events; paused trials stay paused.

    Called at the end of an experiment, and before a study is continued whose driver crashed.
    """
    open_trials = [r for r in unfinished(journal.events()) if r.reason != INTERRUPTED and r.state != "paused"]
    return [journal.append("trial_failed", **interruption(record)) for record in open_trials]


def withdraw_trials(journal: Journal, folder: Path) -> None:
    """Withdraw the interrupted trials that the present run, now complete, has not asked for.

    Their checkpoints are removed, and those of trials that failed from infrastructure and were not asked for either.
    """
    proposed: set[int] = set()
    for event in journal.events():
        if event["kind"] == "study_started":
            proposed = set()
        elif event["kind"] == "trial_suggested":
            proposed.add(int(event["number"]))
    for record in fold(journal.events()):
        if record.resumable and record.number not in proposed:
            if record.unfinished:
                journal.append("trial_withdrawn", trial_id=record.trial_id)
            discard(folder, record.number)


def _same(past: Mapping[str, Any], metrics: Mapping[str, float]) -> bool:
    """Whether two results of a unit are equal, but for its costs; NaN equals NaN."""
    names = {name for name in {*past, *metrics} - {"unit"} if not is_cost(name)}
    # By `repr`, since NaN differs from itself.
    return all(repr(past.get(name)) == repr(metrics.get(name)) for name in names)


def _announcement(trial: Trial) -> dict[str, Any]:
    config = trial.config
    spec = TrialSpec.from_dict(config)
    return {
        "trial_id": trial.trial_id,
        "number": int(config["_number"]),
        "strategy": spec.strategy,
        "label": spec.label or spec.strategy,
        "hparams": dict(spec.hparams),
        "seed": spec.seed,
        "role": spec.role,
        "held_out": spec.held_out,
        "sample": spec.sample,
        "config_hash": spec.config_hash,
        "search_values": {},
    }
