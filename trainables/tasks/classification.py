"""Classification: one class per image, a linear head on pooled features, cross-entropy."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.models.task_model import TaskModel
from trainables.specs.metrics import ACCURACY, CLASSIFICATION, TEMPERATURE, WEIGHTED_NLL, TaskMetrics
from trainables.tasks.base import (
    PLAIN,
    PROBE_RULE,
    Calibration,
    ClosedFormProbe,
    MetricAccumulator,
    ProbeRule,
    TargetSpec,
    Task,
    TaskSettings,
)
from trainables.tasks.class_weights import balanced_weights
from trainables.tasks.classification_metrics import classification_metrics, fitted_temperature
from trainables.tasks.classification_tables import CONFUSION, PER_CLASS, confusion_table, per_class_table
from trainables.tasks.linear_probe_head import best_linear_probe, take_probe

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.backbone import Backbone
    from trainables.specs.measurements import Curve, Report


class Classification(Task):
    """Outputs are logits (B, K); targets are labels (B,) int64."""

    metrics: TaskMetrics = CLASSIFICATION
    label_smoothing: ClassVar[bool] = True
    keeps_predictions: ClassVar[bool] = True
    class_weights: ClassVar[bool] = True
    focal: ClassVar[bool] = True

    def __init__(self, targets: TargetSpec, settings: TaskSettings = PLAIN) -> None:
        super().__init__(targets, settings)
        self._weights: Tensor | None = None
        """(K,) float32"""
        self._copies: dict[torch.device, Tensor] = {}
        if settings.loss.class_weights is not None:
            if targets.counts is None:
                raise ValueError("class_weights need the training samples of each class, but none are given.")
            self._weights = torch.tensor(balanced_weights(targets.counts), dtype=torch.float32)
            self.metrics = dataclasses.replace(self.metrics, loss=WEIGHTED_NLL)

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
        """Cross-entropy in float32, weighted by class and focal where the study asks for it.

        The mean is over samples, not over weights: it is then the same for a batch and for its micro-batches, and
        weights of mean 1 leave the size of the loss as it is.
        """
        logits = outputs.float()
        gamma = self.settings.loss.focal_gamma
        if self._weights is None and gamma is None:
            return functional.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction=reduction)
        losses = functional.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
        if gamma is not None:
            losses = focal_factor(losses, gamma) * losses
        if self._weights is not None:
            # Not by torch's `weight`, which divides the mean by the sum of the weights.
            losses = self._weights_on(losses.device)[targets] * losses
        return losses.mean() if reduction == "mean" else losses.sum()

    def _weights_on(self, device: torch.device) -> Tensor:
        """The class weights on a device.

        Copied once, since a copy at every step would wait for a GPU.
        """
        assert self._weights is not None
        if device not in self._copies:
            self._copies[device] = self._weights.to(device)
        return self._copies[device]

    def training_metrics(self) -> TrainingAccuracy:
        """Accuracy on the training batches, as they were seen."""
        return TrainingAccuracy()

    def accumulator(self) -> ClassificationScores:
        """Every metric of `trainables.tasks.classification_metrics`."""
        return ClassificationScores(self._weights)

    def calibrate(self, validation: MetricAccumulator) -> Calibration:
        """The temperature of the logits."""
        assert isinstance(validation, ClassificationScores)
        temperature = fitted_temperature(*validation.predictions())
        return Calibration(temperature, {TEMPERATURE.name: temperature})

    def tables(self, splits: Mapping[str, MetricAccumulator]) -> Mapping[str, Curve]:
        """Recall, precision and F1 of every class, and the confusion matrix."""
        predictions = {}
        for split, scores in splits.items():
            assert isinstance(scores, ClassificationScores)
            predictions[split] = scores.predictions()
        return {
            PER_CLASS: per_class_table(predictions, self.targets.classes),
            CONFUSION: confusion_table(predictions, self.targets.classes),
        }

    @classmethod
    def closed_form_probe(cls) -> ClosedFormProbe:
        """L2-regularised logistic regression."""
        return LogisticProbe()


def focal_factor(losses: Tensor, gamma: float) -> Tensor:
    """(1 − p)^γ for cross-entropies −log p (Lin et al., 2017, eq. 4)."""
    # By expm1: 1 − exp(−loss) would be 0 for small losses, and its power has no gradient there for γ < 1.
    return (-torch.expm1(-losses)).clamp(min=torch.finfo(losses.dtype).tiny) ** gamma


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
    """Logits of a split, kept until all are there.

    A calibration error is no mean over batches.

    Args:
        weights: (K,) of the classes, for `weighted_nll`; None = none.
    """

    def __init__(self, weights: Tensor | None = None) -> None:
        self._weights = weights
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._logits.append(outputs.float())
        self._labels.append(targets)

    def compute(self, keys: Collection[str] | None = None, calibration: float | None = None) -> dict[str, float]:
        logits, labels = self.predictions()
        values = classification_metrics(logits, labels, keys, calibration)
        if keys is not None and WEIGHTED_NLL.key in keys and self._weights is not None:
            losses = functional.cross_entropy(logits.double(), labels, reduction="none")
            values[WEIGHTED_NLL.key] = float((self._weights.double()[labels] * losses).mean())
        return values

    def per_sample(self) -> dict[str, Tensor]:
        logits, labels = self.predictions()
        return {
            "correct": logits.argmax(1) == labels,
            "nll": functional.cross_entropy(logits.double(), labels, reduction="none"),
        }

    def predictions(self) -> tuple[Tensor, Tensor]:
        """Logits (N, K) float32 and labels (N,) on the CPU; no update may follow."""
        if not self._logits:
            raise ValueError("Metrics need at least one sample, but got none.")
        # Kept on the CPU from now on: scores of several splits need not lie on a GPU at the same time.
        self._logits = [torch.cat(self._logits).cpu()]
        self._labels = [torch.cat(self._labels).cpu()]
        return self._logits[0], self._labels[0]


class LogisticProbe:
    """The linear probe: logistic regression along a path of C.

    ID validation chooses C.
    """

    def fit(
        self, model: TaskModel, data: TrialData, path: Sequence[float] | None = None, rule: ProbeRule = PROBE_RULE
    ) -> Report:
        return take_probe(model, best_linear_probe(data, path, rule))


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
