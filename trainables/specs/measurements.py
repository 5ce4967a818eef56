"""What a trial measures: metrics and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curve:
    """A small table that a trial measured, kept as an artifact of its run.

    Raises:
        ValueError: no column, or columns of different lengths.
    """

    columns: Mapping[str, Sequence[float | str | None]]
    """Name → values; the first column is the x axis (numbers, or names such as those of layers)."""
    note: str = ""
    """One sentence for the reader of the plot."""

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"The columns of a curve must be equally long, and at least one, but got {lengths}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"columns": {name: list(values) for name, values in self.columns.items()}, "note": self.note}


Report = Mapping[str, float | Curve]
"""What a hook measured: metrics by the names of the record, and curves by the names of their artifacts."""


def split_report(report: Report) -> tuple[dict[str, float], dict[str, Curve]]:
    """Metrics and curves of a report, apart."""
    metrics: dict[str, float] = {}
    curves: dict[str, Curve] = {}
    for name, value in report.items():
        if isinstance(value, Curve):
            curves[name] = value
        else:
            metrics[name] = value
    return metrics, curves
