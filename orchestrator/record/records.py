"""What is known about one trial, and which numbers of a trial are worth keeping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

State = Literal["suggested", "running", "complete", "pruned", "failed"]

_EVERY_TRIAL = ("train", "val", "test", "ood", "calib", "best", "held_out", "cost", "lr")
_DIAGNOSTICS = (
    *("fsr", "ln_shift", "bn_shift", "plasticity", "distortion", "change", "cka", "grad_norm"),
    *("bn_conversion", "wise"),
)
METRIC_GROUPS = frozenset({*_EVERY_TRIAL, *_DIAGNOSTICS})
"""First path segments of the metric names that every strategy shares; each strategy may add its own name."""

INTERRUPTED = "interrupted"
"""Reason of a trial that neither finished nor failed by itself: the driver ended first."""
RESUMED = frozenset({INTERRUPTED, "infra", "stalled", "host_oom"})
"""Reasons of trials that a repeated run goes on with: nothing is known to be wrong with the trials themselves."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a study, as the journal tells it."""

    trial_id: str
    """Tune's id; of the latest attempt if the trial was resumed."""
    number: int
    """Position in the study, from 0; unique within it and the same for ever."""
    strategy: str
    label: str
    """Name of the entry of the study file; two entries may share a strategy."""
    hparams: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    role: str = "search"
    """`search`, `fold` (leave one domain out), `confirm` (fresh seed) or `reference` (another sample, for FSR)."""
    held_out: str | None = None
    sample: str | None = None
    """Training sample of a `reference` trial; None = the study's own."""
    config_hash: str = ""
    """Names strategy, label and hyperparameters; the seeds and roles of one configuration share it."""
    state: State = "suggested"
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Last value of every metric."""
    history: tuple[Mapping[str, float], ...] = ()
    """Metrics per unit in order, each with its number under `unit`."""
    curves: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Last value of every curve, by name: `columns` (name → values, the x axis first) and `note`."""
    reason: str | None = None
    """Why the trial failed: `nan`, `oom`, `host_oom`, `stalled`, `data`, `user`, `infra` or `interrupted`."""
    error: str | None = None
    attempts: int = 0
    """How often the trial was started."""
    node: str | None = None
    checkpoint: str | None = None
    """Folder of the last checkpoint that Tune reported."""
    search_values: Mapping[str, Any] = field(default_factory=dict)
    """The point as the search knows it (Optuna's parameter names); empty for folds and confirmations."""
    started: float | None = None
    ended: float | None = None
    """Wall-clock seconds since the epoch of the first start and of the end."""

    @property
    def unit(self) -> int:
        """Units of budget done."""
        return int(self.history[-1]["unit"]) if self.history else 0

    @property
    def unfinished(self) -> bool:
        """True if the trial neither ended nor failed by itself."""
        return self.state in ("suggested", "running") or self.reason == INTERRUPTED

    @property
    def resumable(self) -> bool:
        """True if a repeated run goes on with this trial: it is unfinished, or its machines failed it too often."""
        return self.unfinished or (self.state == "failed" and self.reason in RESUMED)

    def metric(self, name: str) -> float | None:
        """Last value of one metric, or None where it is missing or not finite."""
        value = self.metrics.get(name)
        return value if value is not None and math.isfinite(value) else None


@cache
def _declared_groups() -> frozenset[str]:
    from trainables import strategies

    return METRIC_GROUPS | frozenset(strategies())


def declared_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a result that Luthier declares, as floats; Tune's own bookkeeping (`pid`, `time_total_s` …) and
    everything that is not a number are left out."""
    groups = _declared_groups()
    kept: dict[str, float] = {}
    for key, value in result.items():
        head, slash, _ = key.partition("/")
        if slash and head in groups and not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__float__"):
            kept[key] = float(value)
    return kept
