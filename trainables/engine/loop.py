"""Training loop and evaluation of one unit, in plain torch.

No ray, mlflow, optuna or pyarrow, and neither a loss nor a metric: both come from the task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from trainables.engine.contract import TrainingConfig
from trainables.engine.optim import rate_factor, set_rates
from trainables.models.batch_norm import BATCH_NORMS
from trainables.models.micro_batch import MicroBatch
from trainables.models.precision import autocast
from trainables.specs.errors import NonFiniteError
from trainables.specs.fault_injection import fault_point
from trainables.specs.metrics import MICRO_BATCH

if TYPE_CHECKING:
    from trainables.tasks.base import Task, TrainingMetrics

Batches = Iterable[tuple[Tensor, Tensor]]
"""Pairs of inputs and targets, one row per sample each, both on the device."""
Forward = Callable[[Tensor, Tensor], Tensor]
"""Inputs and targets of a batch → outputs for the loss; the targets are for heads that need them while training."""
ExtraLoss = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""Inputs, outputs and targets of a batch → a scalar to add to its loss, or None."""


@dataclass
class Progress:
    """Progress within a unit: sums over its images, which stay on the device."""

    loss_sum: Tensor
    """float64"""
    metrics: TrainingMetrics
    images: int = 0
    steps: int = 0

    @classmethod
    def start(cls, task: Task, device: torch.device) -> Progress:
        """Progress of a unit that begins."""
        return cls(torch.zeros((), dtype=torch.float64, device=device), task.training_metrics())

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint in the middle of the unit."""
        counts = torch.tensor([self.images, self.steps])
        metrics = {f"metrics/{name}": tensor for name, tensor in self.metrics.state().items()}
        return {"loss_sum": self.loss_sum, "counts": counts, **metrics}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], task: Task, device: torch.device) -> Progress:
        """Inverse of `state`; tensors are copied."""
        images, steps = state["counts"].tolist()
        metrics = task.training_metrics()
        prefix = "metrics/"
        counted = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        metrics.load_state(counted, device)
        # A copy even on the same device: the sum is added to in place, and a checkpoint's tensors stay as they are.
        return cls(state["loss_sum"].to(device, copy=True), metrics, images, steps)


class Observer(Protocol):
    """Observer of the steps of one unit, such as `trainables.diagnostics.gradients.GradientNorms`.

    It must neither change anything nor wait for the device before `means`. `state` and `load_state` are for a
    checkpoint in the middle of the unit.
    """

    def __call__(self) -> None: ...

    def means(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class UnitResult:
    """Result of one unit of training, over its images as they were seen."""

    loss: float
    """Mean, extra loss included."""
    metrics: Mapping[str, float]
    """The task's training metrics by key."""
    images: int
    observed: Mapping[str, float] = field(default_factory=dict)
    """Means of an observer over the steps, by recorded name."""


def set_training_mode(model: nn.Module, frozen: nn.Module | None, bn_mode: str) -> None:
    """Train mode, with two exceptions.

    A `frozen` part (the backbone of a head-only phase) stays in eval mode, and with `bn_mode="eval"` every BatchNorm
    keeps its statistics (LP-FT in Ha et al., 2024, Table 5).
    """
    model.train()
    if frozen is not None:
        frozen.eval()
    if bn_mode == "eval":
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()


