"""Trials that hang are found by the driver, from outside, and tried again; those that are only slow are left alone."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.support.killed_study import ROOT, start, write_material, write_study
from orchestrator import Study, ray_internals
from orchestrator.record.journal import Journal
from orchestrator.record.records import TrialRecord, fold
from orchestrator.running.journal_callback import RecordCallback
from orchestrator.running.watchdog import Kind, Watchdog, kind_of
from orchestrator.study_file.schema import FailuresSpec
from tests.support.checkpoints import state
from tests.support.driving import task
from trainables.specs.errors import FencedError
from trainables.specs.fault_injection import ENV_FAULT_LOG, ENV_FAULTS
from trainables.storage.checkpoint_store import CheckpointStore

LIMITS: dict[str, Any] = {"stall_factor": 3.0, "stall_floor": 20.0, "stall_first": 600.0}


class Driver:
    """Tune's side: time that passes with nothing but looks, results, processes."""

    def __init__(self, history: list[TrialRecord] | None = None, **limits: Any) -> None:
        self.now = 1000.0
        self.killed = list[str]()
        self.trials = list[Any]()
        self.broken = False
        given = FailuresSpec(**{**LIMITS, **limits})
        self.dog = Watchdog(given, asdict(task(epochs=6)), history or [], self._kill, lambda: self.now)

    def _kill(self, actor: Any) -> str:
        if self.broken:
            raise ConnectionError("the cluster does not answer")
        self.killed.append(actor.name)
        return f"Its process {actor.name} was killed."

    def trial(self, number: int = 0, strategy: str = "full", process: str = "p0", **changes: Any) -> Any:
        fields = asdict(task(epochs=6, **changes))
        config = {"shared": fields, "strategy": strategy, "label": "", "hparams": {}, "_number": number}
        made = SimpleNamespace(trial_id=f"t{number}", config=config, error_file=None, last_result={})
        made.temporary_state = SimpleNamespace(ray_actor=None)
        self.trials.append(made)
        return self.placed(made, process)

    def placed(self, trial: Any, process: str | None) -> Any:
        actor = SimpleNamespace(name=process, _actor_id=SimpleNamespace(hex=lambda: process))
        trial.temporary_state.ray_actor = None if process is None else actor
        self.dog.on_step_end(0, self.trials)
        return trial

    def wait(self, seconds: float) -> None:
        """Tune's loop comes round twice a second and has nothing to tell."""
        for _ in range(round(2 * seconds)):
            self.now += 0.5
            self.dog.on_step_end(0, self.trials)

    def unit(self, trial: Any, unit: int, seconds: float) -> None:
        """One more result."""
        self.wait(seconds)
        self.dog.on_trial_result(0, self.trials, trial, {"unit": unit})


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_p9_p26_a_unit_of_three_times_the_median_is_a_hang(driver: Driver) -> None:
    trial = driver.trial()
    for unit, seconds in enumerate((30, 10, 12, 11), start=1):
        driver.unit(trial, unit, seconds)
    driver.wait(33)
    assert driver.killed == []
    driver.wait(0.5)
    assert driver.killed == ["p0"]
    driver.wait(1000)
    assert driver.killed == ["p0"], "it is killed once; what follows is Tune's"
    assert driver.dog.verdicts == {
        "t0": "StalledError: unit 5 has not ended after 33.5 s; 33 s are allowed, because the median of the trial's "
        "units of this kind is 11 s. Its process p0 was killed."
    }


def test_p9_a_paused_trial_is_no_hang_and_its_first_unit_after_the_promotion_includes_a_start(driver: Driver) -> None:
    """However long it waits, also where it is promoted into the process that it had before."""
    trial = driver.trial()
    for unit, seconds in enumerate((60, 10, 10), start=1):
        driver.unit(trial, unit, seconds)
    driver.placed(trial, None)
    driver.wait(10_000)
    assert driver.killed == []
    driver.placed(trial, "p0")
    driver.unit(trial, 3, 55)  # the result of its checkpoint, once more
    driver.unit(trial, 4, 50)
    assert driver.killed == []
    driver.wait(61)
    assert driver.killed == ["p0"], "unit 5 took longer than the slowest one"


def test_p9_a_unit_shorter_than_the_floor_is_no_hang(driver: Driver) -> None:
    trial = driver.trial()
    for unit in (1, 2, 3):
        driver.unit(trial, unit, 0.5)
    driver.wait(20)
    assert driver.killed == []
    driver.wait(0.5)
    assert driver.killed == ["p0"]


