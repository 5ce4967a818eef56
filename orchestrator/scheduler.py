"""Early stopping: asynchronous successive halving (ASHA) among the trials of one entry."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial


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

    Raises:
        ValueError: see `rungs`.
    """

    def __init__(self, metric: str, maximise: bool, epochs: int, grace: int = 1, reduction: float = 3) -> None:
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

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """The study's metric is set already; Tune's is not needed (and need not agree)."""
        return True

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Put a search trial into the bracket of its entry; no randomness, unlike ASHA with several brackets."""
        if trial.config.get("role", "search") != "search":
            return
        label = str(trial.config.get("label") or trial.config.get("strategy"))
        if label not in self._by_label:
            self._by_label[label] = AsyncHyperBandScheduler(**self._fields)._brackets[0]
        self._trial_info[trial.trial_id] = self._by_label[label]

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Stop or continue. Trials that are not searched, and results that are not finite, always continue: a
        diverged trial fails by itself."""
        if trial.trial_id not in self._trial_info or not self._comparable(result):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        """Count the last result.

        A trial that ends by itself before the full budget (a closed-form solution takes one unit) is left out:
        its value is final, and no measure for trials that have just begun.
        """
        if trial.trial_id not in self._trial_info:
            return
        if self._comparable(result) and result["unit"] >= self._max_t:
            super().on_trial_complete(tune_controller, trial, result)
        self._trial_info.pop(trial.trial_id, None)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        """Forget a trial that failed or was withdrawn."""
        self._trial_info.pop(trial.trial_id, None)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        """Forget a trial that failed."""
        self._trial_info.pop(trial.trial_id, None)

    def debug_string(self) -> str:
        """One line per entry, for Tune's own reporter."""
        lines = [f"{label}: {bracket.debug_str()}" for label, bracket in self._by_label.items()]
        return "\n".join([f"ASHA per entry: {self._num_stopped} stopped", *lines])

    def _comparable(self, result: dict[str, Any]) -> bool:
        value = result.get(self._metric)
        return "unit" in result and isinstance(value, int | float) and math.isfinite(value)


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
