"""Scores of a trial's model on the splits of its data, under their recorded names."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainables.data.mask_views import MaskViews
from trainables.engine.best_weights import is_pristine
from trainables.engine.loop import Accumulator, evaluate
from trainables.models.precision import resolve_precision
from trainables.specs.metrics import (
    HELD_OUT,
    TEST,
    TRAIN,
    TRAIN_LOSS,
    VAL,
    Metric,
    TaskMetrics,
    id_domain,
    ood,
)
from trainables.tasks.base import Statistic
from trainables.tasks.registry import task_of

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel
    from trainables.specs.measurements import Curve
    from trainables.tasks.base import MetricAccumulator, Task

FeatureWatch = Callable[[Tensor], None]
"""Called with the features (B, …) of every batch of a split, in order and without shuffling."""
Watch = Callable[[str], FeatureWatch]
"""Split → its `FeatureWatch`."""
OutputWatch = Callable[[str, tuple[Tensor, Tensor] | None, Mapping[str, Statistic]], None]
"""Called once per split with its name, outputs (N, …) float32 and targets (N, …) or None where the task does not keep
them, and the statistics of each sample (`MetricAccumulator.per_sample`), all on the CPU and in the order of
`TrialData.names`."""


def score(
    model: TaskModel,
    data: TrialData,
    split: str,
    cached: bool,
    watch: FeatureWatch | None = None,
    keys: Collection[str] | None = None,
) -> dict[str, float]:
    """Metrics of the model in eval mode on one split, by metric key.

    Args:
        cached: take the pretrained backbone's features from the cache, see `uses_cached_features`.
        watch: called with the features of the pass that gives the predictions.
        keys: of the metrics; None = those that are reported.
    """
    accumulator = task_of(data).accumulator()
    _evaluate(model, data, split, cached, accumulator, watch)
    return accumulator.compute(keys)


def _evaluate(
    model: TaskModel,
    data: TrialData,
    split: str,
    cached: bool,
    accumulator: Accumulator,
    watch: FeatureWatch | None = None,
) -> None:
    """Give the predictions on a split to an accumulator; arguments as of `score`."""
    task = task_of(data)
    model.eval()
    if cached:
        _evaluate_cached(task, model, data, split, accumulator, watch)
    else:
        dtype = resolve_precision(data.spec.shared.precision, data.device)
        evaluate(_prediction(task, model, watch), data.evaluation_batches(split), accumulator, dtype)


def uses_cached_features(model: TaskModel, data: TrialData) -> bool:
    """Whether the cached features are the model's own.

    They are where features are pooled and the backbone is the pretrained one.
    """
    return model.pooled and is_pristine(model.backbone, data.reference)


def validation_scores(model: TaskModel, data: TrialData) -> dict[str, float]:
    """Selection metric and tie-breaker on ID validation (classification: `val/acc` and `val/nll`)."""
    metrics = task_of(data).metrics
    chosen = (metrics.selection, metrics.tie_breaker)
    keys = [metric.key for metric in chosen]
    values = score(model, data, VAL, uses_cached_features(model, data), keys=keys)
    return {metric.on(VAL): values[metric.key] for metric in chosen}


def training_scores(model: TaskModel, data: TrialData) -> dict[str, float]:
    """`train/loss` and the training metrics of a closed-form solution.

    Scored on the training split: such a solution has no training loss of its own.
    """
    metrics = task_of(data).metrics
    assert metrics.loss is not None, "a task with a closed-form probe names the metric that is its loss"
    keys = [metric.key for metric in (metrics.loss, *metrics.training)]
    values = score(model, data, TRAIN, uses_cached_features(model, data), keys=keys)
    trained = {metric.on(TRAIN): values[metric.key] for metric in metrics.training}
    return {TRAIN_LOSS.name: values[metrics.loss.key], **trained}


def final_scores(
    model: TaskModel, data: TrialData, watch: Watch | None = None, splits: Collection[str] | None = None
) -> dict[str, float]:
    """Every reported metric on ID test and on every OOD domain.

    With mean and worst of the selection metric over the domains, and the selection metric on the held-out domain if
    there is one.

    Args:
        watch: watches the features on ID test and OOD domains, in the same passes.
        splits: those to score; None = all. Mean and worst need all domains, and are left out where one is.
    """
    metrics = task_of(data).metrics
    # Once for all splits: the check compares every tensor of the backbone.
    cached = uses_cached_features(model, data)
    keys = [metric.key for metric in metrics.reported]
    values = {}
    for split in (TEST, *map(ood, data.ood_domains)):
        if splits is None or split in splits:
            values[split] = score(model, data, split, cached, watch and watch(split), keys)
    scores = _recorded(metrics, metrics.reported, values)
    if not values.keys() >= set(map(ood, data.ood_domains)):
        for name in (metrics.ood_mean, metrics.ood_worst):
            scores.pop(name, None)
    return scores | _held_out(model, data, cached)


@dataclass(frozen=True)
class CompleteScores:
    """Everything that is measured on the tested weights."""

    scores: dict[str, float]
    """Those of `final_scores`, and the task's further metrics, also on every ID domain where there are several."""
    validation: float
    """Selection metric on ID validation."""
    tables: dict[str, Curve]
    """The task's tables of the predictions."""


