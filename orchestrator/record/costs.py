"""Costs that a search can minimise beside its selecting metric, and their values in the metrics of a trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from trainables.specs.metrics import (
    PEAK_GPU_BYTES,
    PEAK_HOST_BYTES,
    TOTAL_SECONDS,
    TRAINABLE_PARAMETERS,
    best_or_last,
)


@dataclass(frozen=True)
class Cost:
    """One cost; less is better."""

    title: str
    """For tables and axes."""
    unit: str
    """Unit of the recorded value; empty = a count."""
    recorded: Sequence[str]
    """Recorded names; the first that a trial has is its cost."""

    def text(self, value: float) -> str:
        """A value with a decimal prefix and its unit; "-" where it is not finite.

        Example:
            >>> COSTS["trainable_parameters"].text(84000), COSTS["peak_memory"].text(1.2e9)
            ('84.0 k', '1.2 GB')
            >>> COSTS["device_seconds"].text(3600.4)
            '3,600 s'
        """
        if not math.isfinite(value):
            return "-"
        if self.unit == "s":
            return f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s"
        for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= factor:
                return f"{value / factor:.1f} {prefix}{self.unit}"
        return f"{value:.0f} {self.unit}".rstrip()


COSTS: Mapping[str, Cost] = MappingProxyType(
    {
        "trainable_parameters": Cost("trained parameters", "", (TRAINABLE_PARAMETERS.name,)),
        "device_seconds": Cost("seconds", "s", (TOTAL_SECONDS.name,)),
        "peak_memory": Cost("peak memory", "B", (PEAK_GPU_BYTES.name, PEAK_HOST_BYTES.name)),
    }
)
"""Name in the study file → cost."""


def objective_value(metrics: Mapping[str, Any], name: str) -> Any:
    """The value of an objective in the metrics of a trial; None where it is missing.

    Args:
        name: one of `COSTS`, or a recorded name; of a metric that is measured per unit the value of the tested weights
            counts.

    Example:
        >>> objective_value({"val/acc": 0.8, "best/val/acc": 0.9, "cost/peak_host_bytes": 1e9}, "val/acc")
        0.9
        >>> objective_value({"cost/peak_host_bytes": 1e9, "cost/peak_gpu_bytes": 4e9}, "peak_memory")
        4000000000.0
    """
    if name not in COSTS:
        return best_or_last(metrics, name)
    return next((metrics[recorded] for recorded in COSTS[name].recorded if recorded in metrics), None)