def test_p9_the_first_unit_is_measured_by_other_trials_of_its_entry_or_by_the_bound(driver: Driver) -> None:
    first = driver.trial(0)
    driver.wait(600)
    assert driver.killed == []
    driver.unit(first, 1, 0)
    driver.placed(first, None)
    driver.trial(1, process="p1")
    other = driver.trial(2, "lora", process="p2")
    driver.wait(600)
    assert driver.killed == [], "1800 s are allowed for the one, 600 s for the other"
    driver.wait(0.5)
    assert driver.killed == ["p2"]
    assert (
        "600 s are allowed, because none of its kind (first of a process) has been done yet."
        in (driver.dog.verdicts[other.trial_id])
    )
    driver.wait(1200)
    assert driver.killed == ["p2", "p1"]
    assert "because others of its entry took at most 600 s." in driver.dog.verdicts["t1"]


def test_p9_a_warm_process_is_no_measure_for_a_cold_one(driver: Driver) -> None:
    trial = driver.trial(0)
    driver.unit(trial, 1, 100)
    driver.placed(trial, None)
    reused = driver.trial(1, process="p0")
    driver.unit(reused, 1, 2)
    driver.placed(reused, None)
    driver.trial(2, process="p0")
    driver.trial(3, process="p3")
    driver.wait(299)
    assert driver.killed == ["p0"]
    driver.wait(2)
    assert driver.killed == ["p0", "p3"]


def test_p9_final_evaluation_and_diagnostics_are_no_hang(driver: Driver) -> None:
    trial = driver.trial()
    for unit in range(1, 6):
        driver.unit(trial, unit, 2)
    driver.unit(trial, 6, 500)
    assert driver.killed == []
    driver.placed(trial, None)
    second = driver.trial(1)
    for unit in range(1, 6):
        driver.unit(second, unit, 2)
    driver.wait(1500)
    assert driver.killed == []
    driver.wait(0.5)
    assert driver.killed == ["p0"], "the one before took 500 s"


CYCLES = {"hparams": {"cycles": 2}}


def test_p9_rungs_and_phases_have_times_of_their_own(driver: Driver) -> None:
    trial = driver.trial(0, "layernorm", evaluate_at=(5,))
    trial.config |= CYCLES
    for unit, seconds in enumerate((5, 200, 450, 2, 590), start=1):  # head, norms, norms with λ; head, norms at a rung
        driver.unit(trial, unit, seconds)
    assert driver.killed == []
    driver.placed(trial, None)
    second = driver.trial(1, "layernorm")
    second.config |= CYCLES
    for unit, seconds in enumerate((5, 200), start=1):
        driver.unit(second, unit, seconds)
    driver.wait(1350)
    assert driver.killed == [], "the other took 450 s"
    driver.wait(0.5)
    assert driver.killed == ["p0"]


def test_kinds_say_what_a_unit_consists_of() -> None:
    config = {"shared": asdict(task(epochs=5, evaluate_at=(2,))), "strategy": "layernorm", **CYCLES}
    assert [kind_of(config, unit) for unit in (1, 2, 3, 4, 5, 6)] == [
        Kind("", "head", False, False, False), Kind("", "norms", True, True, False),
        Kind("", "head", False, False, False), Kind("", "norms", False, False, False),
        Kind("", "norms", True, True, True), Kind("", "norms", True, True, True),
    ]  # fmt: skip
    shared = asdict(task(epochs=5, evaluate_at=(2,))) | {"corruptions": {"names": ["fog"]}}
    measured = {**config, "shared": shared}
    assert kind_of(measured, 6) == kind_of(config, 6)
    confirmed = kind_of({**measured, "role": "confirm"}, 6)
    assert confirmed == kind_of(config, 6)._replace(corrupted=True)
    assert str(confirmed) == "last of the trial and evaluated on corrupted pictures"
    assert kind_of({**measured, "role": "confirm"}, 4) == kind_of(config, 4)
    assert kind_of({"strategy": "full", "hparams": {"no": 1}}, 3, "warm") == Kind("warm", "", False, True, True)


def test_p9_no_unit_is_a_hang_that_takes_no_longer_than_the_slowest_one_before(driver: Driver) -> None:
    trial = driver.trial()
    for unit, seconds in enumerate((100, 10, 10), start=1):  # the first one also wrote a checkpoint to a slow disk
        driver.unit(trial, unit, seconds)
    driver.wait(100)
    assert driver.killed == []
    driver.wait(0.5)
    assert "100 s are allowed, because the trial's slowest unit took 100 s." in driver.dog.verdicts["t0"]


