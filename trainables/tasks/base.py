"""The task seam: what is learned, apart from how the network is tuned.

A strategy says what may move; a task says how a head is built, what the loss is, and what is measured. Loop, best
weights, evaluation and record know neither a loss nor a metric: they take both from here and from the task's table in
`trainables.specs.metrics`.

Adding a task: its `TaskMetrics` there, and a file `trainables/tasks/<name>.py` with a subclass of `Task` as `TASK`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from trainables.specs.measurements import split_report
from trainables.specs.trial_spec import PLAIN_LOSS, LossSettings

if TYPE_CHECKING:
    from trainables.data.square_images import ImageTransform
    from trainables.data.trial_data import TrialData
    from trainables.models.backbone import Backbone
    from trainables.models.task_model import TaskModel
    from trainables.specs.measurements import Curve, Report
    from trainables.specs.metrics import TaskMetrics

HeadInit = Literal["random", "zeros", "linear_probe"]
ProbeRule = Literal["nll_one_se", "nll", "one_se", "argmax"]
"""How a closed-form probe's regularisation is chosen on ID validation. `argmax`: the best selection metric (Ha et al.,
2024). `nll`: the lowest negative log-likelihood. `one_se`, `nll_one_se`: the strongest whose selection metric,
respectively likelihood, is within one standard error of the best, that of the paired difference (after Breiman et al.,
1984, "Classification and Regression Trees", section 3.4.3)."""
PROBE_RULE: ProbeRule = "nll_one_se"
"""The default, by `benchmarks/probe_rule.py`."""


@dataclass(frozen=True)
class TargetSpec:
    """What a task must know of the targets in a data store."""

    classes: tuple[str, ...]
    """Class names, by label."""
    counts: tuple[int, ...] | None = None
    """Training samples of each class; given where the loss depends on them."""


@dataclass(frozen=True)
class TaskSettings:
    """What a study may choose about a task."""

    metric: str | None = None
    """Key of the metric that selects; None = the task's own."""
    loss: LossSettings = PLAIN_LOSS
    decoder: str | None = None
    """Head on dense features, one of `Task.decoders`; None = the task's own choice."""


PLAIN = TaskSettings()
"""A task as it is."""


Statistic = Tensor | list[bytes]
"""Of N samples: a tensor (N, …), or the content of one file of each, such as a mask as PNG."""


class TrainingMetrics(Protocol):
    """Metrics of the batches of one unit of training, summed on the device.

    Called once per step, so it must not make the host wait for the device before `compute`.
    """

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch, or a micro-batch of it."""

    def merge(self, other: Self) -> None:
        """Add the counts of another instance.

        Those of a batch whose every micro-batch fitted into memory.
        """

    def compute(self) -> dict[str, float]:
        """Values by metric key."""

    def state(self) -> dict[str, Tensor]:
        """Counts so far, for a checkpoint in the middle of the unit."""

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Continue from what `state` returned; tensors are copied."""


class MetricAccumulator(Protocol):
    """Metrics of one split.

    Computed from the outputs of an evaluation, in the order of its samples.
    """

    def update(self, outputs: Tensor, targets: Any) -> None:
        """Take in a batch, or a micro-batch of it.

        Args:
            outputs: (B, …).
            targets: those of `TrialData.evaluation_batches`, a row per output.
        """

    def compute(self, keys: Collection[str] | None = None, calibration: Any = None) -> dict[str, float]:
        """Values by metric key.

        Args:
            keys: of the metrics that are needed; None = those of `TaskMetrics.reported`. Metrics that do not apply to
                the targets are left out.
            calibration: state of a `Calibration`, for the metrics that need it.

        Raises:
            ValueError: no sample was taken in.
        """

    def per_sample(self) -> Mapping[str, Statistic]:
        """Sufficient statistics of each sample by name, (N, …) on the CPU or one file's content per sample.

        Correct or not; intersection and union per class; the score of an answer. For intervals over samples and paired
        comparisons.
        """


@dataclass(frozen=True)
class Calibration:
    """What a task fitted on ID validation.

    For the metrics of the tested weights, such as a temperature.
    """

    state: Any
    """Given to `MetricAccumulator.compute`."""
    report: Mapping[str, float]
    """Metrics to record once, by recorded name."""


class ClosedFormProbe(Protocol):
    """A head's optimum on frozen pooled features, solved rather than trained."""

    def fit(
        self, model: TaskModel, data: TrialData, path: Sequence[float] | None = None, rule: ProbeRule = PROBE_RULE
    ) -> Report:
        """Put a solution along a path into the model's head.

        Args:
            path: ascending inverse regularisation strengths, one of which ID validation chooses; None = the task's own.
            rule: by which it is chosen.

        Returns:
            Metrics to record, such as the chosen strength, and the curve that it was chosen on.
        """


