"""`luthier sync`: MLflow gets what the journal has and it lacks, later; nothing twice."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands import sync as sync_command_module
from orchestrator.commands.exit_status import FAILED, OK, PARTIAL, PREFLIGHT
from orchestrator.commands.sync import sync
from orchestrator.record.journal import Journal
from orchestrator.running.study_run import plain_spec
from orchestrator.running.tracking_process import follow, study_backlog
from orchestrator.study import Study
from orchestrator.study_file.schema import TrackingSpec
from orchestrator.study_file.yaml_text import write_yaml
from orchestrator.tracking.client import access_problems
from orchestrator.tracking.delivery_state import DeliveryError, DeliveryLock
from orchestrator.tracking.study_tracking import sync_command
from tests.support.tracking import contents, luthier, make_study, suggest, wait_until, write_study

NOTHING = {"runs": 0, "points": 0, "artifacts": 0}
ALL = {"runs": 5, "points": 32, "artifacts": 6}
BACKLOG = {**ALL, "artifacts": 5}
"""Before delivery: figures are not drawn yet."""


@pytest.fixture
def storage(template: Path, tmp_path: Path) -> Path:
    (tmp_path / "studies").mkdir()
    shutil.copy(template, tmp_path / "studies" / "mlflow.db")
    return tmp_path / "studies"


def synced(*args: str | Path) -> dict[str, Any]:
    """The report of a sync that leaves nothing."""
    done = luthier("sync", *args, "--json")
    assert done.exit_code == OK, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    assert (report["missing"], report["events_missing"], report["problem"]) == (NOTHING, 0, None)
    return report


def test_p12_sync_delivers_everything_and_a_second_one_adds_nothing(storage: Path) -> None:
    _, folder = make_study(storage)
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal)
    assert synced(folder)["added"] == ALL
    before = contents(storage / "mlflow.db")
    assert synced(folder)["added"] == NOTHING
    assert synced(folder, "--verify")["added"] == NOTHING
    (folder / "journal.jsonl.mlflow.json").unlink()
    assert synced(folder)["added"] == NOTHING
    after = contents(storage / "mlflow.db")
    assert len(before.pop("inputs")) == len(after.pop("inputs"))
    assert after == before
    assert [run[1] for run in after["runs"]].count("RUNNING") == 0


def test_p12_points_that_a_server_lost_are_found_by_verify_alone(storage: Path) -> None:
    _, folder = make_study(storage)
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal)
    synced(folder)
    before = contents(storage / "mlflow.db")
    with sqlite3.connect(storage / "mlflow.db") as connection:
        lost = connection.execute("delete from metrics where step = 2").rowcount
    assert lost == 12
    assert synced(folder)["added"] == NOTHING
    assert synced(folder, "--verify")["added"] == {"runs": 0, "points": lost, "artifacts": 0}
    assert contents(storage / "mlflow.db")["metrics"] == before["metrics"]


def test_p12_an_emptied_server_gets_everything_again(storage: Path, template: Path) -> None:
    _, folder = make_study(storage)
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal)
    synced(folder)
    shutil.copy(template, storage / "mlflow.db")
    shutil.rmtree(storage / "mlartifacts")
    assert synced(folder)["added"] == ALL


def test_p12_the_end_of_a_study_reports_the_backlog_and_the_command_delivers_it(
    storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec, folder = make_study(storage, "http://127.0.0.1:9")
    with Journal(folder / "journal.jsonl") as journal, caplog.at_level(logging.WARNING), follow(spec, journal):
        write_study(journal)
    assert "MLflow lacks 5 runs, 32 points and 5 artifacts of this study (" in caplog.text
    assert f"Deliver them later: luthier sync {folder}" in caplog.text
    assert study_backlog(spec, folder).to_dict() == BACKLOG
    gone = luthier("sync", folder, "--give-up", "1")
    assert gone.exit_code == FAILED
    lines = gone.stdout.splitlines()
    assert lines[:2] == ["pets → http://127.0.0.1:9, experiment pets", "Added: nothing"]
    assert lines[2].startswith("Still missing: 5 runs, 32 points and 5 artifacts (NewConnectionError: Failed to")
    elsewhere = f"sqlite:///{storage / 'mlflow.db'}"
    assert synced(folder, "--tracking-uri", elsewhere)["added"] == ALL
    assert synced(folder, "--tracking-uri", elsewhere)["added"] == NOTHING
    assert study_backlog(spec, folder).to_dict() == BACKLOG  # at the study's own server, still


def test_p12_luthier_run_ends_well_and_reports_the_backlog_on_stdout_and_as_json(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, folder = make_study(storage, "http://127.0.0.1:9")
    monkeypatch.setattr(Study, "run", lambda self, **options: self.results())
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal)
    code = PARTIAL  # one of the trials has failed, whatever MLflow does
    printed = luthier("run", folder / "study.yaml")
    assert printed.exit_code == code
    assert printed.stdout.splitlines()[-1] == (
        "MLflow lacks 5 runs, 32 points and 5 artifacts of this study. Nothing is lost: the journal keeps them. "
        f"Deliver them later: luthier sync {folder}"
    )
    report = luthier("run", folder / "study.yaml", "--json")
    assert (report.exit_code, json.loads(report.stdout)["tracking"]) == (code, {"missing": BACKLOG})
    synced(folder, "--tracking-uri", f"sqlite:///{storage / 'mlflow.db'}")
    spec = spec.model_copy(update={"tracking": TrackingSpec()})
    (folder / "study.yaml").write_text(write_yaml(plain_spec(spec)))
    synced(folder)
    assert "MLflow lacks" not in luthier("run", folder / "study.yaml").stdout


def test_p5_sync_closes_the_runs_of_a_dead_driver_and_the_next_run_opens_them_again(storage: Path) -> None:
    spec, folder = make_study(storage)
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal, trials=1, finish=False)
        suggest(journal, "t1", 1)
        journal.append("trial_started", trial_id="t1", node=None, pid=None)
        journal.append("result", trial_id="t1", unit=1, metrics={"val/acc": 0.5})
    synced(folder)
    states = {run[0]: run[1] for run in contents(storage / "mlflow.db")["runs"]}
    assert states == {"pets": "KILLED", "0000-full": "FINISHED", "0001-full": "KILLED"}
    tags = [row[1:] for row in contents(storage / "mlflow.db")["tags"] if row[0] == "0001-full"]
    assert ("status", "interrupted") in tags
    with Journal(folder / "journal.jsonl") as journal, follow(spec, journal) as following:
        journal.append("trial_failed", trial_id="t1", reason="interrupted", error="the driver died")
        journal.append("study_started", study="pets", spec={}, dataset_digest="d" * 64)
        suggest(journal, "t1-again", 1)
        journal.append("trial_started", trial_id="t1-again", node=None, pid=None)
        wait_until(lambda: not following.backlog)
    states = {run[0]: run[1] for run in contents(storage / "mlflow.db")["runs"]}
    assert states == {"pets": "RUNNING", "0000-full": "FINISHED", "0001-full": "RUNNING"}


DRIVER = """
import sys, threading
from pathlib import Path
from orchestrator.running.tracking_process import follow
from orchestrator.record.journal import Journal
from orchestrator.study_file.load import load_study
from tests.support.tracking import write_study
folder = Path(sys.argv[1])
with Journal(folder / "journal.jsonl") as journal, follow(load_study(folder / "study.yaml"), journal) as follower:
    write_study(journal, finish=False)
    while follower.backlog:
        threading.Event().wait(0.05)
    print("delivered", flush=True)
    sys.stdin.read()
