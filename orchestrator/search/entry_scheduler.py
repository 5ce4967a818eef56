"""Base of Luthier's schedulers: what is compared, and which trials are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import FIFOScheduler

from orchestrator.search.rungs import rungs

if TYPE_CHECKING:
    from ray.tune.experiment import Trial


class EntryScheduler(FIFOScheduler):  # type: ignore[misc]  # ray is untyped
    """A scheduler that compares search trials with others of their entry, at the same unit.

    Strategies start from different heads: LP-FT begins at the linear probe's solution, DAFT from zero, so that one
    common rung would stop the late starters before they had shown anything, and the study could not say which strategy
    is better. Folds and confirmations run in full.

    Args:
        metric: what is compared, reported with every unit.
        maximise: whether higher is better.
        epochs: units of a full trial.
        grace: units that every trial gets.
        reduction: η: the share 1/η of the trials at a rung continues.

    Raises:
        ValueError: see `rungs`.
    """

    def __init__(self, metric: str, maximise: bool, epochs: int, grace: int, reduction: float) -> None:
        rungs(epochs, grace, reduction)
        super().__init__()
        self._compared = metric
        self.sign = 1.0 if maximise else -1.0
        """Factor that makes higher better."""
        self.epochs = epochs
        """Units of a full trial."""
        self.grace = grace
        """Units that every trial gets."""
        self.reduction = reduction
        """η."""

    @property
    def metric(self) -> str:
        """What is compared."""
        return self._compared

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Accept whatever Tune's own metric is: the study's was set at construction."""
        return True

    def score(self, result: Mapping[str, Any]) -> float | None:
        """The signed metric of a result; None where it is missing or not finite."""
        value = result.get(self._compared)
        if "unit" not in result or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return self.sign * value


def entry_of(trial: Trial) -> str | None:
    """Label of a search trial's entry; None = another role, which is never compared."""
    if trial.config.get("role", "search") != "search":
        return None
    return str(trial.config.get("label") or trial.config.get("strategy"))
