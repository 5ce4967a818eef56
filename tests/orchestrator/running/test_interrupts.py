"""Ctrl-C, twice, and SIGTERM, sent to a real command in the middle of a unit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.support.killed_study import ROOT, write_material, write_study
from orchestrator import Study
from orchestrator.record.checkpoints import checkpoint_folder, keep_now
from orchestrator.record.journal import Journal
from trainables.specs.fault_injection import ENV_FAULTS
from trainables.storage.checkpoint_store import SAVE_REQUEST_FILE

STEPS = 1500


def command(file: Path, **environment: str) -> subprocess.Popen[str]:
    """`luthier run` as a terminal starts it: the leader of a process group."""
    return subprocess.Popen(
        [sys.executable, "-c", "from orchestrator.cli import app; app()", "run", str(file)], cwd=ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **environment}, start_new_session=True,
    )  # fmt: skip


def wait_until(reached: Callable[[], object], process: subprocess.Popen[str]) -> None:
    pause = threading.Event()
    for _ in range(6000):
        if reached():
            return
        assert process.poll() is None, process.communicate()[1]
        pause.wait(0.02)
    raise AssertionError("It did not come to that within two minutes.")


def events(file: Path) -> list[dict[str, Any]]:
    journal = Study.from_yaml(file).folder / "journal.jsonl"
    return Journal.read(journal) if journal.exists() else []


def attempts(file: Path) -> int:
    return sum(event["kind"] == "trial_started" for event in events(file))


def kept(file: Path) -> int:
    """The latest step within the first unit at which a checkpoint was written; 0 = none."""
    names = [path.name for path in checkpoint_folder(Study.from_yaml(file).folder, 0).glob("unit-*")]
    return max((int(name.removeprefix("unit-000000-step-")) for name in names), default=0)


def wait_until_training(file: Path, process: subprocess.Popen[str]) -> int:
    """The step of a checkpoint for which the trial was asked here: from now on it answers."""
    folder = checkpoint_folder(Study.from_yaml(file).folder, 0)
    before = kept(file)

    def answered() -> bool:
        if folder.exists():
            (
                folder / SAVE_REQUEST_FILE
            ).touch()  # again and again: a process that takes the trial over begins by removing it
        return kept(file) > before

    wait_until(answered, process)
    return kept(file)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(300)
def test_p7_signals_end_a_study_in_good_order_and_no_step_is_done_twice(tmp_path: Path) -> None:
    search = {"trials": 1, "epochs": 1, "steps_per_unit": STEPS, "scheduler": "none"}
    material = write_material(tmp_path / "material")
    file = write_study(tmp_path, material, strategies=["full"], search=search, confirm={"top_k": 0})

    process = command(file)
    asked = wait_until_training(file, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "terminated. Run the same command again to continue." in output
    assert events(file)[-1]["state"] == "interrupted"
    first = kept(file)
    assert asked < first < STEPS

    guard = f"trial=0,unit=1,step={first},phase=step,action=raise"
    process = command(file, **{ENV_FAULTS: guard})
    asked = wait_until_training(file, process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    wait_until(lambda: kept(file) > asked, process)
    os.killpg(process.pid, signal.SIGINT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert psutil.wait_procs(children, timeout=90)[1] == []  # they look for their parent now and then

    done = kept(file)
    assert asked < done < STEPS
    process = command(file, **{ENV_FAULTS: re.sub(r"step=\d+", f"step={done}", guard)})
    _, output = process.communicate(timeout=200)
    assert process.returncode == 0, output
    (result,) = [event for event in events(file) if event["kind"] == "result"]
    assert result["unit"] == 1


class TestKeepNow:
    def test_waits_for_those_that_answer_and_takes_its_requests_back(self, tmp_path: Path) -> None:
        for number in (0, 1):
            checkpoint_folder(tmp_path, number).mkdir(parents=True)
        request = checkpoint_folder(tmp_path, 0) / SAVE_REQUEST_FILE
        done = threading.Event()

        def trial() -> None:
            while not request.exists():
                done.wait(0.005)
            request.unlink()

        thread = threading.Thread(target=trial)
        thread.start()
        assert keep_now(tmp_path, [0, 1, 7], seconds=0.5) == 1
        thread.join()
        assert not list(tmp_path.rglob(SAVE_REQUEST_FILE))

    def test_nobody_runs(self, tmp_path: Path) -> None:
        assert keep_now(tmp_path, [], seconds=60) == 0
