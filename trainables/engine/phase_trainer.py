"""Gradient training of one phase of a trial.

Its optimiser, the order of the samples, cached features of a frozen backbone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainables.diagnostics.gradients import GradientNorms, moving_kinds
from trainables.engine.best_weights import is_pristine
from trainables.engine.contract import Phase, Strategy, TrainingConfig, moving_groups
from trainables.engine.loop import (
    Batches,
    Forward,
    Observer,
    PhaseSteps,
    Progress,
    UnitResult,
    predict,
    set_training_mode,
    train_unit,
)
from trainables.engine.optim import build_optimizer, freeze_all_but, rate_factor, select_groups, set_rates
from trainables.engine.rng_state import generator_states, set_generator_states
from trainables.models.micro_batch import MicroBatch
from trainables.specs.seeds import stream_seed

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel
    from trainables.tasks.base import Task

_MICRO_BATCH_SIZE = "memory/size"


class PhaseTrainer:
    """A new optimiser over the groups that `phase` names; everything else is frozen.

    Where only the head moves, the backbone stays in eval mode and runs without gradients. Where its features are pooled
    as well, without augmentation and extra loss, it runs only once: the features are computed for the whole phase, or
    taken from the shared cache if the backbone is still the pretrained one.

    Args:
        model, strategy, task, phase, data: the trial's.
        prepared: what the strategy's `prepare` returned as state.
        unit_steps: optimiser steps of one unit.
        dtype: autocast type.

    Raises:
        ValueError: see `trainables.engine.optim.select_groups`.
        TypeError: the strategy's Config does not extend TrainingConfig.
    """

    def __init__(
        self,
        model: TaskModel,
        strategy: Strategy,
        task: Task,
        phase: Phase,
        data: TrialData,
        *,
        prepared: Any = None,
        unit_steps: int,
        dtype: torch.dtype,
    ) -> None:
        if not isinstance(strategy.config, TrainingConfig):
            raise TypeError(f"{strategy.name()} trains by gradient, so its Config must extend TrainingConfig.")
        self.model = model
        self.strategy = strategy
        self.task = task
        self.data = data
        self.dtype = dtype
        self.config: TrainingConfig = strategy.config
        shared = data.spec.shared
        # Replaces no choice: `check_loss` refuses a strategy that smooths labels or has a schedule by itself.
        if shared.loss.label_smoothing is not None:
            self.config = dataclasses.replace(self.config, label_smoothing=shared.loss.label_smoothing)
        if shared.schedule is not None:
            self.config = dataclasses.replace(self.config, schedule=shared.schedule)
        self.unit_steps = unit_steps
        self.total_steps = unit_steps * phase.units
        groups = select_groups(moving_groups(strategy, model, prepared), phase)
        # Before `head_only` is read off `requires_grad`: an earlier phase may have trained other groups.
        freeze_all_but(model, groups)
        self.optimizer = build_optimizer(groups, self.config, lambda: task.feature_scale(data))
        self.head_only = not any(p.requires_grad for p in model.backbone.parameters())
        # An extra loss may depend on images or backbone, which training on cached features never sees.
        plain_loss = type(strategy).extra_loss is Strategy.extra_loss
        self._extra_loss = None if plain_loss else self._strategy_loss
        self._micro_batch = MicroBatch()
        self._progress: Progress | None = None
        self._observer: Observer | None = None
        self._restored: Mapping[str, Tensor] = {}
        """State of a unit that was interrupted and has not continued yet."""
        self._features: tuple[Tensor, Tensor] | None = None
        if self.head_only and model.pooled and plain_loss and not shared.augment:
            self._features = self._whole_features()

    def unit(
        self, seed: int, steps_before: int, unit_in_phase: int, after_step: Callable[[], object] | None = None
    ) -> UnitResult:
        """Train one unit, or the rest of the one that `load_unit_state` restored.

        Args:
            seed: the trial's.
            steps_before: optimiser steps of the whole trial before the unit (they fix epoch and order).
            unit_in_phase: 0-based.
            after_step: called after every step; `unit_state` then is that of the middle of the unit.
        """
        # At every unit: the validation after the last one left the network in eval mode.
        set_training_mode(self.model, self.model.backbone, self.config.bn_mode, self.head_only)
        first_step = unit_in_phase * self.unit_steps
        self._observer = self._new_observer()
        if self._restored:
            self._progress = self._continue(_by_part(self._restored), first_step)
            self._restored = {}
        else:
            self._progress = Progress.start(self.task, self.data.device)
        try:
            return train_unit(
                self._steps(),
                self._batches(seed, steps_before, self._progress.steps),
                first_step,
                observer=self._observer,
                progress=self._progress,
                after_step=after_step,
            )
        finally:
            self._progress = None

    def _steps(self) -> PhaseSteps:
        return PhaseSteps(
            forward=self._forward(),
            optimizer=self.optimizer,
            config=self.config,
            task=self.task,
            total_steps=self.total_steps,
            dtype=self.dtype,
            extra_loss=self._extra_loss,
            micro_batch=self._micro_batch,
        )

    def _continue(self, parts: Mapping[str, Mapping[str, Tensor]], first_step: int) -> Progress:
        """Restore rates, random generators and observer; returns the interrupted unit's progress."""
        progress = Progress.from_state(parts["progress"], self.task, self.data.device)
        # Rates of the last step done: if it was the unit's last one, none of the steps to come sets them.
        set_rates(self.optimizer, rate_factor(first_step + progress.steps - 1, self.total_steps, self.config))
        set_generator_states(parts["random"], self.data.device)
        if self._observer is not None:
            self._observer.load_state(parts["observer"])
        return progress

    @property
    def steps_done(self) -> int:
        """Steps done of the unit under way or interrupted; 0 between two units."""
        if self._progress is not None:
            return self._progress.steps
        if not self._restored:
            return 0
        return Progress.from_state(_by_part(self._restored)["progress"], self.task, self.data.device).steps

    def unit_state(self) -> dict[str, Tensor]:
        """Progress of the unit under way, with the random generators.

        Between two units, nothing of both. Includes the micro-batch size: a different one changes floating-point
        rounding and the use of random numbers.
        """
        state = self._progress_state()
        if self._micro_batch.size is not None:
            state[_MICRO_BATCH_SIZE] = torch.tensor(self._micro_batch.size)
        return state

    def _progress_state(self) -> dict[str, Tensor]:
        if self._progress is None:
            return dict(self._restored)
        parts = {"progress": self._progress.state(), "random": generator_states(self.data.device)}
        if self._observer is not None:
            parts["observer"] = self._observer.state()
        return {f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

    def load_unit_state(self, state: Mapping[str, Tensor]) -> None:
        """Let the next `unit` continue from what `unit_state` returned."""
        self._restored = {name: value for name, value in state.items() if name != _MICRO_BATCH_SIZE}
        if _MICRO_BATCH_SIZE in state:
            self._micro_batch.size = int(state[_MICRO_BATCH_SIZE])

    def _new_observer(self) -> Observer | None:
        if "gradients" not in {*self.strategy.measures, *self.data.spec.shared.diagnostics}:
            return None
        return GradientNorms(moving_kinds(self.model, self.data.reference))

    def _forward(self) -> Forward:
        if self._features is not None:
            return self.model.outputs
        return self._head_on_frozen if self.head_only else self.model

    def _head_on_frozen(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.model.features(images)
        return self.model.outputs(features, targets)

    def _strategy_loss(self, images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return self.strategy.extra_loss(self.model, images, outputs, targets)

    def _batches(self, seed: int, steps_before: int, done: int) -> Batches:
        step = steps_before + done
        end = steps_before + self.unit_steps
        while step < end:
            # A unit need not be an epoch (`steps_per_unit`): it may begin in the middle of one, and span several.
            epoch, offset = divmod(step, self.data.steps_per_epoch)
            count = min(end - step, self.data.steps_per_epoch - offset)
            yield from islice(self._epoch(seed, epoch, offset), count)
            step += count

    def _epoch(self, seed: int, epoch: int, offset: int) -> Iterator[tuple[Tensor, Tensor]]:
        # By epoch, not by unit: the order of the samples does not depend on how long a unit is.
        order = stream_seed(seed, "shuffle", epoch)
        if self._features is not None:
            return self.data.feature_batches(*self._features, shuffle_seed=order, start=offset)
        augment = stream_seed(seed, "augment", epoch)
        return self.data.batches("train", shuffle_seed=order, augment_seed=augment, drop_last=True, start=offset)

    def _whole_features(self) -> tuple[Tensor, Tensor] | None:
        device = self.data.device
        if is_pristine(self.model.backbone, self.data.reference):
            # Copied into aligned memory: matrix products on a mapped file may round differently.
            features = torch.tensor(self.data.features("train"))
            return features.to(device), torch.tensor(self.data.labels("train")).to(device)
        if self.total_steps < self.data.steps_per_epoch:
            return None  # the phase does not use every image once
        # As a frozen backbone is while its head trains: no dropout, BatchNorm with its own statistics.
        self.model.eval()
        computed, targets = predict(self.model.features, self.data.batches("train"), self.dtype)
        return computed.to(device), targets.to(device)


def _by_part(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_state` returned, into an optimiser over the same parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # torch numbers parameters by their position in the groups; a checkpoint names them as the network does.
    state = optimizer.state_dict()
    moving = [p for table in optimizer.param_groups for p in table["params"]]
    indices = [i for table in state["param_groups"] for i in table["params"]]
    for index, parameter in zip(indices, moving, strict=True):
        prefix = f"{names[id(parameter)]}/"
        # Copies: `load_state_dict` may keep a tensor as it is, and the optimiser updates its state in place.
        entries = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
        if entries:
            state["state"][index] = entries
    optimizer.load_state_dict(state)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's tensors (momentum, second moments, step counts) as `<parameter name>/<key>`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }
