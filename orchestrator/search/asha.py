"""Early stopping by asynchronous successive halving (ASHA) among the trials of one entry.

Li et al. (2020), "A System for Massively Parallel Hyperparameter Tuning", MLSys, algorithm 2, in the form in which Ray
Tune has it: a trial that reaches a rung below the (1 − 1/η) quantile of those that reached it before is stopped, rather
than held until others have been promoted past it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.search.entry_scheduler import EntryScheduler, entry_of
from orchestrator.search.rungs import milestones

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

    from orchestrator.record.records import TrialRecord


class EntryRungs:
    """Rungs of one entry: each trial's score at each rung; higher is better.

    Args:
        epochs: units of a full trial.
        grace: the first rung.
        reduction: η.
    """

    def __init__(self, epochs: int, grace: float, reduction: float) -> None:
        self._quantile = 1 - 1 / reduction
        self._scores: dict[float, dict[str, float]] = {
            # Highest rung first, as `report` needs them.
            milestone: {}
            for milestone in reversed(milestones(epochs, grace, reduction))
        }

    def cutoff(self, milestone: float) -> float | None:
        """The score below which a trial is stopped at a rung; None = no score yet."""
        scores = self._scores[milestone]
        if not scores:
            return None
        # numpy's linear interpolation between the two neighbouring scores.
        return float(np.percentile(list(scores.values()), self._quantile * 100))

    def report(self, trial: str, unit: int, score: float) -> bool:
        """Record a score at the highest rung reached without one; returns whether to stop.

        A score between two rungs is recorded nowhere, unless the trial skipped a rung below it.
        """
        for milestone, scores in self._scores.items():
            if unit < milestone or trial in scores:
                continue
            # Before the score is entered: a trial is compared with those that reached the rung before it.
            cutoff = self.cutoff(milestone)
            scores[trial] = score
            return cutoff is not None and score < cutoff
        return False

    def replay(self, trial: str, history: Sequence[tuple[int, float]]) -> None:
        """Record an earlier run's scores without decisions, each rung's at the first unit that reached it.

        Args:
            history: (unit, score), ascending; scores that are not finite are left out.
        """
        for milestone, scores in self._scores.items():
            reached = [score for unit, score in history if unit >= milestone]
            if reached and math.isfinite(reached[0]):
                scores[trial] = reached[0]

    def describe(self) -> str:
        """Rungs and their cutoffs on one line."""
        return " | ".join(f"unit {milestone:g}: {self.cutoff(milestone)}" for milestone in self._scores)


class StudyScheduler(EntryScheduler):
    """ASHA with rungs per entry, for search trials only.

    Trials start in the order in which they were proposed. A trial is identified by its number in the study: Tune's id
    of a resumed trial is another one.

    Args:
        metric, maximise, epochs, grace, reduction: see `EntryScheduler`.
        history: trials of earlier runs, replayed into the rungs that they reached (Tune restores no scheduler). A
            trial that can be resumed is replayed up to the unit before the first one that it reports: its last unit
            is decided when it is reported again, as it would have been in the earlier run.
        graces: label → first rung, of entries that have another one than `grace`.

    Raises:
        ValueError: see `orchestrator.search.rungs.rungs`.
    """

    def __init__(
        self,
        metric: str,
        maximise: bool,
        epochs: int,
        grace: int = 1,
        reduction: float = 3,
        history: Sequence[TrialRecord] = (),
        graces: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(metric, maximise, epochs, grace, reduction)
        self._graces = dict(graces or {})
        self._stopped = 0
        self._rungs_by_label: dict[str, EntryRungs] = {}
        self._rungs_by_trial: dict[str, EntryRungs] = {}
        self._resumable: dict[str, TrialRecord] = {}
        for record in history:
            if record.role == "search":
                self._replay(record)

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Assign a search trial to the rungs of its entry."""
        label = entry_of(trial)
        if label is not None:
            self._rungs_by_trial[_trial_key(trial)] = self._rungs(label)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Stop or continue. Trials outside the search and non-finite results always continue: a diverged trial fails
        by itself."""
        key = _trial_key(trial)
        score = self.score(result)
        if key not in self._rungs_by_trial or score is None:
            return str(self.CONTINUE)
        unit = result["unit"]
        resumed = self._resumable.pop(key, None)
        if resumed is not None:
            # Its checkpoint may be newer than the last result that the journal has, so `_replay` could not do this.
            self._replay_until(resumed, unit - 1)
        if unit < self.epochs and not self._rungs_by_trial[key].report(key, unit, score):
            return str(self.CONTINUE)
        self._stopped += 1
        return str(self.STOP)

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """Record the last result of a trial that used its budget.

        A trial that ends by itself before (a closed-form solution takes one unit) is left out: its value is final, and
        no measure for trials that have just begun.
        """
        key = _trial_key(trial)
        entry = self._rungs_by_trial.pop(key, None)
        score = self.score(result)
        if entry is not None and score is not None and result["unit"] >= self.epochs:
            entry.report(key, result["unit"], score)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Forget a trial that was withdrawn before it ran; scores that it has stay."""
        self._rungs_by_trial.pop(_trial_key(trial), None)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """Forget a trial that failed; scores that it has stay."""
        self._rungs_by_trial.pop(_trial_key(trial), None)

    def debug_string(self) -> str:
        """One line per entry, for Tune's own reporter."""
        lines = [f"{label}: {entry.describe()}" for label, entry in self._rungs_by_label.items()]
        return "\n".join([f"ASHA per entry: {self._stopped} stopped", *lines])

    def _rungs(self, label: str) -> EntryRungs:
        if label not in self._rungs_by_label:
            grace = self._graces.get(label, self.grace)
            self._rungs_by_label[label] = EntryRungs(self.epochs, grace, self.reduction)
        return self._rungs_by_label[label]

    def _replay(self, record: TrialRecord) -> None:
        ended = record.state in ("pruned", "failed") or record.unit >= self.epochs
        # The last unit of any other trial was reported but perhaps not decided: the driver ended first.
        decided = ended and not record.resumable
        self._replay_until(record, record.unit if decided else record.unit - 1)
        if record.resumable:
            self._resumable[_number_key(record.number)] = record

    def _replay_until(self, record: TrialRecord, last_unit: int) -> None:
        history = [
            (int(past["unit"]), self.sign * past.get(self.metric, math.nan))
            for past in record.history
            if past["unit"] <= last_unit
        ]
        self._rungs(record.label).replay(_number_key(record.number), history)


def _trial_key(trial: Trial) -> str:
    number = trial.config.get("_number")
    return str(trial.trial_id) if number is None else _number_key(number)


def _number_key(number: int) -> str:
    return f"number {number}"
