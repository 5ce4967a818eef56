"""A trial as a `ray.tune.Trainable`: the one file of this package that imports ray."""

from __future__ import annotations

import functools
import re
import time
from typing import Any, ClassVar

import torch
from ray.tune import Trainable

from trainables.core.checkpoint import RunState, load_newest, save_state
from trainables.core.run import Run
from trainables.core.task import TrialSpec


class Trial(Trainable):  # type: ignore[misc]  # ray is untyped
    """Runs the trial that its config describes; one class for all strategies, so that actors are reused across them.

    Config: `TrialSpec.to_dict()`, that is `task`, `strategy`, `hparams`, `seed`, …; keys that start with `_` are the
    orchestrator's (`_number`, the trial's number in its study).

    Results: the metrics of `Run.step` with `unit`, `finished` (all of the budget was used) and `done`.

    `setup` only remembers the config: Ray may build a second actor for a trial that then runs elsewhere. The
    network is made at the first `step`; pretrained weights and opened data stay in the process for later trials.
    """

    _run: Run | None
    _state: RunState | None
    _config: dict[str, Any]

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
        """One unit of budget, see `trainables.core.run.Run.step`.

        Raises:
            NonFiniteError: the trial diverged.
        """
        metrics = self._run_of_trial().step()
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
        self._run, self._state = None, None

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
        self._run, self._state = None, None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def _strategy(self) -> str:
        return self.fixed_strategy or str(self._config.get("strategy", ""))

    def _run_of_trial(self) -> Run:
        if self._run is None:
            self._take_resources()
            fixed = {} if self.fixed_strategy is None else {"strategy": self.fixed_strategy}
            self._run = Run(TrialSpec.from_dict(self._config | fixed), started=self._started)
            if self._state is not None:
                self._run.load_state(self._state)
                self._state = None
        return self._run

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
