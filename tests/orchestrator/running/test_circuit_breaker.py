"""A configuration that always fails costs itself alone; a study whose trials mostly fail for one reason is stopped."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import tune
from ray.exceptions import ActorDiedError, OutOfMemoryError
from typer.testing import CliRunner, Result

from benchmarks.support.synthetic import write_images
from orchestrator.cli import app
from orchestrator.commands.exit_status import FAILED, PARTIAL
from orchestrator.ray_internals import LostActorError, actor_failures_as_trial_failures, without_tune_files
from orchestrator.record.journal import Journal
from orchestrator.record.records import fold, study_header
from orchestrator.running.failure_policy import (
    CircuitBreaker,
    CircuitBreakerError,
    classify,
    error_line,
    is_out_of_memory,
)
from orchestrator.running.study_run import StudyRun
from orchestrator.running.watchdog import Watchdog
from orchestrator.study_file.schema import FailuresSpec
from trainables.specs.errors import failure_text
from trainables.specs.fault_injection import ENV_FAULTS, reset_faults


def after_events(breaker: CircuitBreaker, *endings: str, first: int = 0) -> CircuitBreaker:
    """Trials that start and end one after the other: by a reason, or well ("")."""
    for number, reason in enumerate(endings, start=first):
        breaker.event({"kind": "trial_suggested", "trial_id": f"t{number}", "number": number, "strategy": "full"})
        breaker.event({"kind": "trial_started", "trial_id": f"t{number}"})
        if reason:
            error = f"ValueError: {reason} at step {number}"
            breaker.event({"kind": "trial_failed", "trial_id": f"t{number}", "reason": reason, "error": error})
        else:
            breaker.event({"kind": "trial_finished", "trial_id": f"t{number}", "state": "complete"})
    return breaker


class TestCircuitBreaker:
    def test_it_takes_enough_failures_and_a_large_enough_share_of_one_reason(self) -> None:
        assert not after_events(CircuitBreaker(5, 0.6), *["nan"] * 4).stop_all()
        assert after_events(CircuitBreaker(5, 0.6), *["nan"] * 5).stop_all()
        assert not after_events(CircuitBreaker(5, 0.6), *["", ""] * 2, *["nan"] * 5).stop_all()
        assert after_events(CircuitBreaker(5, 0.6), *["", ""] * 2, *["nan"] * 6).stop_all()
        assert not after_events(CircuitBreaker(5, 0.6), *["nan", "oom", "user", "data"] * 4).stop_all()
        assert not after_events(CircuitBreaker(None, 0.6), *["nan"] * 100).stop_all()

    def test_two_strategies_of_which_one_always_fails_continue(self) -> None:
        assert not after_events(CircuitBreaker(5, 0.6), *["user", ""] * 20).stop_all()

    def test_running_trials_are_no_failures_and_interrupted_or_earlier_ones_do_not_count(self) -> None:
        breaker = CircuitBreaker(2, 0.6)
        for number in range(4):
            breaker.event({"kind": "trial_started", "trial_id": f"running{number}"})
        assert not after_events(breaker, "infra", "infra").stop_all()
        assert not after_events(CircuitBreaker(2, 0.6), *["interrupted"] * 9).stop_all()
        earlier = CircuitBreaker(2, 0.6)
        for number in range(5):
            earlier.event({"kind": "trial_failed", "trial_id": f"old{number}", "reason": "user", "error": ""})
        assert not earlier.stop_all()

    def test_a_resumed_trial_is_counted_once(self) -> None:
        breaker = after_events(CircuitBreaker(5, 0.6), "", "")
        for _ in range(9):
            breaker.event({"kind": "trial_started", "trial_id": "t1"})
        assert after_events(breaker, *["nan"] * 5, first=2).stop_all()

    def test_no_single_trial_is_stopped_by_it(self) -> None:
        breaker = after_events(CircuitBreaker(1, 0.1), "nan")
        assert breaker("t0", {}) is False
        assert breaker.stop_all() is True

    def test_the_message(self) -> None:
        breaker = CircuitBreaker(3, 0.6)
        after_events(breaker).check()
        after_events(breaker, "", "nan", "user", "nan", "nan", "nan")
        with pytest.raises(CircuitBreakerError) as error:
            breaker.check()
        assert str(error.value) == (
            "the study was stopped, because 4 of the 6 trials that were started failed for one reason: nan. The "
            "commonest error (4×: 1 full, 3 full, 4 full, 5 full) is: ValueError: nan at step 1. Training diverges: "
            "hold the learning rates at lower values (fixed), or look at the images. What has finished is kept, and "
            "the same command continues with the rest; failures.stop_after: null never stops a study."
        )


@pytest.fixture(scope="module")
def cluster(one_thread: None) -> Iterator[None]:
    """Trial 1 fails at its start, the process of trial 3 crashes in its second unit; every trial fails that gets to a
    third one."""
    from orchestrator.cluster.connection import connect

    faults = (
        "trial=1,unit=1,phase=before_unit,action=raise,times=0",
        "trial=3,unit=2,phase=step,action=crash,times=0",
        "unit=3,phase=before_unit,action=raise,times=0",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENV_FAULTS, ";".join(faults))
        reset_faults()
        with connect(cpus=2, dashboard=False):
            yield
    reset_faults()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def fields(images: Path, network: Callable[[str], str], tmp_path: Path) -> Callable[..., Path]:
    """The file of a study of a few fields."""

    def written(epochs: int, trials: int, **failures: Any) -> Path:
        fields = {
            "name": "poison", "storage": str(tmp_path), "strategies": ["full"], "model": {"name": network("cnn")},
            "data": {"root": str(images), "id": ["bright", "dim"], "ood": ["inverted", "noisy"]},
            "search": {"trials": trials, "epochs": epochs, "scheduler": "none", "batch_size": 16},
            "confirm": {"top_k": 0}, "diagnostics": {"measure": []},
            "resources": {"concurrent": 1, "channels_last": False},
            "failures": failures,
        }  # fmt: skip
        (tmp_path / "study.yaml").write_text(json.dumps(fields))
        return tmp_path / "study.yaml"

    return written


@pytest.fixture
def run(cluster: None, fields: Callable[..., Path]) -> Callable[..., Result]:
    """`luthier run` of such a study."""
    return lambda **given: CliRunner().invoke(app, ["run", str(fields(**given)), "--no-progress"])


def events(tmp_path: Path) -> list[dict[str, Any]]:
    return Journal.read(tmp_path / "poison" / "journal.jsonl")


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.long
class TestStudies:
    def test_p20_p25_a_poison_configuration_and_one_that_crashes_fail_alone_and_the_others_continue(
        self, run: Callable[..., Result], tmp_path: Path
    ) -> None:
        done = run(epochs=2, trials=5, retries=1)
        assert done.exit_code == PARTIAL, done.stderr
        records = fold(events(tmp_path))
        assert [(r.number, r.state, r.reason, r.attempts, r.unit) for r in records] == [
            (0, "complete", None, 1, 2), (1, "failed", "user", 1, 0), (2, "complete", None, 1, 2),
            (3, "failed", "infra", 2, 1), (4, "complete", None, 1, 2),
        ]  # fmt: skip
        assert records[1].error == "RuntimeError: A fault was injected here."
        assert re.fullmatch(
            r"ActorDiedError: process \d+ on \S+ ended without an error message: it crashed .*", records[3].error or ""
        )

    def test_p20_a_study_whose_trials_all_fail_alike_is_stopped_and_states_why(
        self, run: Callable[..., Result], tmp_path: Path
    ) -> None:
        done = run(epochs=3, trials=12, stop_after=3)
        assert done.exit_code == FAILED
        assert done.stderr.splitlines()[-1] == (
            "Error: the study was stopped, because 3 of the 3 trials that were started failed for one reason: user. "
            "The commonest error (3×: 0 full, 1 full, 2 full) is: RuntimeError: A fault was injected here. Look at "
            "the values held in the study file (fixed) and, where it is your own, at the strategy's code. What has "
            "finished is kept, and the same command continues with the rest; failures.stop_after: null never stops a "
            "study."
        )
        recorded = events(tmp_path)
        assert study_header(recorded)["state"] == "failed"
        ended = [record for record in fold(recorded) if record.reason == "user"]
        assert len(ended) == 3


def test_p20_a_study_without_one_good_trial_has_failed(
    fields: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_fail(study_run: StudyRun) -> None:
        with Journal(study_run.folder / "journal.jsonl") as journal:
            for number in range(2):
                journal.append("trial_suggested", trial_id=f"t{number}", number=number, strategy="full")
                journal.append("trial_started", trial_id=f"t{number}")
                journal.append("trial_failed", trial_id=f"t{number}", reason="user", error="ValueError: no")

    monkeypatch.setattr(StudyRun, "run", all_fail)
    done = CliRunner().invoke(app, ["run", str(fields(epochs=3, trials=2)), "--no-progress"])
    assert done.exit_code == FAILED, done.stderr
    assert [record.state for record in fold(events(tmp_path))] == ["failed", "failed"]


class Short(tune.Trainable):  # type: ignore[misc]
    """Two results, in a process that is used again."""

    def setup(self, config: dict[str, Any]) -> None:
        self.units = 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.units = 0
        return True

    def step(self) -> dict[str, Any]:
        self.units += 1
        return {"unit": self.units, "process": os.getpid(), "done": self.units == 2}


class Idle(tune.Callback):  # type: ignore[misc]
    """Sends these signals, one after each trial, to the process that now waits for its next one."""

    def __init__(self, *signals: int) -> None:
        self.signals = list(signals)
        self.processes = list[int]()
        self.retried = list[str]()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.signals:
            self.processes.append(trial.last_result["process"])
            os.kill(self.processes[-1], self.signals.pop(0))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.retried.append(trial.trial_id)


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("cluster")
def test_p1_p9_a_process_lost_between_two_trials_costs_neither(tmp_path: Path) -> None:
    idle = Idle(signal.SIGKILL, signal.SIGSTOP)
    dog = Watchdog(FailuresSpec(stall_floor=3.0, stall_first=6.0))
    tuner = tune.Tuner(
        tune.with_resources(Short, {"cpu": 1}),
        param_space={"_number": tune.grid_search([0, 1, 2])},
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(
            name="ray", storage_path=str(tmp_path), verbose=0, callbacks=[idle, dog],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=9),
        ),
    )  # fmt: skip
    with actor_failures_as_trial_failures(is_out_of_memory):
        results = tuner.fit()
    assert [(result.error, result.metrics["unit"]) for result in results] == [(None, 2)] * 3
    assert len(set(idle.retried)) >= 2
    killed, stopped = idle.processes
    assert not Path(f"/proc/{killed}").exists()
    assert not Path(f"/proc/{stopped}").exists()
    verdicts = [text for text in dog.verdicts.values() if f"Its process {stopped} on" in text]
    assert len(verdicts) == 1
    assert "unit 1 has not ended" in verdicts[0]


class Task:
    """Ray's actor manager's state of one task of a trial's process."""

    def __init__(self) -> None:
        self.received: list[tuple[str, Exception]] = []
        self._tracked_actor = SimpleNamespace(actor_id=1, _on_error=lambda _, e: self.received.append(("actor", e)))
        self._on_error = lambda _, e: self.received.append(("task", e))


