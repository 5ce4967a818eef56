"""CPU time of a training step and an evaluation batch in both memory layouts, by which a study chooses one."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainables.data.trial_data import TrialData
from trainables.engine.budget import BudgetPlan
from trainables.engine.loop import evaluate
from trainables.engine.phase_trainer import PhaseTrainer
from trainables.engine.process_cache import on_device, open_store, pretrained_for
from trainables.engine.registry import strategy_class
from trainables.engine.rng_state import isolated_randomness
from trainables.models.device import training_device
from trainables.models.precision import resolve_precision
from trainables.specs.metrics import TEST, VAL, ood
from trainables.specs.trial_spec import SharedTrialSettings, TrialSpec
from trainables.tasks.registry import task_of_trial

if TYPE_CHECKING:
    from trainables.data.store import StoreLike

MARGIN = 0.03
"""Share of a trial's time that channels last must save: less is within the noise of a measurement this short."""
ROUNDS = 3
"""Timed rounds of each layout, of which the fastest counts."""
SECONDS = 20.0
"""Wall time after which no further round begins; the first is always completed."""
_STILL = {"lr_backbone": 1e-12}
"""Full fine-tuning that hardly moves: a step that diverges would measure nothing, and takes as long."""


@dataclasses.dataclass(frozen=True)
class LayoutSeconds:
    """CPU seconds in one memory layout, over all threads."""

    training_step: float
    """One optimiser step of full fine-tuning on one batch of the study, which is read and transformed as in a trial."""
    evaluation_batch: float
    """One batch of the validation split."""


def measure_layouts(shared: SharedTrialSettings, threads: int | None = None) -> dict[str, Any]:
    """Which memory layout trials compute faster in on this machine, as JSON values.

    `channels_last` is the answer, `device` the type of device; on a CPU also `seconds` by layout (`LayoutSeconds`).
    A GPU is not measured: its convolutions have no other fast layout.

    Args:
        shared: the study's settings; network, image size and batch sizes are those of its trials.
        threads: of torch on the CPU; None = unchanged.

    Raises:
        ValueError: the network cannot be loaded.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = training_device()
    if device.type != "cpu":
        return {"channels_last": True, "device": device.type}
    store = open_store(shared.store)
    with isolated_randomness(0, device):
        samples = {layout: _Sample(shared, store, layout) for layout in (False, True)}
        for sample in samples.values():  # the first pass allocates memory and chooses kernels
            sample.seconds()
        rounds: dict[bool, list[LayoutSeconds]] = {False: [], True: []}
        began = time.perf_counter()
        for number in range(ROUNDS):
            if number and time.perf_counter() - began > SECONDS:
                break
            for layout, sample in samples.items():  # alternately, so that both meet the same disturbances
                rounds[layout].append(sample.seconds())
    best = {layout: _fastest(measured) for layout, measured in rounds.items()}
    trial = {layout: sample.of_trial(best[layout]) for layout, sample in samples.items()}
    return {
        "channels_last": trial[True] < (1 - MARGIN) * trial[False],
        "device": device.type,
        "seconds": {"contiguous": dataclasses.asdict(best[False]), "channels_last": dataclasses.asdict(best[True])},
    }


def _fastest(measured: list[LayoutSeconds]) -> LayoutSeconds:
    return LayoutSeconds(
        min(seconds.training_step for seconds in measured), min(seconds.evaluation_batch for seconds in measured)
    )


class _Sample:
    """Network, optimiser and data of a trial in one layout."""

    def __init__(self, shared: SharedTrialSettings, store: StoreLike, channels_last: bool) -> None:
        # Without class weights and the like: they do not change the time of a step.
        spec = TrialSpec(
            shared=dataclasses.replace(shared, channels_last=channels_last), strategy="full", hparams=_STILL
        )
        device = torch.device("cpu")
        backbone = pretrained_for(shared.model, shared.image_size, store.image_size, shared.cache, shared.view)
        local = on_device(backbone, device, channels_last)
        self._task = task_of_trial(spec, store)
        self._data = TrialData(spec, store, backbone, device, reference=local.module, transform=self._task.transform)
        self._model = self._task.build_model(local, seed=0)
        self._dtype = resolve_precision(shared.precision, device)
        strategy = strategy_class(spec.strategy).from_hparams(spec.hparams)
        self._plan = BudgetPlan.of(strategy, shared.epochs, shared.steps_per_unit or self._data.steps_per_epoch)
        self._trainer = PhaseTrainer(
            self._model,
            strategy,
            self._task,
            self._plan.phases[0],
            self._data,
            unit_steps=1,
            dtype=self._dtype,
        )

    def seconds(self) -> LayoutSeconds:
        """Measure one step and one batch."""
        began = time.process_time()
        self._trainer.unit(seed=0, steps_before=0, unit_in_phase=0)
        between = time.process_time()
        self._model.eval()
        evaluate(
            self._predict,
            itertools.islice(self._data.evaluation_batches(VAL), 1),
            self._task.accumulator(),
            self._dtype,
        )
        return LayoutSeconds(between - began, time.process_time() - between)

    def of_trial(self, seconds: LayoutSeconds) -> float:
        """Seconds of the passes of a whole trial: its steps, its validations, and the evaluation at its end."""
        image = seconds.evaluation_batch / min(self._data.size(VAL), self._data.spec.shared.eval_batch_size)
        tested = sum(self._data.size(split) for split in (TEST, *map(ood, self._data.ood_domains)))
        unit = self._plan.unit_steps * seconds.training_step + self._data.size(VAL) * image
        return self._plan.units * unit + tested * image

    def _predict(self, images: Tensor) -> Tensor:
        return self._task.predict(self._model, self._model.features(images))
