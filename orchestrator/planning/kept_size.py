"""Estimate of the disk space of kept weights and predictions.

From the networks' structure: no weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from orchestrator.planning.build import LODO_CANDIDATES
from orchestrator.planning.configurations import points, structure
from trainables import strategy_class
from trainables.engine.tuned_network import batch_norm_buffers
from trainables.models.task_model import TaskModel

if TYPE_CHECKING:
    from orchestrator.planning.estimates import TrialCounts
    from orchestrator.search.space import SearchSpace
    from orchestrator.study_file.schema import StudySpec

VALUE_BYTES = 4
"""Bytes of a weight or a logit, float32."""
SAMPLE_BYTES = 64
"""Bytes of a sample's predictions without its logits: name, target, split, statistics."""


def weight_bytes(spec: StudySpec, classes: int) -> dict[str, int]:
    """Label → bytes of one trial's kept weights.

    The largest over the default point and the choices of the search.
    """
    model = structure(spec, classes)
    sizes = {}
    for entry in spec.strategies:
        configurations = [
            strategy_class(entry.name, spec.task).from_hparams(hparams) for hparams in points(entry, spec.task)
        ]
        moving = max(strategy.moving_parameters(model) for strategy in configurations)
        sizes[entry.label] = VALUE_BYTES * moving + _statistics_bytes(model)
    return sizes


def prediction_bytes(splits: Mapping[str, int], classes: int) -> int:
    """Bytes of one trial's kept predictions: every split but the training images."""
    samples = sum(count for name, count in splits.items() if name != "train")
    return samples * (VALUE_BYTES * classes + SAMPLE_BYTES)


def kept_trials(spec: StudySpec, counts: TrialCounts, space: SearchSpace) -> tuple[dict[str, int], int]:
    """Trials that keep their files at the end of a study, at most.

    Returns:
        Label → trials known to be of that entry, and the number of those that may be of any entry.
    """
    labels = [entry.label for entry in spec.strategies]
    if spec.keep == "confirmed":
        return {}, counts.confirm
    if spec.keep == "best":
        runners_up = LODO_CANDIDATES if spec.search.objective == "leave_one_domain_out" else 0
        return dict.fromkeys(labels, 1), counts.confirm + runners_up
    given = {label: space.presets[label].size if label in space.presets else 1 for label in labels}
    return given, max(0, counts.total - sum(given.values()))


def kept_bytes_of(
    spec: StudySpec, counts: TrialCounts, space: SearchSpace, splits: Mapping[str, int], classes: int
) -> int:
    """Bytes of everything that a study keeps, at most.

    Trials that may be of any entry count as the largest.
    """
    weights = weight_bytes(spec, classes)
    of_entry, of_any = kept_trials(spec, counts, space)
    trials = sum(of_entry.values()) + of_any
    size = sum(weights[label] * count for label, count in of_entry.items()) + max(weights.values()) * of_any
    return size + trials * prediction_bytes(splits, classes)


def _statistics_bytes(model: TaskModel) -> int:
    """Bytes of BatchNorm's buffers, which every trial keeps."""
    buffers = dict(model.named_buffers())
    return sum(buffers[name].nbytes for name in batch_norm_buffers(model))
