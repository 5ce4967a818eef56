"""One trial, unit by unit, without Ray; calls hooks in the contract's order."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainables.data.trial_data import TrialData
from trainables.engine.best_weights import Best, changed_start, movable_names, take
from trainables.engine.budget import BudgetPlan, UnitPosition
from trainables.engine.contract import ParamGroup, Phase, check_loss, check_refit, check_task, moving_groups
from trainables.engine.evaluation import training_scores, validation_scores
from trainables.engine.final_evaluation import TrialContext, final, final_of_refit, interim
from trainables.engine.loop import check_finite
from trainables.engine.optim import current_rates
from trainables.engine.peak_memory import PeakMemory
from trainables.engine.phase_trainer import PhaseTrainer, load_optimizer_state
from trainables.engine.process_cache import on_device, open_store, pretrained_for, requested_side
from trainables.engine.registry import strategy_class
from trainables.engine.rng_state import isolated_randomness
from trainables.engine.trial_state import (
    STATE_FORMAT,
    best_meta,
    best_of,
    check_format,
    check_same,
    identity,
    misfits,
    pack,
    put_weights,
    under_its_names,
    unpack,
)
from trainables.engine.tuned_network import take_weights
from trainables.engine.unit_usage import UnitUsage
from trainables.models.device import training_device
from trainables.models.precision import resolve_precision
from trainables.models.task_model import TaskModel
from trainables.specs.measurements import Report, split_report
from trainables.specs.metrics import (
    FIRST_BATCH_SECONDS,
    IMAGES_PER_SECOND,
    LAYERNORM_LAMBDA,
    PARAMETERS,
    TEST,
    TOTAL_SECONDS,
    TRAIN,
    TRAIN_LOSS,
    TRAINABLE_PARAMETERS,
    TRAINING_IMAGES,
    UNIT_SECONDS,
    VAL,
    WISE_ALPHA,
    task_metrics,
)
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import TrialSpec
from trainables.storage.checkpoint_format import RunState
from trainables.storage.kept_predictions import SplitPredictions
from trainables.tasks.base import Statistic, Task
from trainables.tasks.registry import task_class, task_of_trial

if TYPE_CHECKING:
    from trainables.data.store import StoreLike
    from trainables.models.low_rank import LowRankUpdate
    from trainables.storage.kept_weights import KeptWeights


class Trial:
    """One trial. `step()` does one unit and returns its metrics; call it until `finished`.

    Nothing is loaded before the first `step`. Numbers depend on `spec` alone: all random numbers come from streams of
    `spec.seed`, and the caller's global generators are left as they were.

    Args:
        spec: what to do.
        store: an opened store; None = the one at `spec.shared.store`, opened once per process.
        device: None = the GPU if there is one.
        started: `time.perf_counter()` at the trial's start, for `cost/first_batch_seconds`; None = now.
        recorded: of a refit (`spec.role`), the metrics of the trial whose configuration is trained again, for what that
            trial chose on validation. A refit trains on training and validation images together, validates nothing, and
            ends with the weights of its last unit.

    Raises:
        ValueError: unknown strategy, hyperparameter, task or metric, a value out of range, a strategy that the task
            cannot serve, or settings of loss and batches that the strategy cannot honour.
    """

    def __init__(
        self,
        spec: TrialSpec,
        *,
        store: StoreLike | None = None,
        device: torch.device | str | None = None,
        started: float | None = None,
        recorded: Mapping[str, float] | None = None,
    ) -> None:
        self.spec = spec
        self._recorded = recorded
        self.strategy = strategy_class(spec.strategy, spec.shared.task).from_hparams(spec.hparams)
        # Before data and network are loaded: a combination that cannot train is refused at once.
        check_task(self.strategy, task_class(spec.shared.task), spec.shared.loss, spec.shared.decoder)
        check_loss(self.strategy, spec.shared.loss, spec.shared.sampling, spec.shared.schedule)
        if self._is_refit:
            check_refit(self.strategy)
        task_metrics(spec.shared.task).selecting(spec.shared.metric)  # refuses a metric that cannot select
        self.device = training_device() if device is None else torch.device(device)
        self.unit = 0
        """Units done."""
        self.finished = False
        self.best = Best()
        self.result: dict[str, Any] | None = None
        """What the last `step` returned; part of the state."""
        self.after_step: Callable[[], object] | None = None
        """Called after every optimiser step; `state` then is that of the middle of the unit."""
        self.keeps_predictions = False
        """Whether the final evaluation collects `predictions`."""
        self._store = store
        self._started = time.perf_counter() if started is None else started
        self._seconds = 0.0
        self._peaks = PeakMemory(self.device)
        """Of all units done."""
        self._usage = UnitUsage(self.device)
        self._elapsed = 0.0
        """Of a unit that was interrupted, before it continues."""
        self._unit_began = 0.0
        self._once: dict[str, float] = {}
        """Metrics that are recorded with the first and the last unit."""
        self._curves: dict[str, Any] = {}
        """Curves of the unit under way, by name, as plain dicts."""
        self._built: _Built | None = None
        self._trainer: PhaseTrainer | None = None
        self._restored: RunState | None = None
        self._merged: LowRankUpdate | None = None
        """Of a finished trial: what `finalize` merged into the network."""
        self._predictions: dict[str, SplitPredictions] = {}

    @property
    def _is_refit(self) -> bool:
        return self.spec.role == "refit"

    @property
    def model(self) -> TaskModel:
        """The network as it stands; after the last unit, the best one, finalized."""
        return self._build().model

    @property
    def data(self) -> TrialData:
        """Data of the trial."""
        return self._build().data

    @property
    def prepared(self) -> Any:
        """State that the strategy's `prepare` returned."""
        return self._build().prepared

    def param_groups(self) -> list[ParamGroup]:
        """What moves, as the strategy declares it for this network."""
        return moving_groups(self.strategy, self.model, self.prepared)

    @property
    def task(self) -> Task:
        """What is learned."""
        return self._build().task

    def step(self) -> dict[str, Any]:
        """Do one unit: train (or solve) and validate.

        At units of `evaluate_at` and the last one test, too.

        Returns:
            Flat metrics (floats by recorded name) with `finished` (bool) and `unit` (1-based count); where the unit
            measured curves, these too under `curves`, by name as plain dicts (`Curve.to_dict`).

        Raises:
            NonFiniteError: the loss became NaN or infinite.
            RuntimeError: the trial is finished already.
        """
        if self.finished:
            raise RuntimeError(f"The trial finished after unit {self.unit}; it has no further step.")
        # Shifted by the seconds before an interruption, so that a resumed unit reports its whole duration.
        began = time.perf_counter() - self._elapsed
        self._usage.start()
        built = self._build()
        assert built.plan is not None
        # Seeded by the unit's number: a resumed trial draws what an uninterrupted one would have drawn.
        with isolated_randomness(self._stream("unit", self.unit), self.device):
            metrics = self._advance(built, built.plan.at(self.unit))
        if not self._is_refit:
            metrics |= self._validate(built)
        self.unit += 1
        self.finished = self.unit == built.plan.units
        if not self._is_refit:
            # Before the evaluation, which puts the best unit's weights into the network.
            self._keep_best(built, metrics)
        if self.finished or self.unit in self.spec.shared.evaluate_at:
            metrics |= self._evaluate(built)
        seconds = time.perf_counter() - began
        metrics[UNIT_SECONDS.name] = seconds
        metrics |= self._usage.metrics()
        self._seconds += seconds
        self._elapsed = 0.0
        if self.unit == 1 and built.data.first_delivery is not None:
            self._once[FIRST_BATCH_SECONDS.name] = built.data.first_delivery - self._started
        if self.unit == 1 or self.finished:
            metrics |= self._once
        if self.finished:
            metrics[TOTAL_SECONDS.name] = self._seconds
            metrics |= self._peaks.metrics()
        self.result = {**metrics, "finished": self.finished, "unit": self.unit}
        if self._curves:
            self.result["curves"] = self._curves
            self._curves = {}
        # A copy: callers add keys to what they get, and the result is part of the trial's state.
        return dict(self.result)

    def kept_weights(self, number: int) -> KeptWeights:
        """Weights of the trial's result; its tensors are the network's own, not copies.

        Args:
            number: of the trial in its study.

        Raises:
            RuntimeError: the trial was not finished by this process.
        """
        built = self._built
        if built is None or built.plan is None or not self.finished or self.result is None:
            raise RuntimeError("Weights are kept by the process that finishes their trial, but this one has not.")
        return take_weights(built.model, built.pristine, self._merged, self._meta(built, number))

    @property
    def predictions(self) -> Mapping[str, SplitPredictions]:
        """Predictions of the trial's result, by split.

        Of validation, test and every OOD domain; empty where they were not collected (`keeps_predictions`) or the
        task's cannot be kept.
        """
        return self._predictions

    def state(self) -> RunState:
        """Everything that the rest of the trial depends on.

        Taken between two steps or, from `after_step`, inside one.
        """
        # Nothing has run since `load_state`: the state is the restored one, and no network needs to be built for it.
        if self._built is None and self._restored is not None:
            return self._restored
        built = self._build()
        inside = self._trainer is not None and self._trainer.steps_done > 0
        best_is_elsewhere = not self.finished and (inside or self.best.unit != self.unit)
        # Right after the best unit its weights are the network's own, which a checkpoint holds anyway.
        best = self.best if best_is_elsewhere else None
        return RunState(pack(built.model, built.pristine, best, self._trainer), self.state_without_tensors())

    def state_without_tensors(self) -> dict[str, Any]:
        """The plain values of `state`: of a finished trial, all that is read again."""
        steps = self._trainer.steps_done if self._trainer is not None else 0
        return {
            "format": STATE_FORMAT,
            "unit": self.unit,
            "step": steps,
            "finished": self.finished,
            "seconds": self._seconds,
            "elapsed": time.perf_counter() - self._unit_began if steps else 0.0,
            "once": self._once,
            "curves": self._curves,
            "best": best_meta(self.best),
            "result": self.result,
            "identity": identity(self.spec) | self._build().digests,
        }

    def load_state(self, state: RunState) -> None:
        """Continue from `state` of the same trial.

        The network is rebuilt when it is first used; what of `state` does not fit it, its weights or its data is an
        error then.

        Raises:
            CheckpointError: the state is of another trial or of another version.
        """
        check_format(state.meta)
        check_same(identity(self.spec), state.meta["identity"])
        self.unit = int(state.meta["unit"])
        self.finished = bool(state.meta["finished"])
        self._seconds = float(state.meta["seconds"])
        self._elapsed = float(state.meta["elapsed"])
        self._once = dict(state.meta["once"])
        self._curves = dict(state.meta["curves"])
        self.result = state.meta["result"]
        self._built = None
        self._trainer = None
        self._restored = state

    def _meta(self, built: _Built, number: int) -> dict[str, Any]:
        """What kept weights say of their trial, as JSON values."""
        spec = self.spec
        shared = spec.shared
        store = built.data.store
        backbone = built.data.backbone
        config = backbone.data_config
        result = self.result or {}
        return {
            "number": number,
            "strategy": spec.strategy,
            "label": spec.label or spec.strategy,
            "config_hash": spec.config_hash,
            "seed": spec.seed,
            "role": spec.role,
            "sample": spec.sample,
            "held_out": spec.held_out,
            "hparams": dict(spec.hparams),
            "task": shared.task,
            "decoder": shared.decoder,
            "augment": list(shared.augment),
            "evaluation": shared.evaluation,
            "classes": list(store.classes),
            "model": dataclasses.asdict(shared.model),
            "pretrained_digest": backbone.digest,
            "requested_image_size": requested_side(shared.model, shared.image_size, store.image_size),
            "image_size": config.image_size,
            "stored_image_size": store.image_size,
            "mean": list(config.mean),
            "std": list(config.std),
            "interpolation": config.interpolation,
            "crop_pct": config.crop_pct,
            "interpolated": interpolation_of(result),
            "store_digest": store.digest,
            "result": flat_metrics(result),
        }

    def _collect(
        self, split: str, predictions: tuple[Tensor, Tensor] | None, statistics: Mapping[str, Statistic]
    ) -> None:
        assert self._built is not None
        outputs, targets = (None, None) if predictions is None else (tensor.numpy() for tensor in predictions)
        self._predictions[split] = SplitPredictions(
            names=self._built.data.names(split),
            targets=targets,
            outputs=outputs,
            statistics={
                name: value if isinstance(value, list) else value.numpy() for name, value in statistics.items()
            },
        )

    def _stream(self, *names: str | int) -> int:
        return stream_seed(self.spec.seed, *names)

    def _build(self) -> _Built:
        """Load data and network once."""
        if self._built is not None:
            return self._built
        shared = self.spec.shared
        store = self._store if self._store is not None else open_store(shared.store)
        task = task_of_trial(self.spec, store)
        backbone = pretrained_for(shared.model, shared.image_size, store.image_size, shared.cache, shared.view)
        local = on_device(backbone, self.device, shared.channels_last)
        data = TrialData(
            self.spec,
            store,
            backbone,
            self.device,
            reference=local.module,
            transform=task.transform,
            recorded=self._recorded,
        )
        model = task.build_model(local, self._stream("head"))
        pristine = {f"backbone.{name}": value for name, value in local.module.state_dict().items()}
        built = _Built(task, data, model, pristine)
        if self.finished and self._restored is not None:
            # Of a finished trial the structure is the pretrained one: adapters that `prepare` injects are merged.
            self._restore(built, self._restored)
        else:
            self._prepare(built)
        # Last: after an error on the way, nothing half-built is used.
        self._built = built
        return built

    def _prepare(self, built: _Built) -> None:
        """Prepare the network, plan the budget, and restore a loaded state.

        The strategy prepares; the state is the one that `load_state` was given.
        """
        shared = self.spec.shared
        data = built.data
        model = built.model
        with isolated_randomness(self._stream("prepare"), self.device):
            prepared = self.strategy.prepare(model, data)
        built.prepared = prepared.state
        # After `prepare`: shifts and WiSE-FT count from what it converted or initialised.
        built.start = changed_start(model, built.pristine)
        built.plan = BudgetPlan.of(self.strategy, shared.epochs, shared.steps_per_unit or data.steps_per_epoch)
        groups = moving_groups(self.strategy, model, prepared.state)
        built.movable = movable_names(model, groups)
        if self._restored is not None:
            self._restore(built, self._restored)
            return
        # By identity: groups of different phases may share a parameter, which counts once.
        moving = {id(p): p.numel() for group in groups for p in group.parameters}
        self._once = {
            **self._metrics_of(prepared.report),
            TRAINABLE_PARAMETERS.name: float(sum(moving.values())),
            PARAMETERS.name: float(sum(p.numel() for name, p in model.named_parameters() if name not in model.unused)),
            TRAINING_IMAGES.name: float(data.train_size),
        }

    def _new_trainer(self, built: _Built, phase: Phase) -> PhaseTrainer:
        assert built.plan is not None
        return PhaseTrainer(
            built.model,
            self.strategy,
            built.task,
            phase,
            built.data,
            prepared=built.prepared,
            unit_steps=built.plan.unit_steps,
            dtype=resolve_precision(self.spec.shared.precision, self.device),
        )

    def _advance(self, built: _Built, position: UnitPosition) -> dict[str, float]:
        """Train or solve one unit."""
        phase = position.phase
        began = self._unit_began = time.perf_counter() - self._elapsed
        if phase.solve is not None:
            self._trainer = None
            metrics = self._metrics_of(phase.solve(built.model, built.data))
            seconds = time.perf_counter() - began
            images = built.data.train_size
            metrics |= training_scores(built.model, built.data)
            metrics |= current_rates(None)
        else:
            # A new optimiser per phase, unless a checkpoint from the middle of the phase's first unit has restored it.
            if position.unit_in_phase == 0 and (self._trainer is None or not self._trainer.steps_done):
                self._trainer = self._new_trainer(built, phase)
            assert self._trainer is not None
            result = self._trainer.unit(self.spec.seed, position.steps_before, position.unit_in_phase, self._after_step)
            seconds = time.perf_counter() - began
            images = result.images
            metrics = {TRAIN_LOSS.name: result.loss, **result.observed}
            metrics |= {metric.on(TRAIN): result.metrics[metric.key] for metric in built.task.metrics.training}
            metrics |= current_rates(self._trainer.optimizer)
        if phase.finish is not None and position.unit_in_phase + 1 == phase.units:
            metrics |= self._metrics_of(phase.finish(built.model, built.data))
        return metrics | {IMAGES_PER_SECOND.name: images / seconds}

    def _after_step(self) -> None:
        self._usage.sample()
        if self.after_step is not None:
            self.after_step()

    def _validate(self, built: _Built) -> dict[str, float]:
        table = built.task.metrics
        scores = validation_scores(built.model, built.data)
        # Weights may overflow in a unit's last step, which no training loss is computed after.
        for metric in (table.selection, table.tie_breaker):
            check_finite(scores[metric.on(VAL)], f"validation {metric.title}", f"after unit {self.unit + 1}")
        return scores

    def _keep_best(self, built: _Built, scores: dict[str, float]) -> None:
        table = built.task.metrics
        value = scores[table.validation]
        tie_breaker = scores[table.tie_breaker.on(VAL)]
        takes_last = self.spec.shared.evaluate_model == "final"
        if takes_last or self.best.improved_by(value, tie_breaker, table):
            # Into the copies of the former best unit: full fine-tuning would hold a third network for a moment.
            tensors = take(built.model, built.movable, self.best.tensors)
            self.best = Best(self.unit, value, tie_breaker, tensors)

    def _evaluate(self, built: _Built) -> dict[str, float]:
        """Final evaluation after the last unit, an interim one before."""
        trial = TrialContext(built.model, self.strategy, built.data, self.best, built.start, built.prepared)
        if self.finished:
            # Nothing is trained any more: optimiser and gradients need not stay beside the evaluation.
            self._trainer = None
            built.model.zero_grad(set_to_none=True)
        with isolated_randomness(self._stream("finalize"), self.device):
            if self.finished and self._is_refit:
                evaluation = final_of_refit(trial)
                self._merged = evaluation.merged
                tie_breaker = built.task.metrics.tie_breaker
                # Weights may overflow in the last step; nothing is validated that would show it.
                check_finite(evaluation.scores[tie_breaker.on(TEST)], f"test {tie_breaker.title}", "after the refit")
            elif self.finished:
                collects = self.keeps_predictions
                evaluation = final(trial, self._collect if collects else None)
                self._once |= evaluation.report
                self._merged = evaluation.merged
                # Rows of kept predictions are in the store's order, not in that of the passes.
                order = {split: index for index, split in enumerate(built.data.store.splits)}
                self._predictions = dict(sorted(self._predictions.items(), key=lambda row: order[row[0]]))
            else:
                evaluation = interim(trial, under_its_names(built.model, built.pristine))
        return self._metrics_of({**evaluation.report, **evaluation.curves}) | evaluation.scores

    def _metrics_of(self, report: Report) -> dict[str, float]:
        """The metrics of a report; its curves are kept for the unit's result."""
        metrics, curves = split_report(report)
        self._curves |= {name: curve.to_dict() for name, curve in curves.items()}
        return metrics

    def _restore(self, built: _Built, state: RunState) -> None:
        parts = unpack(state)
        check_same(built.digests, state.meta["identity"], misfits(built.model, parts["model"]))
        put_weights(built.model, built.pristine, parts["model"])
        inside = state.meta["step"] > 0
        meta = state.meta["best"]
        # The rule of `state`: right after the best unit, a checkpoint holds its weights once, as the network's.
        best_is_elsewhere = meta is not None and not self.finished and (inside or meta["unit"] != self.unit)
        saved = parts["best"] if best_is_elsewhere else None
        self.best = best_of(meta, built.model, built.movable, built.pristine, saved)
        if self.finished:
            return
        assert built.plan is not None
        position = built.plan.at(self.unit)
        if (inside or position.unit_in_phase > 0) and position.phase.solve is None:
            self._trainer = self._new_trainer(built, position.phase)
            load_optimizer_state(self._trainer.optimizer, built.model, parts["optimizer"])
            self._trainer.load_unit_state(parts["unit"])