def complete_scores(
    model: TaskModel, data: TrialData, watch: Watch | None = None, outputs: OutputWatch | None = None
) -> CompleteScores:
    """Scores of the network that a trial ends with.

    Args:
        watch: watches the features on ID test and OOD domains, in the same passes.
        outputs: gets the outputs on ID validation, ID test and OOD domains, of the same passes.
    """
    task = task_of(data)
    metrics = task.metrics
    cached = uses_cached_features(model, data)
    new_accumulator = task.accumulator if outputs is None else task.recording_accumulator
    validation = new_accumulator()
    recorder = _OutputRecorder(validation) if outputs is not None and task.keeps_predictions else None
    _evaluate(model, data, VAL, cached, validation if recorder is None else recorder)
    if outputs is not None:
        outputs(VAL, None if recorder is None else recorder.collected(), validation.per_sample())
    # Fitted on ID validation alone, and applied to the test splits as it is.
    calibration = task.calibrate(validation)
    measured = tuple(dict.fromkeys((*metrics.reported, *metrics.final)))
    keys = [metric.key for metric in measured]
    state = None if calibration is None else calibration.state
    accumulators: dict[str, MetricAccumulator] = {}
    values: dict[str, dict[str, float]] = {}
    of_domains: dict[str, float] = {}
    for split in (TEST, *map(ood, data.ood_domains)):
        whole = accumulators[split] = new_accumulator()
        domains = _domain_accumulators(task, data) if split == TEST else {}
        target = _ByDomain(whole, domains, data) if domains else whole
        recorder = _OutputRecorder(target) if outputs is not None and task.keeps_predictions else None
        _evaluate(model, data, split, cached, target if recorder is None else recorder, watch and watch(split))
        if outputs is not None:
            outputs(split, None if recorder is None else recorder.collected(), whole.per_sample())
        values[split] = whole.compute(keys, state)
        for name, accumulator in domains.items():
            of_domains |= _on(name, measured, accumulator.compute(keys, state))
    scores = _recorded(metrics, measured, values) | of_domains | _held_out(model, data, cached)
    if calibration is not None:
        scores |= calibration.report
    selected = validation.compute([metrics.selection.key])[metrics.selection.key]
    return CompleteScores(scores, selected, dict(task.tables(accumulators)))


