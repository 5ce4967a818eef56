"""Every private name of Ray that the orchestrator uses, as read in Ray 2.60.

Ray promises nothing about these names, so `pyproject.toml` bounds Ray at the next minor release, no other module of
this package may touch one (`tests/test_architecture.py`), and `tests/orchestrator/test_ray_internals_contract.py`
compares names and signatures with those that were read. `docs/upgrading.md` has the order of work for the next Ray.

Imports Ray, so modules that the command line loads import this one inside functions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from ray.tune.experiment import Trial

logger = logging.getLogger("luthier")

# ---------------------------------------------------------------------------------------------------------- clusters

CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""gRPC method of the head that answers at once and demands the token. Ray's own client takes 20 s to report a wrong
token and two minutes to report a dead address. Gone: every cluster is `unreachable`."""

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable of a driver that a cluster started itself (Ray Jobs). Gone: such a driver asks for a token that
it need not have."""

KUBERAY_VARIABLE = "RAY_USAGE_STATS_KUBERAY_IN_USE"
"""Set to 1 by the KubeRay operator. Gone: machines that the operator may still start are not counted."""

BOOTSTRAP_CONFIG = "ray_bootstrap_config.yaml"
"""The cluster file that `ray up` leaves in the home folder of the head. Gone: machines that the autoscaler may still
start are not counted."""


def refresh_authentication() -> None:
    """Make Ray read RAY_AUTH_MODE and the token again; it caches both at import.

    Uses `ray._raylet.Config`, `AuthenticationTokenLoader`. Gone: a process that imported Ray before `connect` sends no
    token, and its connection is refused.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def session_folder(folder: str) -> dict[str, Any]:
    """Keyword arguments of `ray.init`: where a local cluster keeps its files.

    Uses the argument `_temp_dir`. Its public counterpart, `ray start --temp-dir`, starts no cluster in this process.
    Gone: `ray.init` refuses the argument.
    """
    return {"_temp_dir": folder}


def address_of_this_machine() -> str | None:
    """`host:port` of the cluster that runs on this machine; None = there is none.

    Uses `ray._private.services`. `ray.init(address="auto")` resolves the same, but only by connecting, before it can be
    asked who may use the cluster. Gone: RAY_ADDRESS=auto must be given as host:port.
    """
    from ray._private import services

    address = services.canonicalize_bootstrap_address("auto")
    return None if address is None else str(address)


def dashboard_address() -> str | None:
    """`host:port` of the connected cluster's dashboard; None = it has none.

    Uses `ray._private.worker.global_worker.node`. `ray.init` returns it too, but not for a connection that the caller
    made. Gone: the dashboard's address is not printed.
    """
    node = ray._private.worker.global_worker.node
    return None if node is None else node.address_info.get("webui_url")


def ended_processes() -> list[tuple[str, int]]:
    """Name and exit code of the local cluster's processes that have ended.

    None where a cluster was joined.

    Uses `ray._private.worker.global_worker.node.dead_processes`. Gone: a driver whose raylet died waits for ever.
    """
    node = ray._private.worker.global_worker.node
    return [] if node is None else [(name, process.returncode) for name, process in node.dead_processes()]


def keep_aws_keys_private() -> None:
    """Stop Tune from writing this process's AWS keys into each trial's public description.

    Tune copies them from the environment into the runtime environment of every trial actor, which the dashboard and
    the state API show in clear. Workers get their credentials as any process does: from an instance role, or from the
    environment that the cluster was started in.

    Uses `ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE`. Gone: a test with keys in the environment fails.
    """
    from ray.tune.execution import class_cache

    keys = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(keys)


def server_version(client: JobSubmissionClient) -> str | None:
    """Ray's version on the cluster of a job client, read at its construction; None = unknown.

    Uses `_server_ray_version`; the public `get_version` returns the version of the API instead. Gone: no warning where
    the versions differ.
    """
    version = getattr(client, "_server_ray_version", None)
    return None if version is None else str(version)


# ------------------------------------------------------------------------------------------------ processes of trials