class _Built:
    """Loaded data and network of a trial, and what follows from them."""

    def __init__(self, task: Task, data: TrialData, model: TaskModel, pristine: dict[str, Tensor]) -> None:
        self.task = task
        self.data = data
        self.model = model
        self.pristine = pristine
        """The pretrained tensors by the names of a new model."""
        self.prepared: Any = None
        """State that the strategy's `prepare` returned."""
        self.start: dict[str, Tensor] = {}
        """Tensors that differed from the pretrained ones when training began."""
        self.movable: set[str] = set()
        """Names of the tensors that training may change."""
        self.plan: BudgetPlan | None = None
        """None = the trial was restored as finished."""

    @property
    def digests(self) -> dict[str, str]:
        """Of the pretrained weights and the data, for the identity of a checkpoint."""
        return {"weights": self.data.backbone.digest, "data": self.data.store.digest}


def interpolation_of(result: Mapping[str, Any]) -> str | None:
    """Which interpolation of weights made a finished network.

    By its metrics: `alpha` (WiSE-FT), `lambda`, or None. λ = 1 and α = 1 leave the tuned weights as they are.
    """
    if result.get(WISE_ALPHA.name, 1.0) != 1.0:
        return "alpha"
    return "lambda" if result.get(LAYERNORM_LAMBDA.name, 1.0) != 1.0 else None


def flat_metrics(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of a result, as strict JSON: None = not finite."""
    metrics = {name: value for name, value in result.items() if isinstance(value, float)}
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
