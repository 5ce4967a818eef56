"""Ends a run whose own cluster has died under it, where Ray would wait: for a minute, or for ever.

Without its head process (`gcs_server`) Ray ends the driver by itself, in words of its own, after
`RAY_gcs_rpc_server_reconnect_timeout_s`. Without the raylet it goes on waiting for a machine that cannot come back.

Tune keeps no files of its own while it runs a study.

Luthier asks Tune for nothing back: the journal says what happened, and trials keep their own checkpoints. What Tune
(Ray 2.60) writes beside that is a risk without a use: it ends the experiment where one of its folders in Ray's session
has gone or takes no more files, prints tracebacks of a copy that failed, leaves another snapshot at every start, and at
the end unpickles what it finds in its folder, whoever put it there.

What Ray says of a trial's process ends that trial's attempt and not the study.

Tune (Ray 2.60) takes two kinds of error for a failed attempt: that of a dead actor and that of the trial's own code.
Any other ends the whole experiment with "Caught unexpected exception", and one of them is `OutOfMemoryError`: what
Ray's memory monitor leaves when it kills a process because its machine runs out of memory.

And it takes the death of a process that waited for its next trial for two failures of that trial: it queues the trial
again, then gives it up for good, with all its retries left.

Since 2.56 the memory monitor kills those that began last, several at once, whoever takes the memory. A trial that was
killed for it is no more to blame than its neighbours, so that this costs it no retry, unless it has not done a unit
since it was last killed so: then it may be the one that does not fit.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune import Callback

from orchestrator.running.failure_policy import classify

if TYPE_CHECKING:
    from ray.tune.experiment import Trial


def nowhere() -> dict[str, Any]:
    """Arguments of `tune.RunConfig`: a storage in this process's memory, because Tune tries at once if it can write."""
    import pyarrow.fs
    from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

    handler = pyarrow.fs.FSSpecHandler(MemoryFileSystem())
    return {"storage_path": "/luthier", "storage_filesystem": pyarrow.fs.PyFileSystem(handler)}


@contextlib.contextmanager
def tune_keeps_no_files(errors: dict[str, str]) -> Iterator[None]:
    """Let Tune write neither snapshots nor a folder per trial, and read nothing back, for the length of a block.

    `Tuner.fit` returns no results then.

    Args:
        errors: trial id → text of its last failure; filled here, where Tune would have written `error.txt`.
    """
    import ray.tune.tune as tune_run
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

    known = Trial.handle_error

    def named(trial: Any) -> None:
        """Tune's own makes the folder, too."""
        trial.relative_logdir = trial.storage.trial_dir_name = trial._generate_dirname()

    def failed(trial: Any, exc: BaseException | None = None) -> None:
        errors[trial.trial_id] = str(exc)
        known(trial, exc)

    with contextlib.ExitStack() as replaced:
        for owner, name, value in (
            (TuneController, "checkpoint", lambda *_, **__: None),
            (Trial, "local_path", None),  # a trial without a folder writes no error into it
            (Trial, "init_local_path", named),
            (Trial, "handle_error", failed),
            (tune_run, "ExperimentAnalysis", lambda **_: SimpleNamespace(trials=[])),
        ):
            replaced.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)
        yield


class LostActorError(RayActorError):  # type: ignore[misc]  # ray is untyped
    """A trial's process was lost for a reason that Tune does not know.

    Args:
        reason: Ray's own error, name and text.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(error_msg=reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return LostActorError, (self.error_msg,)


@contextlib.contextmanager
def lost_actors_are_failed_attempts() -> Iterator[None]:
    """Hand Tune every other error of Ray's as that of a dead actor, and each one once, for the length of a block. One
    of a machine's memory costs no retry, once per unit."""
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.tune.execution.tune_controller import TuneController

    known, known_of_trial = RayActorManager._actor_task_failed, TuneController._process_trial_failure
    last: dict[str, BaseException] = {}
    killed_at: dict[str, int] = {}

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            kind = type(exception)
            exception = LostActorError(f"{kind.__module__}.{kind.__qualname__}: {exception}")
        known(self, tracked_actor_task=tracked_actor_task, exception=exception)

    def trial_failed(self: Any, trial: Any, exception: Exception) -> None:
        if last.get(trial.trial_id) is not exception:
            last[trial.trial_id] = exception
            if isinstance(exception, RayActorError) and classify(str(exception)) == "host_oom":
                unit = int((trial.last_result or {}).get("unit") or 0)
                exception._preempted = unit > killed_at.get(trial.trial_id, -1)  # such a failure Tune does not count
                killed_at[trial.trial_id] = unit
            self._resetting_trials.discard(trial)  # else it would wait for ever for the process that is gone
            known_of_trial(self, trial, exception=exception)

    RayActorManager._actor_task_failed, TuneController._process_trial_failure = failed, trial_failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed, TuneController._process_trial_failure = known, known_of_trial


logger = logging.getLogger("luthier")

HEAD = "gcs_server"
VITAL = {HEAD: "head process", "raylet": "raylet"}
"""Processes that a cluster of one machine cannot do without, by Ray's names, and in words."""


class LostClusterError(OSError):
    """The cluster that this process started has died."""


class HeadWatch(Callback):  # type: ignore[misc]  # ray is untyped
    """Looks after the processes of a cluster that this process started, each time Tune's loop comes round. A cluster
    that was joined has its own machines and whoever looks after them.

    Args:
        ended: Ray's names of processes of the cluster that have ended, with their exit codes.
    """

    def __init__(self, ended: Callable[[], Iterable[tuple[str, int]]] | None = None) -> None:
        self._ended = ended or ended_processes

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Look.

        Raises:
            LostClusterError: one has ended that the cluster cannot do without; Tune hands it on.
        """
        for name, code in self._ended():
            if name in VITAL:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                text = (
                    f"A study on this machine needs its Ray cluster until it ends, but the {VITAL[name]} of Ray "
                    f"{how}. Everything that was recorded is kept: run the same command again to continue. If it "
                    "happens again, look at the memory of this machine (dmesg) and at Ray's logs."
                )
                if name == HEAD:
                    logger.error("%s", text)  # at once: Ray may well end this process before the error gets out of Tune
                raise LostClusterError(text)


def ended_processes() -> list[tuple[str, int]]:
    """Processes of this process's own cluster that have ended; none where the cluster was joined."""
    import ray

    node = ray._private.worker.global_worker.node
    return [] if node is None else [(name, process.returncode) for name, process in node.dead_processes()]