def test_p9_time_in_which_the_driver_itself_stood_still_does_not_count(driver: Driver) -> None:
    trial = driver.trial()
    driver.unit(trial, 1, 1)
    driver.unit(trial, 2, 1)
    for _ in range(15):
        driver.now += 3600.0  # a suspended laptop, a stopped driver, a sampler that thinks
        driver.dog.on_step_end(0, driver.trials)
    assert driver.killed == []


def test_p9_a_retry_starts_again_with_twice_the_patience(driver: Driver) -> None:
    trial = driver.trial()
    for unit in (1, 2, 3):
        driver.unit(trial, unit, 30)
    driver.wait(90.5)
    assert driver.killed == ["p0"]
    driver.placed(trial, None)
    del driver.dog.verdicts["t0"]
    driver.placed(trial, "p1")
    driver.unit(trial, 3, 25)  # from the checkpoint, again: no unit was done
    driver.wait(100)
    driver.unit(trial, 4, 60)
    assert driver.killed == ["p0"], "the first unit of its first process took 30 s: 3 · 30 · 2 s are allowed"
    driver.wait(180)
    assert driver.killed == ["p0"]
    driver.wait(0.5)
    assert driver.killed == ["p0", "p1"]
    assert "unit 5 has not ended after 180 s; 180 s are allowed" in driver.dog.verdicts["t0"]


def test_p9_times_of_earlier_runs_count() -> None:
    seconds = (25.0, 10.0, 10.0)
    history = tuple({"unit": float(u), "cost/unit_seconds": s} for u, s in enumerate(seconds, start=1))
    record = TrialRecord(trial_id="old", number=0, strategy="full", label="full", history=history)
    driver = Driver([record])
    trial = driver.trial(0)
    driver.unit(trial, 4, 22)
    driver.wait(30)
    assert driver.killed == []
    driver.wait(0.5)
    assert driver.killed == ["p0"]


def test_p9_an_earlier_run_is_replayed_with_the_evaluations_that_it_had() -> None:
    """Of an earlier version, a unit with an evaluation at a rung: no measure for units without one."""
    history = (
        {"unit": 1.0, "cost/unit_seconds": 20.0},
        {"unit": 2.0, "cost/unit_seconds": 10.0},
        {"unit": 3.0, "cost/unit_seconds": 400.0, "test/acc": 0.5, "ood/noisy/acc": 0.4},
    )
    record = TrialRecord(trial_id="old", number=0, strategy="full", label="full", history=history)
    allowed = Driver([record]).dog.allowed(SimpleNamespace(trial_id="t9", config=_config(9)), 2)
    assert allowed == (30.0, "30 s are allowed, because others of its entry took at most 10 s")


def _config(number: int) -> dict[str, Any]:
    return {"shared": asdict(task(epochs=6)), "strategy": "full", "label": "full", "hparams": {}, "_number": number}


def test_p9_null_waits_for_ever() -> None:
    driver = Driver(stall_factor=None)
    driver.unit(driver.trial(), 1, 1)
    driver.wait(5000)
    assert driver.killed == []


