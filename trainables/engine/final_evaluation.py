"""Final evaluation: restore the best weights, finalize, score, run diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainables.diagnostics.norm_shift import norm_parameters
from trainables.engine.best_weights import Best, Snapshot, put_back, take
from trainables.engine.contract import Strategy
from trainables.engine.corruption_errors import corruption_errors
from trainables.engine.diagnosis import Diagnosis
from trainables.engine.evaluation import OutputWatch, complete_scores, final_scores, validation_scores
from trainables.engine.weight_interpolation import WiseFt
from trainables.specs.measurements import Curve, split_report
from trainables.specs.metrics import BEST_EPOCH
from trainables.tasks.registry import task_of

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.low_rank import LowRankUpdate
    from trainables.models.task_model import TaskModel


@dataclass(frozen=True)
class FinalEvaluation:
    """Results of a final or an interim evaluation, by recorded name."""

    scores: dict[str, float]
    """Test, OOD and `best/…`."""
    report: dict[str, float] = field(default_factory=dict)
    """Metrics of `finalize`, of `curves` and of the diagnostics."""
    curves: dict[str, Curve] = field(default_factory=dict)
    merged: LowRankUpdate | None = None
    """Low-rank update that `finalize` merged into the network."""


@dataclass(frozen=True)
class TrialContext:
    """Inputs of an evaluation: the network after the last unit, and its start."""

    model: TaskModel
    strategy: Strategy
    data: TrialData
    best: Best
    start: Mapping[str, Tensor]
    """Tensors that differed from the pretrained ones when training began, see `changed_start`."""
    prepared: Any = None
    """State that the strategy's `prepare` returned."""


def interim(trial: TrialContext, pristine: Mapping[str, Tensor]) -> FinalEvaluation:
    """Score the best unit so far, and restore the network bit for bit.

    Scored finalized; training continues from the restored network.

    Args:
        pristine: the pretrained tensors by the network's names.
    """
    model = trial.model
    snapshot = Snapshot.of(model, pristine, trial.best.tensors)
    try:
        put_back(model, trial.best.tensors)
        tuned = trial.strategy.finalize(model, trial.data, trial.prepared)
        report, curves = split_report(tuned.report)
        wise = _wise_ft(trial)
        if wise is not None:
            report |= split_report(wise.apply())[0]
        return FinalEvaluation(_interim_scores(trial), report, curves)
    finally:
        # In this order: tensors are written by the names that they have in the restored structure.
        snapshot.restore_modules()
        snapshot.restore_tensors(model)


def final(trial: TrialContext, outputs: OutputWatch | None = None) -> FinalEvaluation:
    """Restore the best unit's weights, finalize, score and diagnose them.

    `trial.model` is the trial's result then.

    Args:
        outputs: gets the outputs on ID validation, ID test and every OOD domain.
    """
    model = trial.model
    strategy = trial.strategy
    data = trial.data
    # Of the last unit, only what FSR compares: a copy of every tensor would be a network more.
    last = take(model, norm_parameters(data.reference) & trial.best.tensors.keys())
    put_back(model, trial.best.tensors)
    tuned = strategy.finalize(model, data, trial.prepared)
    # Before WiSE-FT moves the weights that the strategy's curve is about.
    strategy_curves = strategy.curves(model, data, tuned.state)
    wise = _wise_ft(trial)
    alpha = wise.apply() if wise is not None else {}
    diagnosis = Diagnosis(strategy, data, model)
    tested = complete_scores(model, data, diagnosis.watch, outputs)
    value = tested.validation if _changed_after_training(trial) else trial.best.value
    scores = tested.scores | _best_of(trial, value)
    diagnosed = diagnosis.report(model, trial.start, trial.best.tensors, last)
    wise_curve = wise.curve() if wise is not None else {}
    corruptions = data.spec.corruptions
    corrupted = corruption_errors(model, data, corruptions) if corruptions is not None else {}
    report: dict[str, float] = {}
    curves: dict[str, Curve] = {}
    for part in (tuned.report, alpha, strategy_curves, wise_curve, diagnosed, tested.tables, corrupted):
        metrics, tables = split_report(part)
        report |= metrics
        curves |= tables
    return FinalEvaluation(scores, report, curves, tuned.merged)


def final_of_refit(trial: TrialContext) -> FinalEvaluation:
    """Finalize and test the network after the last unit; nothing is measured on validation."""
    tuned = trial.strategy.finalize(trial.model, trial.data, trial.prepared)
    report, curves = split_report(tuned.report)
    wise = _wise_ft(trial)
    if wise is not None:
        report |= split_report(wise.apply())[0]
    return FinalEvaluation(final_scores(trial.model, trial.data), report, curves, tuned.merged)


def _wise_ft(trial: TrialContext) -> WiseFt | None:
    alpha = getattr(trial.strategy.config, "wise", None)
    return None if alpha is None else WiseFt(trial.model, trial.data, trial.start, alpha)


def _interim_scores(trial: TrialContext) -> dict[str, float]:
    """Scores on the trial's interim splits, with `best/…` of the tested weights.

    What `finalize` did to them counts.
    """
    value = trial.best.value
    if _changed_after_training(trial):
        value = validation_scores(trial.model, trial.data)[task_of(trial.data).metrics.validation]
    scores = final_scores(trial.model, trial.data, splits=trial.data.spec.shared.interim_splits)
    return scores | _best_of(trial, value)


def _changed_after_training(trial: TrialContext) -> bool:
    """Whether the tested weights may differ from those that were validated after the best unit."""
    changed = type(trial.strategy).finalize is not Strategy.finalize
    # Validated again only where something has changed the best unit's weights since they were scored.
    return changed or getattr(trial.strategy.config, "wise", None) is not None


def _best_of(trial: TrialContext, validation: float) -> dict[str, float]:
    metrics = task_of(trial.data).metrics
    return {metrics.best_validation: validation, BEST_EPOCH.name: float(trial.best.unit)}
