"""The end of a trial: the best unit's weights, finalised, scored and looked at."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainables.core.contract import Curve, Report, Strategy
from trainables.core.diagnosing import end_of_trial
from trainables.core.scoring import final_scores, validation_scores
from trainables.core.snapshot import Best, put_back, take

if TYPE_CHECKING:
    from trainables.core.backbone import Classifier
    from trainables.data.trial_data import TrialData


@dataclass(frozen=True)
class Ending:
    """What was found out."""

    scores: dict[str, float]
    """Test, OOD and `best/…`, by the names of the record."""
    report: dict[str, float] = field(default_factory=dict)
    """Metrics of `finalize`, of `curves` and of the diagnostics."""
    curves: dict[str, Curve] = field(default_factory=dict)


def interim(model: Classifier, strategy: Strategy, data: TrialData, best: Best) -> Ending:
    """Scores of the best unit so far, finalised. Happens on a copy, so that training goes on from exactly the weights
    that it had."""
    model, strategy = copy.deepcopy((model, strategy))
    put_back(model, best.tensors)
    report, curves = split(strategy.finalize(model, data))
    return Ending(_scores(model, strategy, data, best), report, curves)


def final(model: Classifier, strategy: Strategy, data: TrialData, best: Best) -> Ending:
    """Put the best unit's weights back, finalise them, score and diagnose them; `model` is the trial's result then."""
    last = take(model, best.tensors)
    put_back(model, best.tensors)
    report, curves = split(strategy.finalize(model, data))
    scores = _scores(model, strategy, data, best)
    for found in (strategy.curves(model, data), end_of_trial(model, data, best.tensors, last)):
        metrics, more = split(found)
        report |= metrics
        curves |= more
    return Ending(scores, report, curves)


def split(report: Report) -> tuple[dict[str, float], dict[str, Curve]]:
    """Metrics and curves of a hook's report, apart."""
    curves = {name: value for name, value in report.items() if isinstance(value, Curve)}
    return {name: value for name, value in report.items() if not isinstance(value, Curve)}, curves


def _scores(model: Classifier, strategy: Strategy, data: TrialData, best: Best) -> dict[str, float]:
    """`best/val/acc` is that of the weights which are tested: what `finalize` did to them counts."""
    accuracy = best.accuracy
    if type(strategy).finalize is not Strategy.finalize:
        accuracy = validation_scores(model, data)["val/acc"]
    return {**final_scores(model, data), "best/val/acc": accuracy, "best/epoch": float(best.unit)}
