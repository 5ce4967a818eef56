"""Classification: one class per image, a linear head on pooled features, cross-entropy."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.models.task_model import TaskModel
from trainables.specs.metrics import ACCURACY, CLASSIFICATION, TaskMetrics
from trainables.tasks.base import ClosedFormProbe, Task
from trainables.tasks.classification_metrics import classification_metrics
from trainables.tasks.linear_probe_head import best_linear_probe, take_probe

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.backbone import Backbone
    from trainables.specs.measurements import Report


class Classification(Task):
    """Outputs are logits (B, K); targets are labels (B,) int64."""

    metrics: ClassVar[TaskMetrics] = CLASSIFICATION
    label_smoothing: ClassVar[bool] = True
    keeps_predictions: ClassVar[bool] = True

    def build_model(self, backbone: Backbone, seed: int) -> TaskModel:
        """A copy of the backbone under a linear head, see `new_classifier`."""
        device = next(backbone.module.parameters()).device
        return new_classifier(backbone, len(self.targets.classes), device, seed)

    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        *,
        label_smoothing: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """Cross-entropy in float32."""
        return functional.cross_entropy(outputs.float(), targets, label_smoothing=label_smoothing, reduction=reduction)

    def training_metrics(self) -> TrainingAccuracy:
        """Accuracy on the training batches, as they were seen."""
        return TrainingAccuracy()

    def accumulator(self) -> ClassificationScores:
        """Accuracy, negative log-likelihood and calibration error."""
        return ClassificationScores()

    @classmethod
    def closed_form_probe(cls) -> ClosedFormProbe:
        """L2-regularised logistic regression."""
        return LogisticProbe()


class TrainingAccuracy:
    """Share of images whose top logit is their label's."""

    def __init__(self) -> None:
        self._correct: Tensor | int = 0
        """int64 on the device, once there was a batch."""
        self._images = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._correct = self._correct + (outputs.detach().argmax(1) == targets).sum()
        self._images += len(targets)

    def merge(self, other: TrainingAccuracy) -> None:
        self._correct = self._correct + other._correct
        self._images += other._images

    def compute(self) -> dict[str, float]:
        return {ACCURACY.key: int(self._correct) / self._images}

    def state(self) -> dict[str, Tensor]:
        return {"correct": torch.as_tensor(self._correct), "images": torch.tensor(self._images)}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        self._correct = state["correct"].to(device, copy=True)
        self._images = int(state["images"])


class ClassificationScores:
    """Logits of a split, kept until all are there: a calibration error is no mean over batches."""

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._logits.append(outputs.float())
        self._labels.append(targets)

    def compute(self) -> dict[str, float]:
        return classification_metrics(*self._collected())

    def per_sample(self) -> dict[str, Tensor]:
        logits, labels = self._collected()
        return {
            "correct": logits.argmax(1) == labels,
            "nll": functional.cross_entropy(logits.double(), labels, reduction="none"),
        }

    def _collected(self) -> tuple[Tensor, Tensor]:
        if not self._logits:
            raise ValueError("Metrics need at least one sample, but got none.")
        return torch.cat(self._logits).cpu(), torch.cat(self._labels).cpu()


class LogisticProbe:
    """The linear probe: logistic regression along a path of C, the best of which ID validation chooses."""

    def fit(self, model: TaskModel, data: TrialData, path: Sequence[float] | None = None) -> Report:
        return take_probe(model, best_linear_probe(data, path))


def new_classifier(backbone: Backbone, num_classes: int, device: torch.device | str, seed: int) -> TaskModel:
    """A fresh copy of a backbone under an untrained linear head.

    The head has `nn.Linear`'s own initialisation (Kaiming uniform with a = √5, that is ±1/√D), drawn from `seed` alone.
    Global generators are left as they were.
    """
    # On the meta device first: `nn.Linear` would draw its initialisation from the global generator.
    head = nn.Linear(backbone.num_features, num_classes, device="meta").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(backbone.num_features)
    nn.init.uniform_(head.weight, -bound, bound, generator=generator)
    nn.init.uniform_(head.bias, -bound, bound, generator=generator)
    return TaskModel(copy.deepcopy(backbone.module), head).to(device)


TASK = Classification
