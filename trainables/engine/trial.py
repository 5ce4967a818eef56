"""One trial from the first to the last unit of its budget, without ray: the order of `trainables.engine.contract`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainables.data.trial_data import TrialData
from trainables.engine.best_weights import Best, changed_start, movable_names, take
from trainables.engine.budget import Plan, Position
from trainables.engine.contract import Phase
from trainables.engine.evaluation import training_scores, validation_scores
from trainables.engine.final_evaluation import final, interim, split
from trainables.engine.loop import check_finite
from trainables.engine.optim import current_rates
from trainables.engine.phase_trainer import PhaseTraining, load_optimizer_state
from trainables.engine.process_cache import on_device, open_store, pretrained_for
from trainables.engine.registry import strategy_class
from trainables.engine.rng_state import isolated_randomness
from trainables.engine.trial_state import best_of, check_same, identity, misfits, pack, put_weights, unpack
from trainables.models.backbone import Classifier, new_classifier
from trainables.models.precision import resolve_precision
from trainables.specs.measurements import Report
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import TrialSpec
from trainables.storage.checkpoint_format import RunState

if TYPE_CHECKING:
    from trainables.data.store import StoreLike


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
        self.result: dict[str, Any] | None = None
        """What the last `step` returned; comes back with a state."""
        self.after_step: Callable[[], object] | None = None
        """Called after every optimiser step; `state` then is that of the middle of the unit."""
        self._store, self._started = store, time.perf_counter() if started is None else started
        self._seconds = self._elapsed = 0.0
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
        began = time.perf_counter() - self._elapsed
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
        self._seconds, self._elapsed = self._seconds + metrics["cost/unit_seconds"], 0.0
        if self.unit == 1 and self._data.first_delivery is not None:
            self._once["cost/first_batch_seconds"] = self._data.first_delivery - self._started
        metrics |= self._once if self.unit == 1 or self.finished else {}
        if self.finished:
            metrics["cost/total_seconds"] = self._seconds
        curves, self._curves = self._curves, {}
        self.result = {**metrics, "finished": self.finished, "unit": self.unit} | ({"curves": curves} if curves else {})
        return dict(self.result)

    def state(self) -> RunState:
        """Everything that the rest of the trial depends on, between two steps or, from `after_step`, inside one."""
        if self._model is None and self._restored is not None:
            return self._restored
        self._build()
        inside = self._training is not None and self._training.steps_done > 0
        elsewhere = not self.finished and (inside or self.best.unit != self.unit)
        tensors = pack(self.model, self._pristine, self.best if elsewhere else None, self._training)
        return RunState(tensors, self.state_without_tensors())

    def state_without_tensors(self) -> dict[str, Any]:
        """The plain values of `state`, which of a finished trial are all that anybody reads."""
        inside, found = self._training.steps_done if self._training is not None else 0, self.best
        best = {"unit": found.unit, "accuracy": found.accuracy, "nll": found.nll} if found.unit else None
        return {
            "unit": self.unit,
            "step": inside,
            "finished": self.finished,
            "seconds": self._seconds,
            "elapsed": time.perf_counter() - self._unit_began if inside else 0.0,
            "once": self._once,
            "curves": self._curves,
            "best": best,
            "result": self.result,
            "identity": identity(self.spec) | self._digests(),
        }

    def load_state(self, state: RunState) -> None:
        """Continue from `state`, taken from a run of the same trial; the network is rebuilt when it is first used,
        and what of `state` does not fit it, its weights or its data is an error then.

        Raises:
            CheckpointError: the state is that of another trial.
        """
        check_same(identity(self.spec), state.meta["identity"])
        self.unit, self.finished = int(state.meta["unit"]), bool(state.meta["finished"])
        self._seconds, self._elapsed = float(state.meta["seconds"]), float(state.meta["elapsed"])
        self._once, self._curves = dict(state.meta["once"]), dict(state.meta["curves"])
        self.result = state.meta["result"]
        self._model, self._training, self._restored = None, None, state

    def _digests(self) -> dict[str, str]:
        return {"weights": self._data.backbone.digest, "data": self._data.store.digest}

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
        if self.finished and self._restored is not None:  # what `prepare` injects, `finalize` has taken out again
            self._movable = set()
            self._put_restored(self._restored)
            return
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
        began = self._unit_began = time.perf_counter() - self._elapsed
        if at.phase.solve is not None:
            self._training = None
            metrics = self._metrics_of(at.phase.solve(self.model, self._data))
            seconds, images = time.perf_counter() - began, self._data.train_size
            metrics |= training_scores(self.model, self._data)
        else:
            if at.unit_in_phase == 0 and (self._training is None or not self._training.steps_done):
                self._training = self._begin(at.phase)
            assert self._training is not None
            result = self._training.unit(self.spec.seed, at.steps_before, at.unit_in_phase, self.after_step)
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
        return self._metrics_of({**found.report, **found.curves}) | found.scores

    def _metrics_of(self, report: Report) -> dict[str, float]:
        metrics, curves = split(report)
        self._curves |= {name: curve.to_dict() for name, curve in curves.items()}
        return metrics

    def _put_restored(self, state: RunState) -> None:
        parts = unpack(state)
        check_same(self._digests(), state.meta["identity"], misfits(self.model, parts["model"]))
        put_weights(self.model, self._pristine, parts["model"])
        inside, best = state.meta["step"] > 0, state.meta["best"]
        elsewhere = best is not None and not self.finished and (inside or best["unit"] != self.unit)
        saved = parts["best"] if elsewhere else None
        self.best = best_of(best, self.model, self._movable, self._pristine, saved)
        at = self._plan.at(self.unit) if not self.finished else None
        if at is not None and (inside or at.unit_in_phase > 0) and at.phase.solve is None:
            self._training = self._begin(at.phase)
            load_optimizer_state(self._training.optimizer, self.model, parts["optimizer"])
            self._training.load_unit_state(parts["unit"])
