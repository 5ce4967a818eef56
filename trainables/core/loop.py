"""The training loop and prediction, in plain torch: no ray, mlflow, optuna or pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from trainables.core.contract import TrainingConfig
from trainables.core.faults import reach
from trainables.core.micro_batch import MicroBatch
from trainables.core.optim import rate_factor, set_rates
from trainables.core.progress import Progress

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


class NonFiniteError(RuntimeError):
    """Training or validation loss became NaN or infinite: the trial failed and its numbers mean nothing."""


@dataclass(frozen=True)
class UnitResult:
    """What one unit of training did: means over its images."""

    loss: float
    accuracy: float
    images: int
    observed: Mapping[str, float] = field(default_factory=dict)
    """What an observer measured over its steps, by the names of the record."""


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The autocast type: "auto" is bfloat16 on a GPU that has it, float32 elsewhere."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on `device`; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


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
        optimizer: see `trainables.core.optim.build_optimizer`.
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
        if reach("step", step=step) == "nan":
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
