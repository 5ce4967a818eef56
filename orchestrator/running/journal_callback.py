"""From Tune's events to the journal and the progress display. Nothing here may raise or block: any exception in a Tune
callback stops the whole experiment. Just that has to happen where the journal cannot be written: trials that went on
would have results that nobody ever hears of; stopped now, each of them says its last one again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune import Callback

from orchestrator.record.checkpoints import discard
from orchestrator.record.journal import Journal, JournalWriteError
from orchestrator.record.records import INTERRUPTED, RESUMED, declared_metrics, fold, interruption, unfinished
from orchestrator.running.failure_policy import classify, error_line
from orchestrator.running.progress import Progress

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

logger = logging.getLogger("luthier")


def _never_raises(hook: Callable[..., None]) -> Callable[..., None]:
    """Turn any exception of a hook, but that of a journal that takes no event, into an entry of `problems` and one line
    of the log."""

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
    """Writes every event of a Tune experiment to the journal and shows it.

    Each trial's `config` is a `TrialSpec.to_dict()` plus `_number`. Trials that the searcher has not announced in the
    journal are announced when they start. A trial that ends without a result with `finished=True` was stopped by the
    scheduler: `pruned`. At the end of the experiment every trial still open (time budget, Ctrl-C: Tune says nothing
    about those) is closed as `interrupted`.

    A result with `failure` (a traceback) ends a trial as failed. A unit that is known already, with the same numbers,
    is not written again: a trial that goes on from a checkpoint says that one's result once more.

    Args:
        journal: the study's journal, shared with the searcher.
        progress: where to show the events; None = nowhere.
        folder: the study's; checkpoints of trials that have ended are removed from it. None = there are none.
        verdicts: trial id → why the watchdog killed its process; taken out as failures are recorded.
        errors: trial id → what Tune says of its last failure.
    """

    def __init__(
        self,
        journal: Journal,
        progress: Progress | None = None,
        folder: Path | None = None,
        verdicts: dict[str, str] | None = None,
        errors: Mapping[str, str] | None = None,
    ) -> None:
        self.journal, self.folder = journal, folder
        self._verdicts = {} if verdicts is None else verdicts
        self._errors = {} if errors is None else errors
        if progress is not None:
            journal.subscribe(progress.event)
        self.problems: list[str] = []
        """What could not be recorded; empty after a healthy run."""
        self._finished: dict[str, bool] = {}
        self._failures: dict[str, str] = {}
        self._known = {record.number: list(record.history) for record in fold(journal.events())}
        self._placed: set[str] = set()

    @_never_raises
    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial begins, or begins again after a failure or a pause."""
        if not self.journal.knows(trial.trial_id):
            self.journal.append("trial_suggested", **_announcement(trial))
        self._placed.discard(trial.trial_id)
        self.journal.append("trial_started", trial_id=trial.trial_id, node=None, pid=None)

    @_never_raises
    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: Mapping[str, Any], **info: Any
    ) -> None:
        """One unit of budget is done, or the trial failed."""
        for problem in result.get("checkpoint_problems") or ():
            self.journal.append("checkpoint_problem", trial_id=trial.trial_id, problem=problem)
            logger.warning("A checkpoint of %s: %s", trial, problem)
        if "failure" in result:
            self._failures[trial.trial_id] = str(result["failure"])
            return
        self._finished[trial.trial_id] = bool(result.get("finished"))
        unit, metrics = int(result.get("unit") or result["training_iteration"]), declared_metrics(result)
        known = self._known.setdefault(trial.config.get("_number", trial.trial_id), [])
        if any(past["unit"] == unit and _same(past, metrics) for past in known):
            return
        where: dict[str, Any] = {}
        if trial.trial_id not in self._placed:  # Tune knows node and process only from the first result on
            where = {"node": result.get("hostname") or result.get("node_ip"), "pid": result.get("pid")}
            self._placed.add(trial.trial_id)
        if curves := result.get("curves"):
            where["curves"] = curves
        self.journal.append("result", trial_id=trial.trial_id, unit=unit, metrics=metrics, **where)
        known.append({"unit": float(unit), **metrics})

    @_never_raises
    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial used its budget, or the scheduler stopped it, or it said that it failed."""
        failure = self._failures.pop(trial.trial_id, None)
        if failure is not None:
            self._failed(trial, {"reason": classify(failure), "error": error_line(failure)})
            return
        finished = self._finished.get(trial.trial_id, bool((trial.last_result or {}).get("finished")))
        self.journal.append("trial_finished", trial_id=trial.trial_id, state="complete" if finished else "pruned")
        self._discard(trial)

    @_never_raises
    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed and will be tried again."""
        self.journal.append("trial_retried", trial_id=trial.trial_id, **self._why(trial))

    @_never_raises
    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""
        self._failed(trial, self._why(trial))

    @_never_raises
    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Close what Tune left open."""
        close_open_trials(self.journal)

    def _why(self, trial: Trial) -> dict[str, Any]:
        verdict = self._verdicts.pop(trial.trial_id, None)
        if verdict is not None:
            return {"reason": "stalled", "error": verdict}
        text = self._errors.get(trial.trial_id, "")
        return {"reason": classify(text), "error": error_line(text)}

    def _failed(self, trial: Trial, why: dict[str, Any]) -> None:
        self.journal.append("trial_failed", trial_id=trial.trial_id, **why)
        if why["reason"] not in RESUMED:
            self._discard(trial)

    def _discard(self, trial: Trial) -> None:
        if self.folder is not None and "_number" in trial.config:
            discard(self.folder, int(trial.config["_number"]))


def close_open_trials(journal: Journal) -> list[dict[str, Any]]:
    """Mark every trial that is suggested or running as interrupted and return the events. Called at the end of an
    experiment, and before a study is continued whose driver died without a word."""
    open_trials = [record for record in unfinished(journal.events()) if record.reason != INTERRUPTED]
    return [journal.append("trial_failed", **interruption(record)) for record in open_trials]


def _same(past: Mapping[str, Any], metrics: Mapping[str, float]) -> bool:
    """Whether a unit was measured to be the same before, its costs aside; NaN is the same as NaN."""
    names = {name for name in {*past, *metrics} - {"unit"} if not name.startswith("cost/")}
    return all(repr(past.get(name)) == repr(metrics.get(name)) for name in names)


def _announcement(trial: Trial) -> dict[str, Any]:
    from trainables.specs.trial_spec import TrialSpec

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
