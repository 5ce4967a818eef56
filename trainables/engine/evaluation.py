"""Scores of a trial's model on the splits of its data, under their recorded names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainables.engine.best_weights import is_pristine
from trainables.engine.loop import evaluate
from trainables.models.precision import resolve_precision
from trainables.specs.metrics import HELD_OUT, OOD_MEAN, OOD_WORST, TEST, TRAIN, TRAIN_LOSS, VAL, ood
from trainables.tasks.registry import task_of

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel
    from trainables.tasks.base import MetricAccumulator, Task

FeatureWatch = Callable[[Tensor], None]
"""Called with the features (B, …) of every batch of a split, in order and without shuffling."""
Watch = Callable[[str], FeatureWatch]
"""Split → its `FeatureWatch`."""
OutputWatch = Callable[[str, Tensor, Tensor, Mapping[str, Tensor]], None]
"""Called once per split with its name, outputs (N, …) float32, targets (N, …) and the statistics of each sample
(`MetricAccumulator.per_sample`), all on the CPU and in the order of `TrialData.names`."""


def score(
    model: TaskModel,
    data: TrialData,
    split: str,
    cached: bool,
    watch: FeatureWatch | None = None,
    outputs: OutputWatch | None = None,
) -> dict[str, float]:
    """Metrics of the model in eval mode on one split, by metric key.

    Args:
        cached: take the pretrained backbone's features from the cache, see `uses_cached_features`.
        watch: called with the features of the pass that gives the predictions.
        outputs: called with the predictions.
    """
    task = task_of(data)
    accumulator = task.accumulator()
    recorded = None if outputs is None else _Recorded(accumulator)
    counted = accumulator if recorded is None else recorded
    model.eval()
    if cached:
        _evaluate_cached(task, model, data, split, counted, watch)
    else:
        dtype = resolve_precision(data.spec.shared.precision, data.device)
        evaluate(_prediction(task, model, watch), data.batches(split), counted, dtype)
    if outputs is not None and recorded is not None:
        outputs(split, *recorded.collected(), accumulator.per_sample())
    return accumulator.compute()


def uses_cached_features(model: TaskModel, data: TrialData) -> bool:
    """Whether the cached features are the model's own.

    They are where features are pooled and the backbone is the pretrained one.
    """
    return model.pooled and is_pristine(model.backbone, data.reference)


def validation_scores(model: TaskModel, data: TrialData) -> dict[str, float]:
    """Selection metric and tie-breaker on ID validation (classification: `val/acc` and `val/nll`)."""
    metrics = task_of(data).metrics
    values = score(model, data, VAL, uses_cached_features(model, data))
    return {metric.on(VAL): values[metric.key] for metric in (metrics.selection, metrics.tie_breaker)}


def training_scores(model: TaskModel, data: TrialData) -> dict[str, float]:
    """`train/loss` and the training metrics of a closed-form solution, which has no training loss of its own."""
    metrics = task_of(data).metrics
    assert metrics.loss is not None, "a task with a closed-form probe names the metric that is its loss"
    values = score(model, data, TRAIN, uses_cached_features(model, data))
    trained = {metric.on(TRAIN): values[metric.key] for metric in metrics.training}
    return {TRAIN_LOSS.name: values[metrics.loss.key], **trained}


def final_scores(
    model: TaskModel, data: TrialData, watch: Watch | None = None, outputs: OutputWatch | None = None
) -> dict[str, float]:
    """Every reported metric on ID test and on every OOD domain.

    With mean and worst of the selection metric over the domains, and the selection metric on the held-out domain if
    there is one.

    Args:
        watch: watches the features on ID test and OOD domains, in the same passes.
        outputs: gets the outputs on ID test and OOD domains.
    """
    metrics = task_of(data).metrics
    # Once for all splits: the check compares every tensor of the backbone.
    cached = uses_cached_features(model, data)
    test = score(model, data, TEST, cached, watch and watch(TEST), outputs)
    scores = {metric.on(TEST): test[metric.key] for metric in metrics.reported}
    selection = []
    for domain in data.ood_domains:
        split = ood(domain)
        values = score(model, data, split, cached, watch and watch(split), outputs)
        scores |= {metric.on(split): values[metric.key] for metric in metrics.reported}
        selection.append(values[metrics.selection.key])
    if selection:
        scores[metrics.selection.on(OOD_MEAN)] = sum(selection) / len(selection)
        scores[metrics.selection.on(OOD_WORST)] = min(selection, key=metrics.selection.score)
    if data.spec.held_out is not None:
        scores[metrics.held_out] = score(model, data, HELD_OUT, cached)[metrics.selection.key]
    return scores


class _Recorded:
    """An accumulator that keeps the outputs and targets that it gets."""

    def __init__(self, accumulator: MetricAccumulator) -> None:
        self._accumulator = accumulator
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []

    def compute(self) -> dict[str, float]:
        return self._accumulator.compute()

    def per_sample(self) -> dict[str, Tensor]:
        return self._accumulator.per_sample()

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._accumulator.update(outputs, targets)
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
    accumulator: MetricAccumulator,
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
