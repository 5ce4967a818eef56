"""Tune's side of pause and promote (`orchestrator.search.promotion`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial

from orchestrator.ray_internals import add_as_paused
from orchestrator.search.entry_scheduler import EntryScheduler, entry_of

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

    from orchestrator.search.promotion import Promotions


class PromotionScheduler(EntryScheduler):
    """Pauses search trials at their rungs and continues those that are promoted.

    Which trial is promoted, and when, is decided where new trials are proposed
    (`orchestrator.search.searcher.StudySearcher.suggest`): a free slot goes to one or the other. A paused trial has no
    process; when it is promoted, it resumes from the newest checkpoint of its own store, which it wrote at the rung.
    Tune's own checkpoint of a paused trial is not needed, and is not made.

    Args:
        promotions: shared with the searcher.
        metric, maximise, epochs, grace, reduction: see `EntryScheduler`.
    """

    def __init__(
        self,
        promotions: Promotions,
        metric: str,
        maximise: bool,
        epochs: int,
        grace: int = 1,
        reduction: float = 3,
    ) -> None:
        super().__init__(metric, maximise, epochs, grace, reduction)
        self._promotions = promotions

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Enter a search trial; one that an earlier run left paused is added to Tune as paused."""
        label = entry_of(trial)
        if label is None:
            return
        number = _number(trial)
        self._promotions.add(number, label)
        if self._promotions.waits(number):
            add_as_paused(trial)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Continue or pause; folds and confirmations always continue."""
        if entry_of(trial) is None:
            return str(self.CONTINUE)
        score = self.score(result)
        if result["unit"] >= self.epochs:
            return str(self.STOP)
        if self._promotions.report(_number(trial), result["unit"], -math.inf if score is None else score):
            return str(self.CONTINUE)
        # PAUSE would have Tune save the trial into a storage of its own first.
        tune_controller.pause_trial(trial, should_checkpoint=False)
        return str(self.NOOP)

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """Enter the end of a trial that ran."""
        if entry_of(trial) is not None:
            self._promotions.end(_number(trial), completed=bool(result.get("finished")))

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Enter the end of a paused trial, or of one that never ran."""
        if entry_of(trial) is not None:
            self._promotions.end(_number(trial))

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """Enter a failed attempt; Tune adds the trial again where it retries it."""
        if entry_of(trial) is not None:
            self._promotions.end(_number(trial))

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        """End the withdrawn trials; return the first new trial, else a promoted one, else None."""
        trials = tune_controller.get_trials()
        for trial in trials:
            if trial.status == Trial.PAUSED and _number(trial) in self._promotions.withdrawn:
                tune_controller.stop_trial(trial)
        pending = (trial for trial in trials if trial.status == Trial.PENDING)
        promoted = (t for t in trials if t.status == Trial.PAUSED and not self._promotions.waits(_number(t)))
        return next(pending, None) or next(promoted, None)

    def debug_string(self) -> str:
        """One line per entry, for Tune's own reporter."""
        return f"Pause and promote per entry\n{self._promotions.describe()}"


def _number(trial: Trial) -> int:
    return int(trial.config["_number"])
