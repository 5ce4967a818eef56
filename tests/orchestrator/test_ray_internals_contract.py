"""Ray's private names are as they were read: `orchestrator/ray_internals.py`, `trainables/engine/ray_internals.py`."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator import ray_internals
from orchestrator.cluster.connection import KNOBS, LOCAL_KNOBS
from orchestrator.running.cluster_watch import VITAL
from trainables.engine.ray_internals import ACTOR_NAME_PREFIX

READ_IN = "2.60"
RAY = Path(ray.__file__).parent

SIGNATURES = {
    "ray._private.services:canonicalize_bootstrap_address": ("address_of_this_machine", "(addr, temp_dir=)"),
    "ray._private.node:Node.dead_processes": ("ended_processes", "(self)"),
    "ray._private.state:actors": ("kill_actor", "(actor_id=, job_id=, actor_state_name=)"),
    "ray.exceptions:RayActorError.__init__": (
        "LostActorError", "(self, actor_id=, error_msg=, actor_init_failed=, preempted=)",
    ),
    "ray.air.execution._internal.actor_manager:RayActorManager._actor_task_failed": (
        "actor_failures_as_trial_failures", "(self, tracked_actor_task, exception)",
    ),
    "ray.tune.execution.tune_controller:TuneController._process_trial_failure": (
        "actor_failures_as_trial_failures", "(self, trial, exception)",
    ),
    "ray.tune.execution.tune_controller:TuneController.checkpoint": (
        "without_tune_files", "(self, force=, wait=)",
    ),
    "ray.tune.experiment:Trial.init_local_path": ("without_tune_files", "(self)"),
    "ray.tune.experiment:Trial.handle_error": ("without_tune_files", "(self, exc=)"),
    "ray.tune.experiment:Trial._generate_dirname": ("without_tune_files", "(self)"),
}  # fmt: skip
"""Callable → (what uses it, its parameters; `=` marks one with a default)."""

ATTRIBUTES = {
    "ray._raylet:Config.initialize": "refresh_authentication",
    "ray._raylet:AuthenticationTokenLoader.instance": "refresh_authentication",
    "ray._raylet:AuthenticationTokenLoader.reset_cache": "refresh_authentication",
    "ray._private.worker:global_worker.node": "dashboard_address, ended_processes",
    "ray._private.node:Node.address_info": "dashboard_address",
    "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE.difference_update": "keep_aws_keys_private",
    "ray.actor:ActorHandle._actor_id": "actor_id",
    "ray.tune.experiment:Trial.local_path": "without_tune_files",
    "ray.tune.tune:ExperimentAnalysis": "without_tune_files",
}
"""Attribute → what uses it."""

TEXTS = {
    "_private/worker.py": {
        'kwargs.pop("_temp_dir"': "session_folder",
        ray_internals.JOB_VARIABLE: "JOB_VARIABLE",
    },
    "_private/ray_constants.py": {
        f'LOG_PREFIX_ACTOR_NAME = "{ACTOR_NAME_PREFIX}"': "trainables/engine/ray_internals.py",
        'WORKER_PROCESS_TYPE_IDLE_WORKER = "ray::IDLE"': "_is_worker",
        **{f'= "{process}"': "running/cluster_watch.py" for process in VITAL},
    },
    "_common/usage/usage_constants.py": {
        ray_internals.KUBERAY_VARIABLE: "KUBERAY_VARIABLE",
        "RAY_USAGE_STATS_ENABLED": "KNOBS",
    },
    "autoscaler/_private/commands.py": {f"~/{ray_internals.BOOTSTRAP_CONFIG}": "BOOTSTRAP_CONFIG"},
    "core/generated/gcs_service_pb2_grpc.py": {ray_internals.CHECK_ALIVE: "CHECK_ALIVE"},
    "dashboard/modules/dashboard_sdk.py": {"self._server_ray_version = running_ray_version": "server_version"},
    "tune/execution/tune_controller.py": {"self._resetting_trials.add(trial)": "actor_failures_as_trial_failures"},
    "tune/experiment/trial.py": {
        "if not exc.preempted or count_preemption_errors:": "LostActorError",
        "self.temporary_state.ray_actor = ray_actor": "actor_of",
        "self.storage.trial_dir_name = self.relative_logdir": "without_tune_files",
        "if self.local_path:": "without_tune_files",
    },
    "tune/trainable/trainable.py": {"result.setdefault(TRAINING_ITERATION": "trainables/engine/tune_trainable.py"},
}
"""File of Ray → {text that stands in it: what depends on it}."""

KNOB_FILES = (
    "tune/constants.py", "air/constants.py", "train/constants.py", "_common/usage/usage_constants.py",
    "_private/accelerators/accelerator.py",
)  # fmt: skip


def changed(name: str, user: str, how: str) -> str:
    return (
        f"{name}, which {user} uses as it was in Ray {READ_IN}, {how} in Ray {ray.__version__}. Read the new code, "
        "change that function and this test together, and follow docs/upgrading.md."
    )


def resolve(name: str, user: str) -> Any:
    module, _, path = name.partition(":")
    value: Any = None
    try:
        value = importlib.import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError):
        pytest.fail(changed(name, user, "is gone"))
    return value


def parameters(function: Any) -> str:
    described = [
        f"{parameter.name}{'' if parameter.default is parameter.empty else '='}"
        for parameter in inspect.signature(function).parameters.values()
    ]
    return f"({', '.join(described)})"


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_have_the_parameters_that_were_read(name: str) -> None:
    user, expected = SIGNATURES[name]
    now = parameters(resolve(name, user))
    assert now == expected, changed(name, user, f"has the parameters {now} instead of {expected}")


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_exist(name: str) -> None:
    resolve(name, ATTRIBUTES[name])


@pytest.mark.parametrize("file", TEXTS)
def test_code_that_was_read_stands_where_it_stood(file: str) -> None:
    source = (RAY / file).read_text(encoding="utf-8") if (RAY / file).is_file() else ""
    for text, user in TEXTS[file].items():
        assert text in source, changed(f"{text!r} of {file}", user, "is gone")


def test_every_variable_that_is_set_is_one_that_ray_reads() -> None:
    sources = "".join((RAY / file).read_text(encoding="utf-8") for file in KNOB_FILES)
    for variable in KNOBS:
        assert f'"{variable}"' in sources, changed(variable, "orchestrator/cluster/connection.py", "is read nowhere")
    compiled = (RAY / "_raylet.so").read_bytes()
    for variable in LOCAL_KNOBS:
        name = variable.removeprefix("RAY_").encode()
        assert name in compiled, changed(variable, "orchestrator/cluster/connection.py", "is read nowhere")


def test_a_trial_has_the_attributes_that_are_read_and_set() -> None:
    from ray.tune.experiment import Trial

    trial = Trial("full", stub=True)
    assert ray_internals.actor_of(trial) is None
    assert trial.relative_logdir is None, changed("Trial.relative_logdir", "without_tune_files", "begins otherwise")


def test_a_trial_is_sorted_in_by_the_status_that_a_scheduler_gave_it() -> None:
    from ray.tune.execution.tune_controller import TuneController

    source = inspect.getsource(TuneController.add_trial)
    notified, sorted_in = source.find(".on_trial_add("), source.find("[trial.status].add(trial)")
    assert 0 < notified < sorted_in, changed("TuneController.add_trial", "add_as_paused", "has another order")


def test_a_change_is_reported_in_one_sentence_with_the_way_out() -> None:
    with pytest.raises(pytest.fail.Exception) as failure:
        resolve("ray.tune.experiment:Trial.no_such_name", "without_tune_files")
    assert str(failure.value) == (
        f"ray.tune.experiment:Trial.no_such_name, which without_tune_files uses as it was in Ray 2.60, is gone in Ray "
        f"{ray.__version__}. Read the new code, change that function and this test together, and follow "
        "docs/upgrading.md."
    )
