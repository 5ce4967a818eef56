"""The training loop and prediction, in plain torch: no ray, mlflow, optuna or pyarrow.

How far a unit of training has come, for a checkpoint in its middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from trainables.engine.contract import TrainingConfig
from trainables.engine.optim import rate_factor, set_rates
from trainables.models.micro_batch import MicroBatch
from trainables.models.precision import autocast
from trainables.specs.errors import NonFiniteError
from trainables.specs.fault_injection import fault_point


@dataclass
class Progress:
    """How far a unit has come: sums over its images, which stay on the device."""

    loss_sum: Tensor
    """float64"""
    correct: Tensor
    """int64"""
    images: int = 0
    steps: int = 0

    @classmethod
    def none(cls, device: torch.device) -> Progress:
        """That of a unit which begins."""
        return cls(
            torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device)
        )

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        counts = torch.tensor([self.images, self.steps])
        return {"loss_sum": self.loss_sum, "correct": self.correct, "counts": counts}

    @classmethod
    def of(cls, state: Mapping[str, Tensor], device: torch.device) -> Progress:
        """From a checkpoint; the tensors are copied."""
        images, steps = state["counts"].tolist()
        loss_sum, correct = (state[name].to(device, copy=True) for name in ("loss_sum", "correct"))
        return cls(loss_sum, correct, images, steps)


Batches = Iterable[tuple[Tensor, Tensor]]
"""Pairs of inputs (B, …) and int64 labels (B,), both on the device."""


class Observer(Protocol):
    """Something that watches the steps of one unit, such as `trainables.diagnostics.gradients.GradientNorms`; it must
    neither change anything nor wait for the device before `means`. `state` and `load_state` are for a checkpoint in
    the middle of the unit."""

    def __call__(self) -> None: ...

    def means(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class UnitResult:
    """What one unit of training did: means over its images."""

    loss: float
    accuracy: float
    images: int
    observed: Mapping[str, float] = field(default_factory=dict)
    """What an observer measured over its steps, by the names of the record."""


def set_training_mode(model: nn.Module, frozen: nn.Module | None, bn_mode: str) -> None:
    """Train mode, with two exceptions: a `frozen` part (the backbone of a head-only phase) stays in eval mode, and with
    `bn_mode="eval"` every BatchNorm keeps its statistics (LP-FT, papers/002, Table 5)."""
    model.train()
    if frozen is not None:
        frozen.eval()
    if bn_mode == "eval":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def train_unit(
    forward: Callable[[Tensor], Tensor],
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    *,
    first_step: int,
    total_steps: int,
    dtype: torch.dtype = torch.float32,
    extra_loss: Callable[[Tensor, Tensor, Tensor], Tensor | None] | None = None,
    observer: Observer | None = None,
    progress: Progress | None = None,
    after_step: Callable[[], object] | None = None,
    micro_batch: MicroBatch | None = None,
) -> UnitResult:
    """One optimiser step per batch; the device is read only once, at the end. Where memory runs out the batch goes
    through the network in pieces whose gradients add up to its own.

    Args:
        forward: inputs (B, …) → logits (B, K); a model, or a head where the inputs are cached features.
        batches: the unit's batches, without those that `progress` counts already.
        optimizer: see `trainables.engine.optim.build_optimizer`.
        config: label smoothing, clipping and the schedule.
        first_step: steps of the phase before this unit.
        total_steps: steps of the whole phase, the length of the schedule.
        dtype: autocast type of the forward pass.
        extra_loss: `(inputs, logits, labels)` → scalar to add, or None.
        observer: looks at every step's gradients before they are clipped.
        progress: what was done of the unit before; kept up to date. None = nothing.
        after_step: called after every step, when `progress` counts it.
        micro_batch: how many images fit at once, as far as it is known; kept up to date.

    Raises:
        NonFiniteError, ValueError: a loss of the unit was NaN or infinite; `batches` is empty.
    """
    parameters = [p for table in optimizer.param_groups for p in table["params"]]
    device = parameters[0].device
    done, micro = progress or Progress.none(device), micro_batch or MicroBatch()

    loss_of = partial(_loss, forward, extra_loss, config.label_smoothing, device, dtype)
    for inputs, labels in batches:
        set_rates(optimizer, rate_factor(first_step + done.steps, total_steps, config))
        work = partial(_gradient, loss_of, inputs, labels, optimizer, micro, done.steps + 1)
        loss, correct = micro.attempt(work, len(labels), "training on")
        _update(optimizer, parameters, config.clip_norm, observer)
        done.loss_sum += loss * len(labels)
        done.correct += correct
        done.images, done.steps = done.images + len(labels), done.steps + 1
        if device.type == "cpu" and not bool(done.loss_sum.isfinite()):  # free on a CPU; a GPU would have to wait
            break
        if after_step is not None:
            after_step()
    if done.images == 0:
        raise ValueError("A unit must have at least one batch, but got none.")
    mean_loss = float(done.loss_sum) / done.images
    check_finite(mean_loss, "training loss", f"by step {done.steps} of its unit")
    observed = dict(observer.means()) if observer is not None else {}
    if micro.size is not None:
        observed["cost/micro_batch"] = float(micro.size)
    return UnitResult(mean_loss, int(done.correct) / done.images, done.images, observed)


def _loss(
    forward: Callable[[Tensor], Tensor],
    extra_loss: Callable[[Tensor, Tensor, Tensor], Tensor | None] | None,
    label_smoothing: float,
    device: torch.device,
    dtype: torch.dtype,
    inputs: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mean loss of a batch and how many of it are right, both still on the device."""
    with autocast(device, dtype):
        logits = forward(inputs)
        loss = functional.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
        extra = extra_loss(inputs, logits, labels) if extra_loss is not None else None
    return (loss if extra is None else loss + extra), (logits.detach().argmax(1) == labels).sum()


def _gradient(
    loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    inputs: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    micro: MicroBatch,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Leave the gradient of the batch's mean loss in the parameters; returns the loss and how many were right."""
    optimizer.zero_grad(set_to_none=True)
    losses, correct = [], []
    for piece in micro.pieces(len(labels)):
        loss, right = loss_of(inputs[piece], labels[piece])
        if fault_point("step", step=step) == "nan":
            loss = loss * torch.nan
        if len(labels[piece]) < len(labels):
            loss = loss * (len(labels[piece]) / len(labels))
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        correct.append(right)
    return torch.stack(losses).sum(), torch.stack(correct).sum()


def _update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    clip_norm: float | None,
    observer: Observer | None,
) -> None:
    if observer is not None:
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
    """Logits (N, K) float32 and labels (N,) int64 on the CPU, in the order of `batches`.

    The caller puts the model in eval mode.
    """
    logits, labels, micro = [], [], MicroBatch()

    def outputs(inputs: Tensor, found: list[Tensor]) -> None:
        done = sum(map(len, found))  # what went through before memory ran out is not done again
        for piece in micro.pieces(len(inputs) - done):
            with autocast(inputs.device, dtype):
                found.append(forward(inputs[done:][piece]).float())

    for inputs, target in batches:
        found: list[Tensor] = []
        micro.attempt(partial(outputs, inputs, found), len(inputs), "evaluating")
        logits += found
        labels.append(target)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()