@dataclass(frozen=True, kw_only=True)
class PhaseSteps:
    """What the optimiser steps of a phase have in common."""

    forward: Forward
    """A model, or a head where the inputs are cached features."""
    optimizer: torch.optim.Optimizer
    """See `trainables.engine.optim.build_optimizer`."""
    config: TrainingConfig
    """Label smoothing, clipping and the schedule."""
    task: Task
    """Loss and training metrics."""
    total_steps: int
    """Of the whole phase: the length of the schedule."""
    dtype: torch.dtype = torch.float32
    """Autocast type of the forward pass."""
    extra_loss: ExtraLoss | None = None
    """Added to the task's loss."""
    micro_batch: MicroBatch = field(default_factory=MicroBatch)
    """Number of images that fit at once, as far as it is known; updated in place."""

    @property
    def parameters(self) -> list[Tensor]:
        """Those that the optimiser moves."""
        return [parameter for table in self.optimizer.param_groups for parameter in table["params"]]

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        parameter: Tensor = next(parameter for table in self.optimizer.param_groups for parameter in table["params"])
        return parameter.device

    def batch_loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of a batch, and its outputs."""
        with autocast(self.device, self.dtype):
            outputs = self.forward(inputs, targets)
            loss = self.task.loss(outputs, targets, label_smoothing=self.config.label_smoothing)
            extra = self.extra_loss(inputs, outputs, targets) if self.extra_loss is not None else None
        if extra is not None:
            loss = loss + extra
        return loss, outputs.detach()


def train_unit(
    phase: PhaseSteps,
    batches: Batches,
    first_step: int,
    *,
    observer: Observer | None = None,
    progress: Progress | None = None,
    after_step: Callable[[], object] | None = None,
) -> UnitResult:
    """Train one unit: one optimiser step per batch.

    The device is read once, at the end. On out-of-memory, falls back to gradient accumulation over micro-batches.

    Args:
        batches: the unit's batches, without those that `progress` counts already.
        first_step: steps of the phase before this unit.
        observer: called at every step, before the gradients are clipped.
        progress: of the unit so far; updated in place. None = the unit begins.
        after_step: called after every step, when `progress` counts it.

    Raises:
        NonFiniteError: the loss became NaN or infinite.
        ValueError: there is no batch.
    """
    parameters = phase.parameters
    device = phase.device
    progress = progress or Progress.start(phase.task, device)
    for inputs, targets in batches:
        # From the step's number, not advanced by a scheduler: a resumed unit has no scheduler state to restore.
        set_rates(phase.optimizer, rate_factor(first_step + progress.steps, phase.total_steps, phase.config))
        attempt = partial(_accumulate_gradient, phase, inputs, targets, progress.steps + 1)
        loss, metrics = phase.micro_batch.attempt(attempt, len(inputs), "training on")
        # Outside of the attempt: an optimiser step that has changed weights must not be repeated.
        _update(phase.optimizer, parameters, phase.config.clip_norm, observer)
        # Sums stay tensors on the device: `float(loss)` would make the host wait for a GPU at every step.
        progress.loss_sum += loss * len(inputs)
        progress.metrics.merge(metrics)
        progress.images += len(inputs)
        progress.steps += 1
        # Checked at every step on a CPU, where it is free; a GPU would have to wait.
        if device.type == "cpu" and not bool(progress.loss_sum.isfinite()):
            break
        if after_step is not None:
            after_step()
    if progress.images == 0:
        raise ValueError("A unit must have at least one batch, but got none.")
    mean_loss = float(progress.loss_sum) / progress.images
    check_finite(mean_loss, "training loss", f"by step {progress.steps} of its unit")
    observed = dict(observer.means()) if observer is not None else {}
    if phase.micro_batch.size is not None:
        observed[MICRO_BATCH.name] = float(phase.micro_batch.size)
    return UnitResult(mean_loss, progress.metrics.compute(), progress.images, observed)


def _accumulate_gradient(
    phase: PhaseSteps, inputs: Tensor, targets: Tensor, step: int
) -> tuple[Tensor, TrainingMetrics]:
    """Leave the gradient of the batch's mean loss in the parameters.

    Returns the loss and the batch's metrics.
    """
    # Also at a repeated attempt: gradients of micro-batches that fitted before memory ran out must not count twice.
    phase.optimizer.zero_grad(set_to_none=True)
    losses = []
    # Of this batch alone: an attempt that runs out of memory leaves nothing behind in the unit's metrics.
    metrics = phase.task.training_metrics()
    for piece in phase.micro_batch.pieces(len(inputs)):
        loss, outputs = phase.batch_loss(inputs[piece], targets[piece])
        metrics.update(outputs, targets[piece])
        if fault_point("step", step=step) == "nan":
            loss = loss * torch.nan
        # A piece's loss is its own mean: weighted by its share, the pieces' gradients sum to that of the batch's mean.
        if len(inputs[piece]) < len(inputs):
            loss = loss * _share(phase.task, targets[piece], targets)
        loss.backward()  # type: ignore[no-untyped-call]
        # Detached: otherwise the list would keep every piece's graph, and micro-batches would save no memory.
        losses.append(loss.detach())
    return torch.stack(losses).sum(), metrics


def _share(task: Task, piece: Tensor, batch: Tensor) -> float | Tensor:
    """Share of a batch's mean loss that a piece of it contributes."""
    total = task.loss_weight(batch)
    # A batch without a term has loss 0, and so has each of its pieces.
    total = total.clamp(min=1) if isinstance(total, Tensor) else total
    return task.loss_weight(piece) / total


def _update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    clip_norm: float | None,
    observer: Observer | None,
) -> None:
    if observer is not None:
        # Before clipping, which would hide how large the gradients were.
        observer()
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.step()


def check_finite(value: float, what: str, where: str) -> None:
    """Raise NonFiniteError where `value` is NaN or infinite."""
    if not torch.isfinite(torch.tensor(value)):
        raise NonFiniteError(
            f"The {what} must be finite, but it was {value!r} {where}. Lower learning rates or clip_norm may help."
        )


@torch.no_grad()
def predict(
    forward: Callable[[Tensor], Tensor], batches: Batches, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Outputs (N, …) float32 and targets (N, …) of all batches.

    On the CPU, in the order of `batches`. The caller puts the model in eval mode.
    """
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    micro_batch = MicroBatch()
    for inputs, batch_targets in batches:
        outputs += [piece.float() for piece in _in_pieces(forward, inputs, micro_batch, dtype)]
        targets.append(batch_targets)
    return torch.cat(outputs).cpu(), torch.cat(targets).cpu()


class Accumulator(Protocol):
    """What an evaluation fills, such as a `trainables.tasks.base.MetricAccumulator`."""

    def update(self, outputs: Tensor, targets: Any) -> None:
        """Take in a batch, or a micro-batch of it."""


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Any]],
    accumulator: Accumulator,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Give outputs and targets of all batches to `accumulator`, in their order.

    The caller puts the model in eval mode.
    """
    micro_batch = MicroBatch()
    for inputs, targets in batches:
        start = 0
        for outputs in _in_pieces(forward, inputs, micro_batch, dtype):
            end = start + len(outputs)
            accumulator.update(outputs, targets[start:end])
            start = end


def _in_pieces(
    forward: Callable[[Tensor], Tensor], inputs: Tensor, micro_batch: MicroBatch, dtype: torch.dtype
) -> list[Tensor]:
    """Outputs of a batch, whole or by micro-batches where memory runs out."""
    outputs: list[Tensor] = []

    def attempt() -> None:
        done = sum(map(len, outputs))  # what went through before memory ran out is not computed again
        rest = inputs[done:]
        for piece in micro_batch.pieces(len(rest)):
            with autocast(inputs.device, dtype):
                outputs.append(forward(rest[piece]))

    micro_batch.attempt(attempt, len(inputs), "evaluating")
    return outputs