class Task(ABC):
    """What is learned.

    One instance serves all trials on the same targets and settings: it keeps no state of a trial.

    Shapes: images (B, 3, H, W) float32, normalised. Outputs and targets are the task's own; both have one row per
    sample first, because a batch that does not fit into memory is cut along it.

    Args:
        targets: of the data store.
        settings: of the study.

    Raises:
        ValueError: a metric that cannot select.
    """

    metrics: TaskMetrics
    """Of the class: row of the metric table, whose `task` is the task's name. Of an instance: the same, with the metric
    that selects in its study."""
    label_smoothing: ClassVar[bool] = False
    """Whether `loss` knows label smoothing. Where it does not, a strategy that asks for it is refused."""
    keeps_predictions: ClassVar[bool] = False
    """Whether a trial's predictions are kept: outputs are (N, K), targets integers (N,). Of other tasks the statistics
    of each sample are kept alone."""
    class_weights: ClassVar[bool] = False
    """Whether loss and closed-form probe can weight classes. Where they cannot, a study that asks for it is refused."""
    focal: ClassVar[bool] = False
    """Whether `loss` can be focal. Where it cannot, a study that asks for it is refused."""
    dice: ClassVar[bool] = False
    """Whether `loss` can have a Dice term. Where it cannot, a study that asks for it is refused."""
    trains_probe: ClassVar[bool] = False
    """Whether linear probing means to train the head by gradient, where there is no closed-form probe. Where it does
    not, strategies that need a probe are refused."""
    decoders: ClassVar[tuple[str, ...]] = ()
    """Names of the heads that a study may choose from; none where the task has one head."""

    def __init__(self, targets: TargetSpec, settings: TaskSettings = PLAIN) -> None:
        self.targets = targets
        self.settings = settings
        self.metrics = type(self).metrics.selecting(settings.metric)

    @classmethod
    def name(cls) -> str:
        """Name in a study file."""
        return cls.metrics.task

    @abstractmethod
    def build_model(self, backbone: Backbone, seed: int) -> TaskModel:
        """A fresh copy of a pretrained backbone under an untrained head, on the backbone's device.

        Args:
            backbone: shared by all trials of a process; not changed.
            seed: of the head's random numbers; global generators are left as they were.
        """

    @abstractmethod
    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        *,
        label_smoothing: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """Loss of a batch, a scalar.

        Mean or sum over its samples. Outputs may be of reduced precision.
        """

    def loss_weight(self, targets: Tensor) -> float | Tensor:
        """Number of terms that the mean of `loss` is over.

        Gradients of micro-batches are weighted by it, so that they sum to that of the whole batch. Images by default.
        """
        return len(targets)

    @abstractmethod
    def training_metrics(self) -> TrainingMetrics:
        """Empty counts of `metrics.training`, for one unit."""

    @abstractmethod
    def accumulator(self) -> MetricAccumulator:
        """Empty counts of all metrics but `metrics.training`, for one split."""

    def recording_accumulator(self) -> MetricAccumulator:
        """Empty counts for a split whose samples' statistics will be kept.

        A task whose predictions are too large for `keeps_predictions` may keep a compact form of them, as a further
        statistic.
        """
        return self.accumulator()

    def calibrate(self, validation: MetricAccumulator) -> Calibration | None:
        """Fit on ID validation what metrics of the tested weights need; None = nothing."""
        return None

    def tables(self, splits: Mapping[str, MetricAccumulator]) -> Mapping[str, Curve]:
        """Tables of the predictions, by name; none by default.

        On ID test and every OOD domain.

        Args:
            splits: split → accumulator of this task.
        """
        return {}

    def predict(self, model: TaskModel, features: Tensor) -> Tensor:
        """What an evaluation measures: the forward output, unless a task generates its prediction from features."""
        return model.outputs(features)

    @classmethod
    def closed_form_probe(cls) -> ClosedFormProbe | None:
        """Solver of the head on frozen pooled features; None = the task has none.

        Strategies that solve in closed form are then refused before anything is computed.
        """
        return None

    def initialise_head(
        self, model: TaskModel, data: TrialData, how: HeadInit, probe_rule: ProbeRule = PROBE_RULE
    ) -> Report:
        """Set the head in place; returns metrics to record.

        Args:
            how: `random` (left as drawn from the trial's seed), `zeros`, or `linear_probe` (the closed-form optimum).
            probe_rule: by which the closed-form probe's regularisation is chosen.

        Raises:
            ValueError: `linear_probe` for a task without a closed-form probe.
        """
        if how == "random":
            return {}
        if how == "zeros":
            self.zero_head(model)
            return {}
        probe = self.closed_form_probe()
        if probe is None:
            raise ValueError(no_closed_form(self.name(), "head_init='linear_probe'"))
        # Without the curve, which is that of the linear probe and equal in all trials.
        metrics, _ = split_report(probe.fit(model, data, rule=probe_rule))
        return metrics

    @torch.no_grad()
    def zero_head(self, model: TaskModel) -> None:
        """Set the head to zero, in place.

        A task whose head has hidden layers overrides it to zero the last one: with all of them at zero, no gradient
        would flow.
        """
        for parameter in model.head.parameters():
            parameter.zero_()

    def transform(
        self, pixels: Tensor, targets: Tensor, image_transform: ImageTransform, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Stored pixels and targets of a batch → images and targets that the network sees.

        A task whose targets lie on the image (masks, boxes) overrides it and applies one draw to both. Targets of a
        task with pooled features must not change here: its cached features have no pixels.

        Args:
            pixels: (B, H, W, 3) uint8, on the trial's device.
            image_transform: crops, augments (where it gets the generator) and normalises pixels.
            generator: seeded for this batch; None = no augmentation.
        """
        return image_transform(pixels, generator), targets

    def feature_scale(self, data: TrialData) -> float:
        """Mean squared norm of what the head sees, under the pretrained network.

        The unit of relative head rates (`trainables.engine.optim.resolved_rate`). A task with dense features overrides
        it.
        """
        return data.mean_square_norm()


def no_closed_form(task: str, asked: str) -> str:
    """The sentence that refuses a closed-form solution for a task without one."""
    return (
        f"{asked} solves the head in closed form, which needs a task with a closed-form probe, but {task!r} has none. "
        "Train the head by gradient instead."
    )