"""


def test_p12_a_running_study_is_refused_by_name_and_its_copy_elsewhere_is_not(storage: Path, template: Path) -> None:
    _, folder = make_study(storage)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    try:
        assert driver.stdout.readline() == "delivered\n"
        before = contents(storage / "mlflow.db")
        with pytest.raises(DeliveryError) as refused:
            sync(folder)
        assert str(refused.value).startswith(
            f"One process at a time delivers a journal, but process {driver.pid} on {socket.gethostname()} (since 2"
        )
        assert str(refused.value).endswith(
            f") is delivering {folder / 'journal.jsonl'}. Nothing has to be done; or wait until it ends."
        )
        assert contents(storage / "mlflow.db") == before
        shutil.copy(template, storage / "copy.db")
        report = synced(folder, "--tracking-uri", f"sqlite:///{storage / 'copy.db'}")
        assert (report["running"], report["added"]["runs"]) == (True, 5)
        assert ("pets", "RUNNING") in [run[:2] for run in contents(storage / "copy.db")["runs"]]
        driver.stdin.close()
        assert driver.wait(60) == 0
    finally:
        driver.kill()
        driver.wait()
    assert synced(folder)["added"] == NOTHING


def test_p12_a_driver_that_has_only_just_begun_keeps_its_right_to_deliver(storage: Path) -> None:
    _, folder = make_study(storage)
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal)
        with pytest.raises(DeliveryError) as refused:
            sync(folder)
    assert str(refused.value) == (
        f"One process at a time delivers a journal, but another process is delivering {folder / 'journal.jsonl'}. "
        "Nothing has to be done; or wait until it ends."
    )
    assert contents(storage / "mlflow.db")["runs"] == []
    assert synced(folder)["added"] == ALL


def test_p12_a_running_study_is_not_copied_to_its_own_server_under_another_name(storage: Path) -> None:
    """Two that deliver to one server at once would make its runs twice."""
    spec, folder = make_study(storage)
    (storage.parent / "link").symlink_to(storage)
    os.link(storage / "mlflow.db", storage / "alias.db")  # as two host names of one server
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal)
        with pytest.raises(DeliveryError) as early:
            sync(folder, f"sqlite:///{storage / 'alias.db'}")
        with follow(spec, journal) as follower:
            wait_until(lambda: not follower.backlog)
            before = contents(storage / "mlflow.db")
            for name in ("alias.db", "../link/mlflow.db"):
                with pytest.raises(DeliveryError) as refused:
                    sync(folder, f"sqlite:///{storage / name}")
                assert str(refused.value).startswith(
                    f"One process at a time delivers a journal, but process {os.getpid()} on {socket.gethostname()} "
                )
            assert contents(storage / "mlflow.db") == before
    assert str(early.value) == (
        "A running study is copied only to another server than its own, but it is unclear whether "
        f"sqlite:///{storage / 'alias.db'} is one (its own server does not have the study yet). Try again later, or "
        "when the study has ended."
    )
    assert sorted(path.name for path in folder.glob("*.mlflow*")) == [
        "journal.jsonl.mlflow-copy.lock", "journal.jsonl.mlflow.json", "journal.jsonl.mlflow.json.lock",
    ]  # fmt: skip


def test_p12_two_syncs_of_one_journal_wait_for_each_other_whatever_their_servers_are_called(storage: Path) -> None:
    _, folder = make_study(storage)
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal)
    held = DeliveryLock(folder / "journal.jsonl")
    held.acquire()
    with pytest.raises(DeliveryError, match=f"but process {os.getpid()} on"):
        sync(folder, f"sqlite:///{storage / 'other.db'}")
    held.release()
    assert synced(folder, "--tracking-uri", f"sqlite:///{storage.parent}/studies/../studies/mlflow.db")["added"] == ALL
    assert synced(folder)["added"] == NOTHING
    assert [path.name for path in folder.glob("*.mlflow*.json")] == ["journal.jsonl.mlflow.json"]


def test_p5_sync_closes_no_run_of_a_study_that_has_begun_meanwhile(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make_study(storage)
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal, finish=False)
    started = list[Journal]()
    real = access_problems

    def slow(*args: Any, **options: Any) -> Any:
        started.append(Journal(folder / "journal.jsonl"))
        return real(*args, **options)

    monkeypatch.setattr(sync_command_module, "access_problems", slow)
    assert sync(folder).whole
    started[0].close()
    assert ("pets", "RUNNING") in [run[:2] for run in contents(storage / "mlflow.db")["runs"]]


def test_p14_a_password_that_the_folder_does_not_keep_is_asked_for(storage: Path) -> None:
    spec, folder = make_study(storage, "http://me:hunter2@127.0.0.1:9")
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal)
    assert sync_command(spec, folder) == "luthier sync STUDY.yaml (the study file: its tracking URI holds a password)"
    done = luthier("sync", folder)
    assert done.exit_code == PREFLIGHT
    assert done.stderr == (
        "Error: The study 'pets' cannot run here: tracking.uri: the copy of a study file in the study's folder keeps "
        "no password, but the tracking URI has one. Name the study file itself (luthier sync STUDY.yaml), or give "
        "--tracking-uri without it and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.\n"
    )
    without = luthier("sync", folder, "--tracking-uri", "http://127.0.0.1:9", "--give-up", "1")
    assert without.exit_code == FAILED
    assert without.stdout.startswith("pets → http://127.0.0.1:9, experiment pets\nAdded: nothing\nStill missing: ")


def test_a_study_that_has_not_run(storage: Path) -> None:
    _, folder = make_study(storage)
    done = luthier("sync", folder)
    assert done.exit_code == FAILED
    assert "has no journal at" in done.stderr
    assert os.listdir(folder) == ["study.yaml"]