def _recorded(
    metrics: TaskMetrics, measured: Collection[Metric], values: dict[str, dict[str, float]]
) -> dict[str, float]:
    """Values by split and key → by recorded name.

    With mean and worst of the selection metric over OOD domains.
    """
    scores: dict[str, float] = {}
    selection = []
    for split, by_key in values.items():
        scores |= _on(split, measured, by_key)
        if split != TEST:
            selection.append(by_key[metrics.selection.key])
    if selection:
        defined = all(map(math.isfinite, selection))
        scores[metrics.ood_mean] = sum(selection) / len(selection)
        # Not a number compares as neither better nor worse: the worst would depend on the domains' order.
        scores[metrics.ood_worst] = min(selection, key=metrics.selection.score) if defined else math.nan
    return scores


def _on(split: str, measured: Collection[Metric], values: dict[str, float]) -> dict[str, float]:
    """Values by recorded name; metrics that do not apply to the targets have none."""
    return {metric.on(split): values[metric.key] for metric in measured if metric.key in values}


def _held_out(model: TaskModel, data: TrialData, cached: bool) -> dict[str, float]:
    if data.spec.held_out is None:
        return {}
    metrics = task_of(data).metrics
    key = metrics.selection.key
    return {metrics.held_out: score(model, data, HELD_OUT, cached, keys=[key])[key]}


def _domain_accumulators(task: Task, data: TrialData) -> dict[str, MetricAccumulator]:
    """An accumulator for each ID domain in ID test.

    By the name of its split; none where there is one domain.
    """
    domains = sorted({int(number) for number in data.domain_ids(TEST)})
    if len(domains) < 2:
        return {}
    return {id_domain(data.store.domains[number]): task.accumulator() for number in domains}


class _ByDomain:
    """Accumulator of ID test as a whole and by domain.

    It passes every sample on to the accumulator of its domain, too.
    """

    def __init__(self, whole: Accumulator, domains: Mapping[str, MetricAccumulator], data: TrialData) -> None:
        self._whole = whole
        self._domains = domains
        self._of_samples = [id_domain(data.store.domains[number]) for number in data.domain_ids(TEST)]
        self._done = 0

    def update(self, outputs: Tensor, targets: Any) -> None:
        self._whole.update(outputs, targets)
        batch = [self._of_samples[sample] for sample in self._samples(targets)]
        for split, accumulator in self._domains.items():
            rows = [position for position, domain in enumerate(batch) if domain == split]
            if rows:
                accumulator.update(outputs[rows], targets[rows])

    def _samples(self, targets: Any) -> Sequence[int]:
        """Position of each row's sample in ID test."""
        if isinstance(targets, MaskViews):
            return targets.samples
        # Batches, and their micro-batches, come in the order of the samples.
        first = self._done
        self._done += len(targets)
        return range(first, self._done)


class _OutputRecorder:
    """Accumulator that keeps the outputs and targets which it passes on to another one."""

    def __init__(self, accumulator: Accumulator) -> None:
        self._accumulator = accumulator
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._accumulator.update(outputs, targets)
        # NumPy, in which predictions are kept, has no bfloat16.
        self._outputs.append(outputs.float())
        self._targets.append(targets)

    def collected(self) -> tuple[Tensor, Tensor]:
        """Outputs (N, …) float32 and targets (N, …), on the CPU."""
        return torch.cat(self._outputs).cpu(), torch.cat(self._targets).cpu()


@torch.no_grad()
def _evaluate_cached(
    task: Task,
    model: TaskModel,
    data: TrialData,
    split: str,
    accumulator: Accumulator,
    watch: FeatureWatch | None,
) -> None:
    # `torch.tensor` copies into aligned memory: matrix products on mapped memory may round differently.
    features = torch.tensor(data.features(split)).to(data.device)
    if watch is not None:
        watch(features)
    targets = torch.tensor(data.labels(split)).to(data.device)
    accumulator.update(task.predict(model, features), targets)


def _prediction(task: Task, model: TaskModel, watch: FeatureWatch | None) -> Callable[[Tensor], Tensor]:
    def predict(images: Tensor) -> Tensor:
        features = model.features(images)
        outputs = task.predict(model, features)
        # After the prediction: a batch that runs out of memory before is repeated in pieces, each watched once.
        if watch is not None:
            watch(features)
        return outputs

    return predict
