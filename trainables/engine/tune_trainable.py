"""A trial as a `ray.tune.Trainable`: the one file of this package that imports ray."""

from __future__ import annotations

import functools
import re
import time
from typing import Any, ClassVar

import torch
from ray.tune import Trainable

from trainables.engine.trial import Run
from trainables.specs.errors import failure_text, is_retryable
from trainables.specs.fault_injection import fault_context, fault_point
from trainables.specs.redaction import redact
from trainables.specs.trial_spec import TrialSpec
from trainables.storage.checkpoint_format import CheckpointError, RunState, load_newest, save_state
from trainables.storage.checkpoint_store import MID_UNIT_INTERVAL_S, CheckpointStore


class Trial(Trainable):  # type: ignore[misc]  # ray is untyped
    """Runs the trial that its config describes; one class for all strategies, so that actors are reused across them.

    Config: `TrialSpec.to_dict()`, that is `task`, `strategy`, `hparams`, `seed`, …; keys that start with `_` are the
    orchestrator's: `_number`, the trial's number in its study; `_checkpoints`, the folder where the trial keeps its
    own checkpoints (None = only where Tune asks for one); `_checkpoint_seconds`, see
    `trainables.storage.checkpoint_store`.

    Results: the metrics of `Run.step` with `unit`, `finished` (all of the budget was used) and `done`. A trial with
    checkpoints of its own goes on from the newest intact one, and says that one's result again first: the driver may
    have died before it heard of it. Failures that would happen again (`trainables.specs.errors`) come as a last result
    `{"done": True, "failure": traceback}`, so that Tune, which would try again, takes the trial for ended; what went
    wrong with checkpoints comes as `checkpoint_problems`.

    `setup` only remembers the config: Ray may build a second actor for a trial that then runs elsewhere. The
    network is made at the first `step`; pretrained weights and opened data stay in the process for later trials.
    """

    _run: Run | None
    _state: RunState | None
    _config: dict[str, Any]
    _checkpoint_store: CheckpointStore | None

    fixed_strategy: ClassVar[str | None] = None
    """The strategy of all trials of this class; None = the config's `strategy`."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take a first trial."""
        self._fresh(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial in the same process. Raises where `setup` would; returning False would stall Tune."""
        self._fresh(new_config)
        if self._storage is not None:  # inside an actor: Ray names it once, this line renames it in the logs
            print(f":actor_name:{self!r}", flush=True)
        return True

    def step(self) -> dict[str, Any]:
        """One unit of budget, see `trainables.engine.trial.Run.step`.

        Raises:
            NonFiniteError: the trial diverged (without checkpoints of its own; see the class).
        """
        try:
            metrics = self._next()
        except Exception as error:
            self._run = None
            if self._checkpoint_store is None or is_retryable(error):
                if redact(str(error)) != str(error):  # Tune keeps the text of what is raised here
                    raise OSError(redact(f"{type(error).__name__}: {error}")) from None
                raise
            return {"done": True, "failure": failure_text(error)}
        self._iteration = int(metrics["unit"]) - 1  # Tune adds one; a trial that goes on did not begin with this actor
        if self._checkpoint_store is not None and self._checkpoint_store.problems:
            metrics["checkpoint_problems"] = self._checkpoint_store.problems
            self._checkpoint_store.problems = []
        return {**metrics, "done": metrics["finished"]}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state to the (empty) folder that Tune made."""
        save_state(checkpoint_dir, self._run_of_trial().state())

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Read the state, of an older checkpoint if this one is damaged; without any the trial starts over."""
        state = load_newest(checkpoint_dir)
        self._run, self._state = None, state
        self._iteration = int(state.meta["unit"]) if state is not None else 0

    def cleanup(self) -> None:
        """Let go of the network when the actor ends."""
        self._run, self._state, self._checkpoint_store = None, None, None

    def __repr__(self) -> str:
        number = self._config.get("_number")
        strategy = self._config.get("label") or self._strategy()
        model = str(self._config.get("task", {}).get("model", {}).get("name", "")).rpartition("/")[2]
        words = ["trial", f"{number:04d}" if isinstance(number, int) else None, strategy, model.rpartition(":")[2]]
        return "-".join(re.sub(r"[^\w.]+", "_", str(w)) for w in words if w)

    def _fresh(self, config: dict[str, Any]) -> None:
        """Everything that a trial owns, anew: nothing of an earlier trial may be left."""
        self._started = time.perf_counter()
        self._config = dict(config)
        self._run, self._state, self._checkpoint_store = None, None, None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def _strategy(self) -> str:
        return self.fixed_strategy or str(self._config.get("strategy", ""))

    def _next(self) -> dict[str, Any]:
        goes_on = self._run is None
        run = self._run_of_trial()
        if goes_on and self._checkpoint_store is not None and run.result is not None:
            return dict(run.result)
        with fault_context(trial=self._config.get("_number", -1), unit=run.unit + 1):
            fault_point("before_unit")
            metrics = run.step()
            if self._checkpoint_store is not None:
                fault_point("before_checkpoint")
                if run.finished:
                    self._checkpoint_store.save_result(run.state_without_tensors())
                else:
                    self._checkpoint_store.save_after_unit(run.state)
                fault_point("after_checkpoint")
        return metrics

    def _run_of_trial(self) -> Run:
        if self._run is None:
            self._take_resources()
            if self._config.get("_checkpoints"):
                self._run = self._from_own_checkpoints()
            else:
                self._run = self._new_run()
            if self._state is not None:
                self._run.load_state(self._state)
                self._state = None
        return self._run

    def _new_run(self) -> Run:
        fixed = {} if self.fixed_strategy is None else {"strategy": self.fixed_strategy}
        return Run(TrialSpec.from_dict(self._config | fixed), started=self._started)

    def _from_own_checkpoints(self) -> Run:
        """The run where its newest checkpoint that can be used left it, or a new one."""
        checkpoint_store = CheckpointStore(
            self._config["_checkpoints"], self._config.get("_checkpoint_seconds", MID_UNIT_INTERVAL_S)
        )
        checkpoint_store.acquire()
        self._checkpoint_store = checkpoint_store
        found = self._new_run()
        for path, state in checkpoint_store.valid_states():
            try:
                found.load_state(state)
                if not found.finished:
                    _ = found.model  # built now: weights and data are checked, too
                break
            except CheckpointError as error:
                checkpoint_store.quarantine(path, f"{path}: {error}")
                found = self._new_run()
        found.after_step = lambda: checkpoint_store.save_after_step(found.state)
        return found

    def _take_resources(self) -> None:
        request = self.trial_resources
        if request is None:
            return
        wanted = request.required_resources
        torch.set_num_threads(max(1, int(wanted.get("CPU", 1))))
        share = float(wanted.get("GPU", 0))
        if 0 < share < 1 and torch.cuda.is_available():
            # Ray counts fractions of a GPU but does not divide its memory.
            torch.cuda.set_per_process_memory_fraction(share)


@functools.cache
def trainable_class(name: str) -> type[Trial]:
    """The Trainable whose trials all follow one strategy; `config["strategy"]` need not be given."""
    title = "".join(part.capitalize() for part in name.split("_"))
    return type(f"{title}Trial", (Trial,), {"fixed_strategy": name, "__module__": __name__, "__doc__": Trial.__doc__})
