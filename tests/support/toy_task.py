"""Metrics of a task that Luthier does not have: another name for everything, and an error that is minimised."""

from __future__ import annotations

from typing import Any

from orchestrator.record.records import TrialRecord
from trainables.specs.metrics import Metric, TaskMetrics, register

ERROR = Metric(
    "dist", "boundary distance", "min", "", "Mean distance of the predicted from the true boundary, in pixels."
)
OVERLAP = Metric("overlap", "overlap", "max", "fraction", "Share of pixels that are predicted right.", heading="IoU")
TOY = TaskMetrics(
    task="toy_boundaries",
    selection=ERROR,
    tie_breaker=OVERLAP,
    reported=(ERROR, OVERLAP),
    training=(ERROR,),
    leaderboard=(OVERLAP,),
)

register(TOY)


def toy_trial(number: int, label: str, val: float, test: float, **changes: Any) -> TrialRecord:
    """A complete trial; its OOD mean is `test` + 1 and its worst domain `test` + 2."""
    metrics = {
        "val/dist": val + 0.5,
        "best/val/dist": val,
        "val/overlap": 0.8,
        "test/dist": test,
        "ood/a/dist": test,
        "ood/b/dist": test + 2,
        "ood/mean/dist": test + 1,
        "ood/worst/dist": test + 2,
        "test/overlap": 0.75,
    }
    fields: dict[str, Any] = {
        "trial_id": f"t{number}",
        "number": number,
        "strategy": label,
        "label": label,
        "config_hash": f"h{number}",
        "state": "complete",
        "hparams": {"lr_head": 0.01 * (number + 1)},
        "metrics": metrics,
        "history": ({"unit": 1.0, "val/dist": val + 1}, {"unit": 2.0, "val/dist": val}),
    }
    return TrialRecord(**{**fields, **changes})
