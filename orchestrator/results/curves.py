"""Curves of a trial or of a study as artifacts.

The numbers as JSON, and pictures of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.record.records import TrialRecord
from trainables.specs.metrics import (
    CLASSIFICATION,
    CORRUPTION_ERRORS,
    CORRUPTION_SAMPLES,
    LAYERNORM_LAMBDA,
    PROBE_C,
    WISE_ALPHA,
    TaskMetrics,
)

Curves = Mapping[str, Mapping[str, Any]]
"""Name → `columns` (name → values, the x axis first) and `note`."""

NUMBERS_ONLY = frozenset({"change", "per_class", "confusion", CORRUPTION_ERRORS, CORRUPTION_SAMPLES})
"""Curves without a picture: one row per tensor is too much for one, and `change_by_stage` shows the same; the tables of
classes are several tables below each other, one per split. Errors on corrupted pictures have a picture of their own,
of all entries (`orchestrator.results.corruption_plot`)."""


@dataclass(frozen=True)
class Picture:
    """A curve that is to be drawn."""

    name: str
    curve: Mapping[str, Any]
    chosen: float | None
    """x of the point that the trial chose."""
    metrics: TaskMetrics = CLASSIFICATION
    """Titles and units of its columns."""

    def content(self) -> bytes:
        """A PNG (ValueError: nothing in the curve can be drawn)."""
        from orchestrator.results.curve_plot import draw

        return draw(self.name, self.curve, self.chosen, self.metrics)


def curve_texts(curves: Curves, record: TrialRecord | None = None) -> dict[str, str]:
    """Artifact `curves/<name>.json` → its text.

    Columns, note, and the chosen x where the trial chose one.
    """
    texts = {}
    for name, curve in curves.items():
        values = {"columns": curve["columns"], "note": curve.get("note", "")}
        chosen = chosen_at(record, name)
        if chosen is not None:
            values["chosen"] = chosen
        texts[f"{stem(name)}.json"] = json.dumps(values, indent=1, ensure_ascii=False)
    return texts


def pictures(
    curves: Curves, record: TrialRecord | None = None, metrics: TaskMetrics = CLASSIFICATION
) -> dict[str, Picture]:
    """Artifact `curves/<name>.png` → its picture, to be drawn on delivery."""
    return {
        f"{stem(name)}.png": Picture(name, curve, chosen_at(record, name), metrics)
        for name, curve in curves.items()
        if name not in NUMBERS_ONLY
    }


def stem(name: str) -> str:
    """A curve's artifact without its ending, fit for any artifact store."""
    return f"curves/{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:100] or '_'}"


def chosen_at(record: TrialRecord | None, name: str) -> float | None:
    """x of the point that a trial chose on a sweep.

    Sweeps are `lambda`, `wise` and `linear_probe`; None where the trial chose no point of this curve.
    """
    if record is None:
        return None
    if name == "wise":
        return record.metric(WISE_ALPHA.name)
    if name == "linear_probe":
        return record.metric(PROBE_C.name)
    if name != "lambda":
        return None
    # In the cyclic framework the sweep starts from weights that were rescaled already: those of λ = 1.
    return 1.0 if record.hparams.get("cycles") else record.metric(LAYERNORM_LAMBDA.name)
