"""Gradient training of one phase of a trial: optimiser, order of the samples, and what need not be computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainables.engine.best_weights import is_pristine
from trainables.engine.contract import Phase, Strategy, TrainingConfig
from trainables.engine.loop import Batches, Observer, Progress, UnitResult, predict, set_training_mode, train_unit
from trainables.engine.optim import build_optimizer, freeze_all_but, rate_factor, select_groups, set_rates
from trainables.engine.rng_state import generator_states, set_generator_states
from trainables.models.micro_batch import MicroBatch
from trainables.specs.seeds import stream_seed

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.backbone import Classifier


class PhaseTraining:
    """A new optimiser over the groups that `phase` names; everything else is frozen.

    Where only the head moves, the backbone stays in eval mode, runs without gradients, and – without augmentation and
    extra loss – only once: its features are computed for the whole phase, or taken from the shared cache if the
    backbone is still the pretrained one.

    Args:
        model, strategy, phase, data: the trial's.
        unit_steps: optimiser steps of one unit.
        dtype: autocast type.

    Raises:
        ValueError: see `trainables.engine.optim.select_groups`.
        TypeError: the strategy's Config does not extend TrainingConfig.
    """

    def __init__(
        self,
        model: Classifier,
        strategy: Strategy,
        phase: Phase,
        data: TrialData,
        *,
        unit_steps: int,
        dtype: torch.dtype,
    ) -> None:
        if not isinstance(strategy.config, TrainingConfig):
            raise TypeError(f"{strategy.name()} trains by gradient, so its Config must extend TrainingConfig.")
        self.model, self.strategy, self.data, self.dtype = model, strategy, data, dtype
        self.config: TrainingConfig = strategy.config
        self.unit_steps, self.total_steps = unit_steps, unit_steps * phase.units
        groups = select_groups(strategy.param_groups(model), phase)
        freeze_all_but(model, groups)
        self.optimizer = build_optimizer(groups, self.config, data.mean_square_norm)
        self.head_only = not any(p.requires_grad for p in model.backbone.parameters())
        plain_loss = type(strategy).extra_loss is Strategy.extra_loss
        self._extra_loss = None if plain_loss else self._strategy_loss
        self._micro_batch = MicroBatch()
        self._progress: Progress | None = None
        self._watch: Observer | None = None
        self._continued: Mapping[str, Tensor] = {}
        self._features: tuple[Tensor, Tensor] | None = None
        if self.head_only and plain_loss and not data.spec.task.augment:
            self._features = self._whole_features()

    def unit(
        self, seed: int, steps_before: int, unit_in_phase: int, after_step: Callable[[], object] | None = None
    ) -> UnitResult:
        """Train one unit, or the rest of the one that `load_unit_state` put back.

        Args:
            seed: the trial's.
            steps_before: optimiser steps of the whole trial before the unit (they fix epoch and order).
            unit_in_phase: 0-based.
            after_step: called after every step; `unit_state` then is that of the middle of the unit.
        """
        set_training_mode(self.model, self.model.backbone if self.head_only else None, self.config.bn_mode)
        device = self.data.device
        self._watch, continued = self._observer(), _by_part(self._continued)
        self._progress = Progress.of(continued["progress"], device) if continued else Progress.none(device)
        if continued:
            last = unit_in_phase * self.unit_steps + self._progress.steps - 1
            set_rates(self.optimizer, rate_factor(last, self.total_steps, self.config))  # no step may be left
            set_generator_states(continued["random"], device)
            if self._watch is not None:
                self._watch.load_state(continued["observer"])
        self._continued = {}
        try:
            return train_unit(
                self._forward(),
                self._batches(seed, steps_before, self._progress.steps),
                self.optimizer,
                self.config,
                first_step=unit_in_phase * self.unit_steps,
                total_steps=self.total_steps,
                dtype=self.dtype,
                extra_loss=self._extra_loss,
                observer=self._watch,
                progress=self._progress,
                after_step=after_step,
                micro_batch=self._micro_batch,
            )
        finally:
            self._progress = None

    @property
    def steps_done(self) -> int:
        """Steps of the unit under way, or of the one that goes on next; 0 between two units."""
        if self._progress is not None:
            return self._progress.steps
        return Progress.of(_by_part(self._continued)["progress"], self.data.device).steps if self._continued else 0

    def unit_state(self) -> dict[str, Tensor]:
        """What the unit under way has gathered, with the random generators; between two units, nothing of both. How
        many images fit at once is part of it: another size is another rounding, and trying again draws again."""
        known = {} if self._micro_batch.size is None else {"memory/size": torch.tensor(self._micro_batch.size)}
        return known | self._gathered()

    def _gathered(self) -> dict[str, Tensor]:
        if self._progress is None:
            return dict(self._continued)
        parts = {"progress": self._progress.state(), "random": generator_states(self.data.device)}
        if self._watch is not None:
            parts["observer"] = self._watch.state()
        return {f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

    def load_unit_state(self, state: Mapping[str, Tensor]) -> None:
        """Let the next `unit` go on from what `unit_state` returned."""
        self._continued = {name: value for name, value in state.items() if name != "memory/size"}
        if "memory/size" in state:
            self._micro_batch.size = int(state["memory/size"])

    def _observer(self) -> Observer | None:
        if "gradients" not in {*self.strategy.measures, *self.data.spec.task.diagnostics}:
            return None
        from trainables.diagnostics.gradients import GradientNorms, moving_kinds

        return GradientNorms(moving_kinds(self.model, self.data.reference))

    def _forward(self) -> Callable[[Tensor], Tensor]:
        if self._features is not None:
            head: nn.Module = self.model.head
            return head
        return self._head_on_frozen if self.head_only else self.model

    def _head_on_frozen(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.model.features(images)
        logits: Tensor = self.model.head(features)
        return logits

    def _strategy_loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor | None:
        return self.strategy.extra_loss(self.model, images, logits, labels)

    def _batches(self, seed: int, steps_before: int, done: int) -> Batches:
        step, end = steps_before + done, steps_before + self.unit_steps
        while step < end:
            epoch, offset = divmod(step, self.data.steps_per_epoch)
            count = min(end - step, self.data.steps_per_epoch - offset)
            yield from islice(self._epoch(seed, epoch, offset), count)
            step += count

    def _epoch(self, seed: int, epoch: int, offset: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = stream_seed(seed, "shuffle", epoch)
        if self._features is not None:
            return self.data.feature_batches(*self._features, shuffle_seed=order, start=offset)
        augment = stream_seed(seed, "augment", epoch)
        return self.data.batches("train", shuffle_seed=order, augment_seed=augment, drop_last=True, start=offset)

    def _whole_features(self) -> tuple[Tensor, Tensor] | None:
        device = self.data.device
        if is_pristine(self.model.backbone, self.data.reference):
            features = torch.tensor(self.data.features("train"))
            return features.to(device), torch.tensor(self.data.labels("train")).to(device)
        if self.total_steps < self.data.steps_per_epoch:
            return None  # the phase does not see every image once
        self.model.eval()
        computed, labels = predict(self.model.features, self.data.batches("train"), self.dtype)
        return computed.to(device), labels.to(device)


def _by_part(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` returned, into an optimiser over the same parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = optimizer.state_dict()
    moving = [p for table in optimizer.param_groups for p in table["params"]]
    indices = [i for table in state["param_groups"] for i in table["params"]]
    for index, parameter in zip(indices, moving, strict=True):
        prefix = f"{names[id(parameter)]}/"
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