def actor_of(trial: Trial) -> Any:
    """The handle of the actor that runs a trial; None = it has none now.

    Uses `Trial.temporary_state.ray_actor`. Gone: hung trials are not found.
    """
    return trial.temporary_state.ray_actor


def actor_id(actor: Any) -> str:
    """Ray's id of an actor, in hexadecimal.

    Uses `ActorHandle._actor_id`. Gone: hung trials are not found.
    """
    return str(actor._actor_id.hex())


def kill_actor(actor: Any) -> str:
    """End an actor's process for good, even a stopped one, and return where it was.

    `ray.kill` asks the process to end itself, which a stopped one cannot: on this machine it gets SIGKILL at once; on
    others its raylet sends that some five seconds later. Until then it can do no harm should it wake up: Ray takes no
    result of it, and the trial's next attempt holds the fencing token of the checkpoints.

    Uses `ray._private.state.actors`; the public `ray.util.state.get_actor` needs the dashboard. Gone: the process of a
    hung trial is left to its raylet.
    """
    from ray._private.state import actors

    pid = None
    address: dict[str, Any] = {}
    try:
        description = actors(actor_id(actor))
        pid = description.get("Pid")
        address = description.get("Address", {})
        if address.get("NodeID") == ray.get_runtime_context().get_node_id() and _is_worker(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    finally:
        # Also after SIGKILL, or where the look-up failed: from here on Ray takes no result of the actor.
        ray.kill(actor)
    return f"Its process {pid} on {address.get('IPAddress')} was killed."


def _is_worker(pid: int | None) -> bool:
    """Whether a process of this machine is one of Ray's workers.

    By the title that Ray gives it; False without /proc.
    """
    if not pid:
        return False
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def add_as_paused(trial: Trial) -> None:
    """Let Tune add a trial as paused, without a process; to be called by a scheduler's `on_trial_add`.

    Public names, but a private order: `TuneController.add_trial` sorts a trial in by its status after it has called
    `on_trial_add`. Gone: a trial that an earlier run paused is in the wrong set of Tune's, which then stops with an
    error.
    """
    trial.set_status("PAUSED")


# --------------------------------------------------------------------------------------------- failed attempts in Tune


class LostActorError(RayActorError):  # type: ignore[misc]  # ray is untyped
    """A trial's process was lost.

    Args:
        reason: Ray's own error, name and text.
        free: the failure costs the trial no retry.
    """

    def __init__(self, reason: str, free: bool = False) -> None:
        # Tune counts every failed attempt but those of machines that a cloud took back.
        super().__init__(error_msg=reason, preempted=free)

    def __reduce__(self) -> tuple[Any, ...]:
        return LostActorError, (self.error_msg, self.preempted)


@contextlib.contextmanager
def actor_failures_as_trial_failures(is_out_of_memory: Callable[[str], bool]) -> Iterator[None]:
    """Map fatal or doubly counted actor failures to one failed attempt each.

    - Tune knows two kinds of error, that of a dead actor and that of the trial's code. Any other ends the experiment
      with "Caught unexpected exception", `OutOfMemoryError` among them: what Ray's memory monitor leaves when it kills
      a process because its machine runs out of memory.
    - Tune takes the death of a process that waited for its next trial for two failures of that trial: it queues the
      trial again, then gives it up for good with all its retries left.
    - The memory monitor kills those that began last, several at once, whichever takes the memory. Such a kill costs a
      trial no retry, unless it has done no unit since its last one: then it may be the trial that does not fit.

    Replaces `RayActorManager._actor_task_failed` and `TuneController._process_trial_failure` for the length of the
    block and uses `TuneController._resetting_trials`. Gone: one process that is killed for memory ends the study.

    Args:
        is_out_of_memory: whether the text of an error is that of a process killed for the machine's memory.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.tune.execution.tune_controller import TuneController

    task_failed_in_ray = RayActorManager._actor_task_failed
    trial_failed_in_tune = TuneController._process_trial_failure
    last_failure: dict[str, BaseException] = {}
    unit_of_last_kill: dict[str, int] = {}

    def task_failed(manager: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            kind = type(exception)
            exception = LostActorError(f"{kind.__module__}.{kind.__qualname__}: {exception}")
        task_failed_in_ray(manager, tracked_actor_task=tracked_actor_task, exception=exception)

    def trial_failed(controller: Any, trial: Any, exception: Exception) -> None:
        if last_failure.get(trial.trial_id) is exception:
            return  # the second call for the same death
        last_failure[trial.trial_id] = exception
        if isinstance(exception, RayActorError) and is_out_of_memory(str(exception)):
            unit = int((trial.last_result or {}).get("unit") or 0)
            progressed = unit > unit_of_last_kill.get(trial.trial_id, -1)
            # Per unit: a trial that is killed twice in one unit has made no progress, and may be too large for the
            # machine.
            unit_of_last_kill[trial.trial_id] = unit
            exception = LostActorError(str(exception), free=progressed)
        # A trial that is being reset waits for the process that is gone, and would for ever.
        controller._resetting_trials.discard(trial)
        trial_failed_in_tune(controller, trial, exception=exception)

    with _replaced(
        (RayActorManager, "_actor_task_failed", task_failed),
        (TuneController, "_process_trial_failure", trial_failed),
    ):
        yield


# ------------------------------------------------------------------------------------------------ Tune's own files


def in_memory_tune_storage() -> dict[str, Any]:
    """Arguments of `tune.RunConfig`: storage in this process's memory, for Tune probes at once whether it can write.

    Public names only; the other half of `without_tune_files`.
    """
    import pyarrow.fs
    from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

    handler = pyarrow.fs.FSSpecHandler(MemoryFileSystem())
    return {"storage_path": "/luthier", "storage_filesystem": pyarrow.fs.PyFileSystem(handler)}


@contextlib.contextmanager
def without_tune_files(errors: dict[str, str]) -> Iterator[None]:
    """Disable Tune's experiment state and trial folders on disk for the length of a block.

    The journal is the record of a study, and trials keep their own checkpoints. Tune's files beside them are a risk
    without a use: Tune ends the experiment where one of its folders has gone or takes no more files, prints tracebacks
    of a copy that failed, leaves another snapshot at every start, and in the end unpickles what it finds in its folder,
    whichever user put it there. `Tuner.fit` returns no results within the block.

    Replaces `TuneController.checkpoint`, `Trial.local_path`, `Trial.init_local_path`, `Trial.handle_error` and
    `ray.tune.tune.ExperimentAnalysis`; uses `Trial._generate_dirname`, `relative_logdir` and `storage.trial_dir_name`.
    Gone: Tune writes its files again, and `tests/orchestrator/running/test_tune_files.py` fails.

    Args:
        errors: trial id → text of its last failure; filled here, where Tune would have written `error.txt`.
    """
    import ray.tune.tune as tune_run
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

    handle_error_in_tune = Trial.handle_error

    def write_no_state(*_: Any, **__: Any) -> None:
        pass

    def name_without_folder(trial: Any) -> None:
        name = trial._generate_dirname()
        trial.relative_logdir = name
        trial.storage.trial_dir_name = name

    def handle_error(trial: Any, exc: BaseException | None = None) -> None:
        errors[trial.trial_id] = str(exc)
        handle_error_in_tune(trial, exc)

    def read_nothing(**_: Any) -> Any:
        return SimpleNamespace(trials=[])

    with _replaced(
        (TuneController, "checkpoint", write_no_state),
        (Trial, "local_path", None),  # a trial without a folder writes no error into it
        (Trial, "init_local_path", name_without_folder),
        (Trial, "handle_error", handle_error),
        (tune_run, "ExperimentAnalysis", read_nothing),
    ):
        yield


@contextlib.contextmanager
def _replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes (owner, name, value) for the length of a block."""
    with contextlib.ExitStack() as originals:
        for owner, name, value in replacements:
            # From `vars`, so that a descriptor (a property) is put back as it was, not its value.
            originals.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)
        yield
