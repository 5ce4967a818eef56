"""One trial from the first to the last unit of its budget, without ray: the order of `trainables.core.contract`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainables import strategy_class
from trainables.core.backbone import Classifier, new_classifier
from trainables.core.checkpoint import CheckpointError, RunState, differing
from trainables.core.contract import Phase, Report
from trainables.core.ending import final, interim, split
from trainables.core.loop import check_finite, resolve_precision
from trainables.core.optim import current_rates
from trainables.core.plan import Plan, Position
from trainables.core.randomness import isolated_randomness
from trainables.core.resident import on_device, open_store, pretrained_for
from trainables.core.scoring import training_scores, validation_scores
from trainables.core.snapshot import Best, changed_start, movable_names, put_back, take
from trainables.core.task import TrialSpec, stream_seed
from trainables.core.training import PhaseTraining, load_optimizer_state, optimizer_state
from trainables.data.trial_data import TrialData

if TYPE_CHECKING:
    from trainables.data.trial_data import StoreLike


class Run:
    """One trial. `step()` does one unit and returns its metrics; call it until `finished`.

    Nothing is loaded before the first `step`. Numbers depend on `spec` alone: all random numbers come from streams of
    `spec.seed`, and the caller's global generators are left as they were.

    Args:
        spec: what to do.
        store: an opened store; None = the one at `spec.task.store`, opened once per process.
        device: None = the GPU if there is one.
        started: `time.perf_counter()` at the trial's start, for `cost/first_batch_seconds`; None = now.

    Raises:
        ValueError: unknown strategy or hyperparameter, or a value out of range.
    """

    def __init__(
        self,
        spec: TrialSpec,
        *,
        store: StoreLike | None = None,
        device: torch.device | str | None = None,
        started: float | None = None,
    ) -> None:
        self.spec = spec
        self.strategy = strategy_class(spec.strategy).from_hparams(spec.hparams)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.unit, self.finished = 0, False
        self.best = Best()
        self._store, self._started = store, time.perf_counter() if started is None else started
        self._seconds = 0.0
        self._once: dict[str, float] = {}
        self._curves: dict[str, Any] = {}
        self._model: Classifier | None = None
        self._pristine: dict[str, Tensor] = {}
        self._training: PhaseTraining | None = None
        self._restored: RunState | None = None

    @property
    def model(self) -> Classifier:
        """The network as it stands; after the last unit, the best one, finalised."""
        self._build()
        assert self._model is not None
        return self._model

    @property
    def data(self) -> TrialData:
        """What the trial sees."""
        self._build()
        return self._data

    def step(self) -> dict[str, Any]:
        """Do one unit: train (or solve), validate, and at units of `task.evaluate_at` and the last one test too.

        Returns:
            Flat metrics (floats, names as in the record) with `finished` (bool) and `unit` (1-based count); where the
            unit measured curves, these too under `curves`, by name as plain dicts (`Curve.to_dict`).

        Raises:
            NonFiniteError: the loss became NaN or infinite.
            RuntimeError: the trial is finished already.
        """
        if self.finished:
            raise RuntimeError(f"The trial finished after unit {self.unit}; it has no further step.")
        began = time.perf_counter()
        first = self._model is None and self.unit == 0
        self._build()
        with isolated_randomness(self._stream("unit", self.unit), self.device):
            metrics = self._advance(self._plan.at(self.unit))
        metrics |= validation_scores(self.model, self._data)
        check_finite(metrics["val/nll"], "validation loss", f"after unit {self.unit + 1}")
        self.unit += 1
        self.finished = self.unit == self._plan.units
        if self.best.improved_by(metrics["val/acc"], metrics["val/nll"]):
            self.best = Best(self.unit, metrics["val/acc"], metrics["val/nll"], take(self.model, self._movable))
        if self.finished or self.unit in self.spec.task.evaluate_at:
            metrics |= self._evaluate()
        metrics["cost/unit_seconds"] = time.perf_counter() - began
        self._seconds += metrics["cost/unit_seconds"]
        if first or self.finished:
            delivered = self._data.first_delivery
            if first and delivered is not None:
                self._once["cost/first_batch_seconds"] = delivered - self._started
            metrics |= self._once
        if self.finished:
            metrics["cost/total_seconds"] = self._seconds
        curves, self._curves = self._curves, {}
        return {**metrics, "finished": self.finished, "unit": self.unit} | ({"curves": curves} if curves else {})

    def state(self) -> RunState:
        """Everything that the next unit depends on; see `trainables.core.checkpoint` for writing it to disk."""
        if self._model is None and self._restored is not None:
            return self._restored
        self._build()
        pristine, current = self._pristine, self.model.state_dict()
        tensors = {f"model/{k}": v.detach().clone() for k, v in differing(current, pristine).items()}
        if not self.finished and self.best.unit != self.unit:
            tensors |= {f"best/{k}": v for k, v in differing(self.best.tensors, pristine).items()}
        if self._training is not None:
            found = optimizer_state(self._training.optimizer, self.model)
            tensors |= {f"optimizer/{k}": v.clone() for k, v in found.items()}
        best = {"unit": self.best.unit, "accuracy": self.best.accuracy, "nll": self.best.nll}
        meta = {
            "unit": self.unit,
            "finished": self.finished,
            "seconds": self._seconds,
            "once": self._once,
            "best": best if self.best.unit else None,
            "identity": self._identity(),
        }
        return RunState(tensors, meta)

    def load_state(self, state: RunState) -> None:
        """Continue from `state`, taken from a run of the same trial; the network is rebuilt at the next `step`.

        Raises:
            CheckpointError: the state is that of another configuration.
        """
        mine, theirs = self._identity(weights=False), dict(state.meta["identity"])
        theirs.pop("weights")
        if mine != theirs:
            raise CheckpointError(f"A checkpoint continues its own trial {mine}, but this one is of {theirs}.")
        self.unit, self.finished = int(state.meta["unit"]), bool(state.meta["finished"])
        self._seconds, self._once = float(state.meta["seconds"]), dict(state.meta["once"])
        self._model, self._training, self._restored = None, None, state

    def _identity(self, weights: bool = True) -> dict[str, Any]:
        spec = self.spec
        identity = {"config": spec.config_hash, "seed": spec.seed, "held_out": spec.held_out}
        return identity | ({"weights": self._data.backbone.digest} if weights else {})

    def _stream(self, *names: str | int) -> int:
        return stream_seed(self.spec.seed, *names)

    def _build(self) -> None:
        if self._model is not None:
            return
        task = self.spec.task
        store = self._store if self._store is not None else open_store(task.store)
        backbone = pretrained_for(task.model, task.image_size, store.image_size, task.cache)
        local = on_device(backbone, self.device)
        self._data = TrialData(self.spec, store, backbone, self.device, reference=local.module)
        model = new_classifier(local, self._data.num_classes, self.device, seed=self._stream("head"))
        self._pristine = {f"backbone.{name}": value for name, value in local.module.state_dict().items()}
        self._model = model
        with isolated_randomness(self._stream("prepare"), self.device):
            report = self.strategy.prepare(model, self._data)
        self._start = changed_start(model, self._pristine)
        self._plan = Plan.of(self.strategy, task.epochs, task.steps_per_unit or self._data.steps_per_epoch)
        groups = self.strategy.param_groups(model)
        self._movable = movable_names(model, groups)
        moving = {id(p): p.numel() for group in groups for p in group.parameters}
        if self._restored is None:
            self._once = {
                **self._metrics_of(report),
                "cost/trainable_parameters": float(sum(moving.values())),
                "cost/training_images": float(self._data.train_size),
            }
        else:
            self._put_restored(self._restored)

    def _begin(self, phase: Phase) -> PhaseTraining:
        steps, dtype = self._plan.unit_steps, resolve_precision(self.spec.task.precision, self.device)
        return PhaseTraining(self.model, self.strategy, phase, self._data, unit_steps=steps, dtype=dtype)

    def _advance(self, at: Position) -> dict[str, float]:
        began = time.perf_counter()
        if at.phase.solve is not None:
            self._training = None
            metrics = self._metrics_of(at.phase.solve(self.model, self._data))
            seconds, images = time.perf_counter() - began, self._data.train_size
            metrics |= training_scores(self.model, self._data)
        else:
            if at.unit_in_phase == 0:
                self._training = self._begin(at.phase)
            assert self._training is not None
            result = self._training.unit(self.spec.seed, at.steps_before, at.unit_in_phase)
            seconds, images = time.perf_counter() - began, result.images
            metrics = {"train/loss": result.loss, "train/acc": result.accuracy, **result.observed}
        metrics |= current_rates(self._training.optimizer if self._training else None)
        if at.phase.finish is not None and at.unit_in_phase + 1 == at.phase.units:
            metrics |= self._metrics_of(at.phase.finish(self.model, self._data))
        return metrics | {"cost/images_per_second": images / seconds}

    def _evaluate(self) -> dict[str, float]:
        with isolated_randomness(self._stream("finalize"), self.device):
            found = (final if self.finished else interim)(self.model, self.strategy, self._data, self.best, self._start)
        if self.finished:
            self._training = None
            self._once |= found.report
        self._curves |= {name: curve.to_dict() for name, curve in found.curves.items()}
        return {**found.report, **found.scores}

    def _metrics_of(self, report: Report) -> dict[str, float]:
        metrics, curves = split(report)
        self._curves |= {name: curve.to_dict() for name, curve in curves.items()}
        return metrics

    def _put_restored(self, state: RunState) -> None:
        weights, digest = state.meta["identity"]["weights"], self._data.backbone.digest
        if weights != digest:
            raise CheckpointError(f"A checkpoint belongs to its pretrained weights {weights}, but these are {digest}.")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
        for name, tensor in state.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        names = self.model.state_dict().keys()
        if unknown := sorted(parts["model"].keys() - names):
            raise CheckpointError(f"The network has no tensor {unknown[0]!r}, but the checkpoint has.")
        put_back(self.model, {k: v for k, v in self._pristine.items() if k in names} | parts["model"])
        if best := state.meta["best"]:
            tensors = take(self.model, self._movable)
            if best["unit"] != self.unit and not self.finished:
                kept = self._pristine | parts["best"]
                tensors = {k: kept[k].to(v.device, copy=True) for k, v in tensors.items()}
            self.best = Best(best["unit"], best["accuracy"], best["nll"], tensors)
        at = self._plan.at(self.unit) if not self.finished else None
        if at is not None and at.unit_in_phase > 0 and at.phase.solve is None:
            self._training = self._begin(at.phase)
            load_optimizer_state(self._training.optimizer, self.model, parts["optimizer"])
