"""Early stopping: asynchronous successive halving (ASHA) among the trials of one entry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

    from orchestrator.record.records import TrialRecord


class StudyScheduler(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA with one bracket per entry, for search trials only.

    A trial is compared with trials of its own entry at the same unit. Strategies start from different heads: LP-FT
    begins at the linear probe's solution, DAFT from zero, so that one common rung would stop the late starters before
    they had shown anything, and the study could not say which strategy is better. Folds and confirmations run in full.

    Args:
        metric: what is compared, reported with every unit.
        maximise: whether higher is better.
        epochs: units of a full trial.
        grace: units that every trial gets.
        reduction: about one of `reduction` trials goes on from a rung to the next.
        history: trials of earlier runs of the study, which count at the rungs that they reached (Tune itself forgets
            them). A trial that is about to go on counts below the unit that it says first: at that one it is decided
            on as it would have been.

    Raises:
        ValueError: see `rungs`.
    """

    def __init__(
        self,
        metric: str,
        maximise: bool,
        epochs: int,
        grace: int = 1,
        reduction: float = 3,
        history: Sequence[TrialRecord] = (),
    ) -> None:
        rungs(epochs, grace, reduction)
        self._fields: dict[str, Any] = {
            "time_attr": "unit",
            "metric": metric,
            "mode": "max" if maximise else "min",
            "max_t": epochs,
            "grace_period": grace,
            "reduction_factor": reduction,
            "brackets": 1,
        }
        super().__init__(**self._fields)
        self._by_label: dict[str, Any] = {}
        self._resumed: dict[str, TrialRecord] = {}
        for record in history:
            if record.role == "search":
                self._take_over(record)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """The study's metric is set already; Tune's is not needed (and need not agree)."""
        return True

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Put a search trial into the bracket of its entry; no randomness, unlike ASHA with several brackets."""
        if trial.config.get("role", "search") != "search":
            return
        label = str(trial.config.get("label") or trial.config.get("strategy"))
        self._trial_info[_Known.of(trial).trial_id] = self._bracket(label)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Stop or continue. Trials that are not searched, and results that are not finite, always continue: a
        diverged trial fails by itself."""
        known = _Known.of(trial)
        if known.trial_id not in self._trial_info or not self._comparable(result):
            return str(TrialScheduler.CONTINUE)
        if (before := self._resumed.pop(known.trial_id, None)) is not None:
            self._remember(before, result["unit"] - 1)  # its checkpoint may be newer than what the journal had heard
        return str(super().on_trial_result(tune_controller, known, result))

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """Count the last result.

        A trial that ends by itself before the full budget (a closed-form solution takes one unit) is left out:
        its value is final, and no measure for trials that have just begun.
        """
        known = _Known.of(trial)
        if known.trial_id not in self._trial_info:
            return
        if self._comparable(result) and result["unit"] >= self._max_t:
            super().on_trial_complete(tune_controller, known, result)
        self._trial_info.pop(known.trial_id, None)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Forget a trial that failed or was withdrawn."""
        self._trial_info.pop(_Known.of(trial).trial_id, None)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """Forget a trial that failed."""
        self._trial_info.pop(_Known.of(trial).trial_id, None)

    def debug_string(self) -> str:
        """One line per entry, for Tune's own reporter."""
        lines = [f"{label}: {bracket.debug_str()}" for label, bracket in self._by_label.items()]
        return "\n".join([f"ASHA per entry: {self._num_stopped} stopped", *lines])

    def _bracket(self, label: str) -> Any:
        if label not in self._by_label:
            self._by_label[label] = AsyncHyperBandScheduler(**self._fields)._brackets[0]
        return self._by_label[label]

    def _take_over(self, record: TrialRecord) -> None:
        """Enter a trial of an earlier run at the rungs where it was compared."""
        decided = record.state in ("pruned", "failed") or record.unit >= self._max_t
        self._remember(record, record.unit if decided and not record.resumable else record.unit - 1)
        if record.resumable:
            self._resumed[_Known.name(record.number)] = record

    def _remember(self, record: TrialRecord, end: int) -> None:
        """Enter a trial at the rungs that it had reached after `end` units."""
        for milestone, recorded in self._bracket(record.label)._rungs:
            reached = [past for past in record.history if milestone <= past["unit"] <= end]
            value = reached[0].get(self._metric, math.nan) if reached else math.nan
            if math.isfinite(value):
                recorded[_Known.name(record.number)] = self._metric_op * value

    def _comparable(self, result: dict[str, Any]) -> bool:
        value = result.get(self._metric)
        return "unit" in result and isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class _Known:
    """What a bracket knows a trial by: its number in the study, which stays when the trial is resumed under another id
    of Tune's."""

    trial_id: str

    @classmethod
    def of(cls, trial: Trial) -> _Known:
        return cls(cls.name(trial.config["_number"]) if "_number" in trial.config else trial.trial_id)

    @staticmethod
    def name(number: int) -> str:
        return f"number {number}"


def rungs(epochs: int, grace: int = 1, reduction: float = 3) -> tuple[int, ...]:
    """Units after which ASHA may stop a trial, ascending, all below `epochs`: `grace · reduction^k`.

    Raises:
        ValueError: a grace period outside 1 … epochs, or a reduction of 1 or less.
    """
    if not 1 <= grace <= epochs:
        raise ValueError(f"1 <= grace <= epochs = {epochs} must hold, but got {grace}.")
    if not reduction > 1:
        raise ValueError(f"reduction must be greater than 1, but got {reduction}. The usual values are 3 and 4.")
    found: list[int] = []
    milestone = float(grace)
    while math.ceil(milestone) < epochs:
        found.append(math.ceil(milestone))
        milestone *= reduction
    return tuple(dict.fromkeys(found))
