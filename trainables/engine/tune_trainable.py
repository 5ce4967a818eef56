"""A trial as a `ray.tune.Trainable`: the one file of this package that imports ray."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from ray.tune import Trainable

from trainables.engine.niceness import raise_niceness
from trainables.engine.ray_internals import rename_actor_in_logs
from trainables.engine.trial import Trial
from trainables.specs.errors import failure_text, is_retryable
from trainables.specs.fault_injection import fault_context, fault_point
from trainables.specs.redaction import redact
from trainables.specs.trial_spec import TrialSpec
from trainables.storage.checkpoint_format import CheckpointError, RunState, load_newest, save_state
from trainables.storage.checkpoint_store import MID_UNIT_INTERVAL_S, CheckpointStore
from trainables.storage.kept_predictions import save_predictions
from trainables.storage.kept_weights import save_weights

log = logging.getLogger("luthier")


class TuneTrainable(Trainable):  # type: ignore[misc]  # ray is untyped
    """Tune's trainable for all strategies; one class, so that actors are reused across trials.

    Config: `TrialSpec.to_dict()` (`shared`, `strategy`, `hparams`, `seed`, …) and the orchestrator's keys: `_number`,
    the trial's number in its study; `_checkpoints`, folder of the trial's own checkpoints (None = only where Tune asks
    for one); `_checkpoint_seconds`, see `trainables.storage.checkpoint_store`; `_checkpoint_at`, units after which a
    checkpoint is written whatever the rate limit, since the trial may lose its process there; with checkpoints of its
    own also `_weights` and `_predictions`, where a finished trial keeps them (None = nowhere); `_nice`, the niceness
    that the process has at least (None = as it was started).

    Results: the metrics of `Trial.step` with `unit`, `finished` (the whole budget was used) and `done`. Resumes from
    the newest valid checkpoint and re-reports its result, in case the driver crashed before recording it. Non-retryable
    errors (`trainables.specs.errors`) are returned as a final result `{"done": True, "failure": traceback}`, so that
    Tune does not retry. Problems with checkpoints and kept files are reported as `checkpoint_problems`. The last result
    has `weights` and `predictions`, SHA-256 and size of each, where they were kept.

    The network is built at the first `step`; pretrained weights and opened data stay in the process for later trials.
    """

    _trial: Trial | None
    _state: RunState | None
    _config: dict[str, Any]
    _checkpoint_store: CheckpointStore | None

    fixed_strategy: ClassVar[str | None] = None
    """The strategy of all trials of this class; None = the config's `strategy`."""

    def setup(self, config: dict[str, Any]) -> None:
        """Set up the actor for its first trial."""
        # Only keeps the config: Ray may build a second actor for a trial that then runs elsewhere.
        self._reset(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Set up the actor for another trial.

        Raises where `setup` would; returning False would stall Tune.
        """
        self._reset(new_config)
        rename_actor_in_logs(repr(self))  # Ray names an actor once, when it is created
        return True

    def step(self) -> dict[str, Any]:
        """One unit of budget, see `trainables.engine.trial.Trial.step`.

        Raises:
            NonFiniteError: the trial diverged (without checkpoints of its own; see the class).
        """
        try:
            metrics = self._next()
        except Exception as error:
            # A failed unit leaves the network halfway: the next attempt starts from a checkpoint.
            self._trial = None
            # Returned, not raised: Tune retries whatever is raised.
            if self._checkpoint_store is not None and not is_retryable(error):
                return {"done": True, "failure": failure_text(error)}
            if redact(str(error)) != str(error):  # Tune stores the text of what is raised here
                raise OSError(redact(f"{type(error).__name__}: {error}")) from None
            raise
        if self._checkpoint_store is not None and self._checkpoint_store.problems:
            metrics["checkpoint_problems"] = self._checkpoint_store.problems
            self._checkpoint_store.problems = []
        # Tune would count the steps of this actor, but a resumed trial does not start at 0 in it.
        return {**metrics, "training_iteration": int(metrics["unit"]), "done": metrics["finished"]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state to the (empty) folder that Tune made."""
        save_state(checkpoint_dir, self._built_trial().state())

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Read the newest valid state.

        Of an older checkpoint if this one is damaged; without any the trial starts over.
        """
        self._trial = None
        self._state = load_newest(checkpoint_dir)

    def cleanup(self) -> None:
        """Release the network when the actor ends."""
        self._trial = None
        self._state = None
        self._checkpoint_store = None

    def __repr__(self) -> str:
        number = self._config.get("_number")
        strategy = self._config.get("label") or self._strategy()
        shared = self._config.get("shared", self._config.get("task", {}))
        model = str(shared.get("model", {}).get("name", "")).rpartition("/")[2]
        words = ["trial", f"{number:04d}" if isinstance(number, int) else None, strategy, model.rpartition(":")[2]]
        return "-".join(re.sub(r"[^\w.]+", "_", str(word)) for word in words if word)

    def _reset(self, config: dict[str, Any]) -> None:
        """Reset all per-trial state (actors are reused)."""
        self._started = time.perf_counter()
        self._config = dict(config)
        self._trial = None
        self._state = None
        self._checkpoint_store = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # Blocks that PyTorch caches are lost to the other processes on this GPU.
            torch.cuda.empty_cache()

    def _strategy(self) -> str:
        return self.fixed_strategy or str(self._config.get("strategy", ""))

    def _next(self) -> dict[str, Any]:
        resumes = self._trial is None
        trial = self._built_trial()
        if resumes and self._checkpoint_store is not None and trial.result is not None:
            # The driver may have ended before it recorded this result; a repeated one is recorded once.
            return dict(trial.result)
        with fault_context(trial=self._config.get("_number", -1), unit=trial.unit + 1):
            fault_point("before_unit")
            metrics = trial.step()
            if self._checkpoint_store is not None:
                fault_point("before_checkpoint")
                if trial.finished:
                    # Before the final checkpoint: a process that is killed in between repeats the unit and the writing.
                    metrics |= self._keep(trial, self._checkpoint_store)
                    trial.result = dict(metrics)
                    fault_point("after_kept")
                    self._checkpoint_store.save_result(trial.state_without_tensors())
                elif trial.unit in self._config.get("_checkpoint_at", ()):
                    self._checkpoint_store.save(trial.state)
                else:
                    self._checkpoint_store.save_after_unit(trial.state)
                fault_point("after_checkpoint")
        return metrics

    def _keep(self, trial: Trial, checkpoint_store: CheckpointStore) -> dict[str, Any]:
        """Keep weights and predictions; a full or failing disk loses them, not the trial.

        Returns:
            The additional fields of the trial's result.

        Raises:
            FencedError: another process owns the trial.
        """
        paths = {kind: self._config.get(f"_{kind}") for kind in ("weights", "predictions")}
        if not any(paths.values()):
            return {}
        number = int(self._config.get("_number", -1))
        weights = trial.kept_weights(number)
        meta = {key: weights.meta[key] for key in ("number", "config_hash", "seed", "task", "classes")}
        writers: dict[str, Callable[[str], Any]] = {
            "weights": lambda path: save_weights(path, weights),
            "predictions": lambda path: save_predictions(path, trial.predictions, meta) if trial.predictions else None,
        }
        kept: dict[str, Any] = {}
        for kind, path in paths.items():
            if path is None:
                continue
            # Before each file: writing the one before may have taken long enough to lose the trial.
            checkpoint_store.check_owner()
            try:
                file = writers[kind](path)
            except (OSError, ModuleNotFoundError) as error:
                checkpoint_store.check_owner()  # a lost token, and not the disk, where the next owner is at work
                problem = f"No {kind} could be kept in {path}: {error}"
                checkpoint_store.problems.append(problem)
                log.warning("%s. The trial's result does not depend on them.", problem)
                continue
            if file is not None:
                kept[kind] = dataclasses.asdict(file)
        return kept

    def _built_trial(self) -> Trial:
        if self._trial is None:
            self._take_resources()
            trial = self._resumed_trial() if self._config.get("_checkpoints") else self._new_trial()
            if self._state is not None:
                trial.load_state(self._state)
                self._state = None
            self._trial = trial
        return self._trial

    def _new_trial(self) -> Trial:
        fixed = {} if self.fixed_strategy is None else {"strategy": self.fixed_strategy}
        return Trial(TrialSpec.from_dict(self._config | fixed), started=self._started)

    def _resumed_trial(self) -> Trial:
        """The trial as of its newest usable checkpoint, or a new one."""
        checkpoint_store = CheckpointStore(
            self._config["_checkpoints"], self._config.get("_checkpoint_seconds", MID_UNIT_INTERVAL_S)
        )
        # Before anything is read: a former process of this trial that still runs can write nothing from here on.
        checkpoint_store.acquire()
        self._checkpoint_store = checkpoint_store
        trial = self._new_trial()
        for path, state in checkpoint_store.valid_states():
            try:
                trial.load_state(state)
                if not trial.finished:
                    _ = trial.model  # built now: weights and data are checked, too
                break
            except CheckpointError as error:
                # A valid file of another training, or of other weights or data: it fits this trial no better the next
                # time.
                checkpoint_store.quarantine(path, f"{path}: {error}")
                trial = self._new_trial()
        trial.after_step = lambda: checkpoint_store.save_after_step(trial.state)
        trial.keeps_predictions = self._config.get("_predictions") is not None
        return trial

    def _take_resources(self) -> None:
        if self._config.get("_nice") is not None:
            raise_niceness(int(self._config["_nice"]))
        request = self.trial_resources
        if request is None:
            return
        resources = request.required_resources
        torch.set_num_threads(max(1, int(resources.get("CPU", 1))))
        share = float(resources.get("GPU", 0))
        if 0 < share < 1 and torch.cuda.is_available():
            # Ray counts fractions of a GPU but does not divide its memory.
            torch.cuda.set_per_process_memory_fraction(share)


@functools.cache
def trainable_class(name: str) -> type[TuneTrainable]:
    """The Trainable whose trials all use one strategy; `config["strategy"]` need not be given."""
    title = "".join(part.capitalize() for part in name.split("_"))
    return type(
        f"{title}Trial",
        (TuneTrainable,),
        {"fixed_strategy": name, "__module__": __name__, "__doc__": TuneTrainable.__doc__},
    )