def test_p9_a_kill_that_fails_ends_nothing_and_is_tried_again(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    trial = driver.trial()
    driver.unit(trial, 1, 1)
    driver.unit(trial, 2, 1)
    driver.broken = True
    driver.wait(21)
    assert caplog.text.count("The watchdog failed; a hung trial may not be found") == 1
    driver.broken = False
    driver.wait(39)
    assert driver.killed == []
    driver.wait(1)
    assert driver.killed == ["p0"]


def test_p9_the_reason_is_on_record(driver: Driver, tmp_path: Path) -> None:
    trial = driver.trial()
    for unit in (1, 2):
        driver.unit(trial, unit, 1)
    driver.wait(20.5)
    verdict = driver.dog.verdicts["t0"]
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append("trial_suggested", trial_id="t0", number=0, strategy="full")
        record = RecordCallback(journal, verdicts=driver.dog.verdicts)
        record.on_trial_start(0, [], trial)
        record.on_trial_recover(0, [], trial)
        event = journal.events()[-1]
        assert (event["kind"], event["reason"], event["error"]) == ("trial_retried", "stalled", verdict)
        assert driver.dog.verdicts == {}
        driver.dog.verdicts["t0"] = "again"
        record.on_trial_error(0, [], trial)
        (stalled,) = fold(journal.events())
    assert (stalled.state, stalled.reason, stalled.error) == ("failed", "stalled", "again")
    assert stalled.resumable, "the trial itself has not failed: a later run resumes it"


def test_tune_can_pickle_it() -> None:
    made = Watchdog(FailuresSpec(), asdict(task()))
    assert pickle.loads(pickle.dumps(made)).limits == FailuresSpec()  # noqa: S301  # what Tuner does at construction


@pytest.mark.parametrize("here", [True, False])
def test_p9_a_process_of_this_machine_gets_sigkill_any_other_is_left_to_ray(
    here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private import state as cluster

    actor = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: "ab"))
    signals = list[Any]()
    killed = list[Any]()
    table = {"Pid": 7, "Address": {"NodeID": "n1" if here else "n2", "IPAddress": "192.0.2.7"}}
    context = SimpleNamespace(get_node_id=lambda: "n1")
    monkeypatch.setattr(cluster, "actors", lambda actor_id: table if actor_id == "ab" else {})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(os, "kill", lambda *which: signals.append(which))
    monkeypatch.setattr(ray_internals, "_is_worker", lambda pid: pid == 7)
    assert ray_internals.kill_actor(actor) == "Its process 7 on 192.0.2.7 was killed."
    assert signals == ([(7, signal.SIGKILL)] if here else [])
    assert killed == [actor]


def test_p9_no_process_but_one_of_rays_is_killed() -> None:
    assert not ray_internals._is_worker(os.getpid())
    assert not ray_internals._is_worker(None)


def test_p9_a_zombie_that_wakes_up_in_the_middle_of_a_checkpoint_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "trial-0007"
    env = {**os.environ, ENV_FAULTS: "phase=in_checkpoint,action=stop", ENV_FAULT_LOG: str(tmp_path / "faults")}
    zombie = subprocess.Popen(
        [sys.executable, "-m", "tests.support.checkpoints", str(folder)],
        env=env,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.waitid(os.P_PID, zombie.pid, os.WSTOPPED)
    owner = CheckpointStore(folder, clock=lambda: 0.0)
    owner.acquire()
    for unit in (1, 2):
        owner.save_after_unit(lambda unit=unit: state(unit))
    before = contents(folder)
    zombie.send_signal(signal.SIGCONT)
    _, stderr = zombie.communicate(timeout=60)
    assert zombie.returncode == 1
    assert FencedError.__name__ in stderr.splitlines()[-1]
    assert contents(folder) == before
    assert sorted({name.split("/")[0] for name in before}) == ["owner.json", "unit-000001", "unit-000002"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(400)
def test_p9_p26_p27_stopped_deadlocked_and_stuck_trials_are_found_and_end_whole(
    tmp_path: Path, one_thread: None
) -> None:
    """Two at a time, both hang: Tune's loop receives no result, and the watchdog checks all the same."""
    file = write_study(
        tmp_path, write_material(tmp_path / "material"), strategies=["full", "daft"], confirm={"top_k": 0},
        search={"trials": 3, "epochs": 4, "scheduler": "none"}, resources={"concurrent": 2},
        diagnostics={"measure": []}, failures={"retries": 6, "stall_floor": 5.0, "stall_first": 60.0},
    )  # fmt: skip
    faults = (
        "trial=0,unit=3,phase=step,action=stop",
        "trial=1,unit=3,phase=before_unit,action=hang",
        "trial=2,unit=3,step=2,phase=step,action=hang_gil",
    )
    driver = start(file, **{ENV_FAULTS: ";".join(faults), ENV_FAULT_LOG: str(tmp_path / "faults")})
    assert driver.wait() == 0, (tmp_path / "driver.log").read_text()[-4000:]
    acted = [line.rpartition("pid=")[2] for line in (tmp_path / "faults").read_text().splitlines()]
    assert len(acted) == len(faults)
    events = Journal.read(Study.from_yaml(file).folder / "journal.jsonl")
    retried = [event for event in events if event["kind"] == "trial_retried"]
    assert {event["reason"] for event in retried} == {"stalled"}
    for pid in acted:
        assert sum(f"Its process {pid} on " in event["error"] for event in retried) == 1
        assert not Path(f"/proc/{pid}").exists()
    for record in fold(events):
        assert (record.state, [unit["unit"] for unit in record.history]) == ("complete", [1, 2, 3, 4])
    results = [(event["trial_id"], event["unit"]) for event in events if event["kind"] == "result"]
    assert len(results) == len(set(results)) == 3 * 4
