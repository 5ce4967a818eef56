"""The end of a trial: the best unit's weights, finalised, scored and looked at."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from trainables.engine.best_weights import Best, put_back, take
from trainables.engine.contract import Strategy
from trainables.engine.diagnosis import Diagnosis
from trainables.engine.evaluation import Watch, final_scores, validation_scores
from trainables.engine.weight_interpolation import WiseFt
from trainables.specs.measurements import Curve, Report

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.backbone import Classifier


@dataclass(frozen=True)
class Ending:
    """What was found out."""

    scores: dict[str, float]
    """Test, OOD and `best/…`, by the names of the record."""
    report: dict[str, float] = field(default_factory=dict)
    """Metrics of `finalize`, of `curves` and of the diagnostics."""
    curves: dict[str, Curve] = field(default_factory=dict)


def interim(model: Classifier, strategy: Strategy, data: TrialData, best: Best, start: Mapping[str, Tensor]) -> Ending:
    """Scores of the best unit so far, finalised. Happens on a copy, so that training goes on from exactly the weights
    that it had. Arguments as for `final`."""
    model, strategy = copy.deepcopy((model, strategy))
    put_back(model, best.tensors)
    report, curves = split(strategy.finalize(model, data))
    wise = _wise(model, strategy, data, start)
    report |= split(wise.apply())[0] if wise else {}
    return Ending(_scores(model, strategy, data, best), report, curves)


def final(model: Classifier, strategy: Strategy, data: TrialData, best: Best, start: Mapping[str, Tensor]) -> Ending:
    """Put the best unit's weights back, finalise them, score and diagnose them; `model` is the trial's result then.

    Args:
        start: see `trainables.engine.best_weights.changed_start`.
    """
    last = take(model, best.tensors)
    put_back(model, best.tensors)
    report, curves = split(strategy.finalize(model, data))
    looked_at = strategy.curves(model, data)
    wise = _wise(model, strategy, data, start)
    report |= split(wise.apply())[0] if wise else {}
    diagnosis = Diagnosis(strategy, data)
    scores = _scores(model, strategy, data, best, diagnosis.watch)
    measured = diagnosis.report(model, start, best.tensors, last)
    for found in (looked_at, wise.curve() if wise else {}, measured):
        metrics, more = split(found)
        report |= metrics
        curves |= more
    return Ending(scores, report, curves)


def split(report: Report) -> tuple[dict[str, float], dict[str, Curve]]:
    """Metrics and curves of a hook's report, apart."""
    curves = {name: value for name, value in report.items() if isinstance(value, Curve)}
    return {name: value for name, value in report.items() if not isinstance(value, Curve)}, curves


def _wise(model: Classifier, strategy: Strategy, data: TrialData, start: Mapping[str, Tensor]) -> WiseFt | None:
    wanted = getattr(strategy.config, "wise", None)
    return None if wanted is None else WiseFt(model, data, start, wanted)


def _scores(
    model: Classifier, strategy: Strategy, data: TrialData, best: Best, watch: Watch | None = None
) -> dict[str, float]:
    """`best/val/acc` is that of the weights which are tested: what `finalize` did to them counts."""
    accuracy = best.accuracy
    changed = type(strategy).finalize is not Strategy.finalize or getattr(strategy.config, "wise", None) is not None
    if changed:
        accuracy = validation_scores(model, data)["val/acc"]
    return {**final_scores(model, data, watch), "best/val/acc": accuracy, "best/epoch": float(best.unit)}
