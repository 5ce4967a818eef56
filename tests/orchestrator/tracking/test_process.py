"""The process that delivers: it outlives no driver, survives Ctrl-C, and never changes how a study ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.record.journal import Journal
from orchestrator.tracking.delivery_state import DeliveryError, DeliveryLock
from orchestrator.tracking.process import RECORD_SEPARATOR, read_lines
from orchestrator.tracking.study_tracking import settings_of
from tests.support.toy_task import TOY
from tests.support.tracking import (
    SPEC,
    contents,
    follower,
    make_study,
    suggest,
    tracking_process,
    wait_until,
    write_study,
)
from trainables.specs.metrics import CLASSIFICATION, TaskMetrics

ENDING = """
import logging, sys
from pathlib import Path
from orchestrator.record.journal import Journal
from orchestrator.running.tracking_process import follow
from orchestrator.study_file.load import load_study
from orchestrator.tracking import study_tracking
from tests.support.tracking import write_study
logging.basicConfig(level=logging.WARNING)
study_tracking.CLOSING_TIMEOUT_S = float(sys.argv[2])
folder = Path(sys.argv[1])
layers = [f"blocks.{i}" for i in range(12)]
curve = {"columns": {"layer": layers, "value": [float(i) for i in range(12)]}, "note": "n"}
with Journal(folder / "journal.jsonl") as journal, follow(load_study(folder / "study.yaml"), journal):
    write_study(journal, trials=100, curves={"cka": curve, "ln_shift": curve, "change_by_stage": curve})
"""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.jsonl") as opened:
        yield opened


def children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if "tracking_process" in " ".join(process.cmdline())]


@pytest.mark.parametrize("seconds", [0, 4])
def test_p12_a_study_that_ends_while_much_is_undelivered_ends_with_0(
    seconds: int, database: Path, tmp_path: Path
) -> None:
    """A thread that still draws while the interpreter ends makes it abort (exit code 134)."""
    database.rename(tmp_path / "mlflow.db")
    _, folder = make_study(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", ENDING, str(folder), str(seconds)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "artifacts of this study (it is slow). Nothing is lost" in ended.stderr
    assert f"Deliver them later: luthier sync {folder}" in ended.stderr


def test_p12_an_end_that_waits_for_nothing_leaves_no_process(journal: Journal) -> None:
    write_study(journal)
    for _ in range(20):
        with tracking_process(journal.path, "http://127.0.0.1:9") as following:
            assert following.close(0) == len(journal.events())
        assert children() == []


def test_what_remains_is_delivered_at_the_end(journal: Journal, database: Path) -> None:
    with tracking_process(journal.path, database) as following:
        write_study(journal)
        assert following.close(60) == 0
        assert children() == []
    assert len(contents(database)["runs"]) == 5
    assert following.problem is None


def test_a_task_that_is_registered_in_the_driver_alone(journal: Journal, database: Path) -> None:
    """The best unit of a trial without a test is found by the task's own metric, here a distance."""
    journal.append("study_started", study="pets", spec={**SPEC, "task": TOY.task}, versions={}, dataset_digest="d" * 64)
    suggest(journal, "t0", 0)
    journal.append("trial_started", trial_id="t0", node=None, pid=None)
    for unit, distance in enumerate((3.0, 2.0, 4.0), 1):
        journal.append("result", trial_id="t0", unit=unit, metrics={"val/dist": distance}, node="n1", curves={})
    journal.append("trial_finished", trial_id="t0", state="pruned")
    journal.append("study_finished", state="complete")
    with tracking_process(journal.path, database, task=TOY.to_dict()) as following:
        assert following.close(60) == 0
    values = {key: value for _, key, value, *_ in contents(database)["metrics"]}
    assert (values["best/val/dist"], values["best/epoch"]) == (2.0, 2)


def test_a_study_sends_the_metrics_of_its_task(tmp_path: Path) -> None:
    spec, folder = make_study(tmp_path)
    sent = json.loads(json.dumps(settings_of(spec, folder / "journal.jsonl").to_dict()))
    assert TaskMetrics.from_dict(sent["task"]) == CLASSIFICATION


def test_ctrl_c_and_sigterm_are_for_the_driver_to_act_on(journal: Journal, database: Path) -> None:
    with tracking_process(journal.path, database) as following:
        journal.append("study_started", study="pets", spec={})
        wait_until(lambda: following.delivered_offset > 0, 60)
        (child,) = children()
        assert os.getpgid(child.pid) != os.getpgid(0)
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGTERM)
        write_study(journal)
        assert following.close(60) == 0
    assert len(contents(database)["runs"]) == 5


def test_p11_a_process_that_is_killed_is_started_again(
    journal: Journal, database: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tracking.process.RESTART_S", 0.1)
    with caplog.at_level(logging.WARNING), tracking_process(journal.path, database) as following:
        write_study(journal, finish=False)
        wait_until(lambda: following.backlog == 0, 60)
        (child,) = children()
        child.kill()
        wait_until(lambda: following.problem is not None)
        journal.append("study_finished", state="complete")
        wait_until(lambda: following.backlog == 0, 60)
        assert following.problem is None
    assert "MLflow: the tracking process has ended (exit code -9). It is started again" in caplog.text
    assert ("pets", "FINISHED") in [run[:2] for run in contents(database)["runs"]]


DRIVER = """
import sys
from pathlib import Path
from tests.support.tracking import tracking_process
with tracking_process(Path(sys.argv[1]), Path(sys.argv[2])) as following:
    sys.stdin.read()
"""


def test_p15_it_ends_with_its_driver_and_frees_the_lock(journal: Journal, database: Path) -> None:
    write_study(journal, finish=False)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(journal.path), str(database)], stdin=subprocess.PIPE)
    lock = DeliveryLock(journal.path)
    try:
        wait_until(lambda: Path(f"{journal.path}.mlflow.json").exists(), 60)
        (child,) = psutil.Process(driver.pid).children()
        with pytest.raises(DeliveryError, match=f"but process {driver.pid} on"):
            lock.acquire()
        driver.kill()
        driver.wait()
        child.wait(20)
        lock.acquire()
        lock.release()
    finally:
        driver.kill()
        driver.wait()
    assert follower(journal.path, database).finish(60) == 0


def test_log_lines_come_back_without_secrets_and_the_password_is_in_no_command_line(
    journal: Journal, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "token-51c8d2e7")
    with caplog.at_level(logging.WARNING):
        uri = "http://me:hunter22@127.0.0.1:9"
        with tracking_process(journal.path, uri, experiment="token-51c8d2e7") as following:
            journal.append("study_started", study="pets", spec={})
            wait_until(lambda: following.problem is not None, 60)
            (child,) = children()
            assert "hunter22" not in json.dumps(child.cmdline())
            assert following.close(5, 0.1) > 0
    assert "MLflow does not take the record" in caplog.text
    assert "hunter22" not in caplog.text + str(following.problem)
    assert "token-51c8d2e7" not in caplog.text + str(following.problem)


def test_lines_of_a_pipe_are_read_until_it_ends() -> None:
    source, sink = os.pipe()
    os.write(sink, f"stray{RECORD_SEPARATOR}{{}}\n\nlast".encode())
    os.close(sink)
    assert list(read_lines(source)) == [f"stray{RECORD_SEPARATOR}{{}}", "", "last"]
    os.close(source)
