"""Errors of a trained network on corrupted pictures (Hendrycks and Dietterich, 2019).

The corruption error of one corruption is 100 − the task's metric in per cent, averaged over five severities. Pictures
are corrupted as the network sees them, after resizing and cropping; targets stay as they are, so that a task whose
targets lie on the picture needs nothing of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainables.data.corruption_files import CorruptedFiles
from trainables.data.corruptions import corrupt
from trainables.data.mask_views import MaskViews
from trainables.engine.loop import evaluate
from trainables.models.precision import resolve_precision
from trainables.specs.corruptions import SEVERITIES, CorruptionSettings
from trainables.specs.fault_injection import fault_point
from trainables.specs.measurements import Curve, Report
from trainables.specs.metrics import (
    CLEAN_ERROR,
    CORRUPTION_ERROR,
    CORRUPTION_ERRORS,
    CORRUPTION_SAMPLES,
    MEAN_CORRUPTION_ERROR,
    TEST,
)
from trainables.tasks.registry import task_of

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel

SEED = 0
"""Of the random corruptions: all entries and seeds of a study are measured on the same pictures."""
CORRECT = "correct"
"""Statistic of a sample (`trainables.tasks.base.MetricAccumulator.per_sample`) whose mean is the metric, if it has one;
per-sample errors are kept for tasks that have it."""

Batches = Iterator[tuple[Tensor, Any]]
"""Normalised images and targets as they are scored."""


@dataclass(frozen=True)
class _Part:
    """Some of the pictures as the network sees them."""

    pixels: Tensor
    """(B, H, W, 3) uint8"""
    targets: Any
    names: list[str]
    """Of the pictures' random streams."""


def corruption_errors(model: TaskModel, data: TrialData, settings: CorruptionSettings) -> Report:
    """Error by corruption and severity, their means, and the error on the same pictures without corruption.

    Raises:
        ValueError: the task has no metric of shares, or the files of corrupted pictures are not the study's.
    """
    model.eval()
    source = _own_pictures(data, settings) if settings.folder is None else _files(data, settings)
    metrics: dict[str, float] = {}
    if source.clean is not None:
        metrics[CLEAN_ERROR.name] = _error(model, data, source.clean())[0]
    table: dict[str, list[float | str | None]] = {"corruption": [], "severity": [], "error": []}
    samples: dict[str, list[float | str | None]] = {"sample": list(source.names)}
    for name in settings.names:
        errors = []
        of_samples = []
        for severity in SEVERITIES:
            fault_point("in_corruptions")
            error, per_sample = _error(model, data, source.corrupted(name, severity))
            errors.append(error)
            of_samples.append(per_sample)
            table["corruption"].append(name)
            table["severity"].append(severity)
            table["error"].append(error)
        metrics[CORRUPTION_ERROR.of(name)] = sum(errors) / len(errors)
        present = [values for values in of_samples if values is not None]
        if len(present) == len(SEVERITIES):
            samples[name] = list(torch.stack(present).mean(0).tolist())
    of_corruptions = [metrics[CORRUPTION_ERROR.of(name)] for name in settings.names]
    metrics[MEAN_CORRUPTION_ERROR.name] = sum(of_corruptions) / len(of_corruptions)
    curves = {CORRUPTION_ERRORS: Curve(table, "Error in per cent by corruption and severity.")}
    if len(samples) > 1:
        curves[CORRUPTION_SAMPLES] = Curve(samples, "Error of each picture in per cent, mean over the severities.")
    return {**metrics, **curves}


@dataclass(frozen=True)
class _Source:
    """Where corrupted pictures come from."""

    names: list[str]
    corrupted: Callable[[str, int], Batches]
    """Corruption and severity → batches."""
    clean: Callable[[], Batches] | None
    """The same pictures without corruption; None = they are not there."""


def _own_pictures(data: TrialData, settings: CorruptionSettings) -> _Source:
    """The first pictures of ID test, a stratified sample, corrupted here."""
    parts = list(_parts(data, settings.images))

    def clean() -> Batches:
        return ((data.normalised(part.pixels), part.targets) for part in parts)

    def corrupted(name: str, severity: int) -> Batches:
        for part in parts:
            pixels = corrupt(part.pixels, name, severity, SEED, part.names)
            yield data.normalised(pixels), part.targets

    return _Source(data.names(TEST)[: settings.images], corrupted, clean)


def _parts(data: TrialData, count: int) -> Iterator[_Part]:
    names = data.names(TEST)
    first = 0
    views: Counter[int] = Counter()
    for images, targets in data.evaluation_batches(TEST):
        if isinstance(targets, MaskViews):
            samples = targets.samples
        else:
            samples = list(range(first, first + len(images)))
        first += len(images)
        # Samples ascend: those that count are the first rows.
        samples = [sample for sample in samples if sample < count]
        if not samples:
            return
        size = len(samples)
        streams = []
        for sample in samples:
            # Windows over one picture have streams of their own.
            streams.append(f"{names[sample]}#{views[sample]}" if views[sample] else names[sample])
            views[sample] += 1
        yield _Part(data.pixels_of(images[:size]), targets[:size], streams)


def _files(data: TrialData, settings: CorruptionSettings) -> _Source:
    """Pictures that were corrupted before."""
    assert settings.folder is not None
    files = CorruptedFiles(settings.folder, settings.names, data.num_classes)
    count = min(settings.images, files.count)
    targets = torch.from_numpy(files.labels(count)).to(data.device)

    def corrupted(name: str, severity: int) -> Batches:
        pictures = files.pictures(name, severity, count)
        size = data.spec.shared.eval_batch_size
        for start in range(0, count, size):
            yield data.view_of(pictures[start : start + size]), targets[start : start + size]

    return _Source([str(number) for number in range(count)], corrupted, None)


def _error(model: TaskModel, data: TrialData, batches: Batches) -> tuple[float, Tensor | None]:
    """Error in per cent, and that of each sample (N,) where the task has it."""
    task = task_of(data)
    metric = task.metrics.corruption
    if metric is None:
        raise ValueError(f"Corruption errors need a metric of shares, but the task {task.name()!r} names none.")
    accumulator = task.accumulator()
    dtype = resolve_precision(data.spec.shared.precision, data.device)
    evaluate(lambda images: task.predict(model, model.features(images)), batches, accumulator, dtype)
    value = accumulator.compute([metric.key])[metric.key]
    right = accumulator.per_sample().get(CORRECT)
    return 100 * (1 - value), 100 * (1 - right.double()) if isinstance(right, Tensor) else None