def manager() -> Any:
    from ray.air.execution._internal.actor_manager import RayActorManager

    made = RayActorManager.__new__(RayActorManager)
    made._failed_actor_ids = set()
    made._cleanup_actor = lambda tracked_actor: None
    return made


def test_p22_a_process_killed_for_memory_is_a_failed_attempt_and_not_the_end_of_the_study() -> None:
    killed = OutOfMemoryError("1 worker(s) were killed due to the node running low on memory. Memory on the node …\nx")
    with pytest.raises(RuntimeError, match="Caught unexpected exception"):  # Ray's own way: `Tuner.fit` raises
        manager()._actor_task_failed(tracked_actor_task=Task(), exception=killed)
    task, other = Task(), Task()
    with actor_failures_as_trial_failures(is_out_of_memory):
        manager()._actor_task_failed(tracked_actor_task=task, exception=killed)
        manager()._actor_task_failed(tracked_actor_task=other, exception=ActorDiedError())
    assert [(who, type(error)) for who, error in task.received] == [("actor", LostActorError), ("task", LostActorError)]
    assert [type(error) for _, error in other.received] == [ActorDiedError] * 2
    text = str(task.received[0][1])
    assert classify(text) == "host_oom"
    assert error_line(text) == (
        "ray.exceptions.OutOfMemoryError: 1 worker(s) were killed due to the node running low on memory. Memory on the "
        "node …"
    )
    with pytest.raises(RuntimeError, match="Caught unexpected exception"):
        manager()._actor_task_failed(tracked_actor_task=Task(), exception=killed)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Exception], bool]]:
    """Ends an attempt of a trial with one retry after so many units; whether Tune would try it again."""
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

    controller = SimpleNamespace(_resetting_trials=set())
    trial = Trial("full", stub=True, max_failures=1)
    monkeypatch.setattr(Trial, "last_result", {}, raising=False)
    monkeypatch.setattr(
        TuneController, "_process_trial_failure", lambda self, trial, exception: trial.handle_error(exception)
    )

    def ended(unit: int, error: Exception) -> bool:
        monkeypatch.setattr(Trial, "last_result", {"unit": unit} if unit else {})
        TuneController._process_trial_failure(controller, trial, exception=error)
        return bool(trial.should_recover())

    with without_tune_files({}), actor_failures_as_trial_failures(is_out_of_memory):
        yield ended


def memory() -> Exception:
    return LostActorError(
        "ray.exceptions.OutOfMemoryError: 2 worker(s) were killed due to the node running low on memory."
    )


def test_p22_a_trial_with_progress_between_two_kills_for_memory_has_no_part_in_them(attempts: Any) -> None:
    assert all(attempts(unit, memory()) for unit in range(9))
    assert attempts(8, ActorDiedError())  # its own, the only one that it has
    assert not attempts(9, ActorDiedError())


def test_p22_a_trial_that_is_killed_for_memory_in_one_unit_again_and_again_fails(attempts: Any) -> None:
    assert [attempts(3, memory()) for _ in range(3)] == [True, True, False]


def test_p22_memory_that_the_machine_does_not_have_is_distinguished_from_that_of_a_gpu() -> None:
    reasons = []
    for reserve in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            reserve()
        reasons.append(classify(failure_text(error.value)))
    assert reasons == ["host_oom", "host_oom"]
    assert classify("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.") == "oom"


VANISHED = """The actor died unexpectedly before finishing this task.
\tclass_name: with_resources.<locals>.ResourceTrainable
\tactor_id: ddfc08716f4965ae739b1e3901000000
\tpid: 6457
\tnamespace: 7c0b358a-3d03-4a2b-af73-fda6b70230f6
\tip: 192.0.2.2
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly \
due to SIGSEGV or another unexpected error.
"""
"""Ray 2.60's error for an actor that called `ctypes.string_at(0)`, and, word for word, for one that got SIGKILL."""


def test_p25_of_a_process_that_ended_without_a_word_it_is_said_where_it_was() -> None:
    assert classify(VANISHED) == "infra"
    assert classify("trainables.specs.errors.FencedError: another process has taken trial 3 over") == "infra"
    assert error_line(VANISHED) == (
        "ActorDiedError: process 6457 on 192.0.2.2 ended without an error message: it crashed (a segmentation fault, "
        "or a library that ends the process), or it was killed from outside (by the kernel, if memory ran out: see "
        "dmesg there). Its last output, if any, is in Ray's worker logs."
    )
