"""A new SQLite database of MLflow: complete, or not there."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.record.journal import Journal
from orchestrator.tracking import local_database
from orchestrator.tracking.local_database import TrackingFileError, ensure_tracking_file
from orchestrator.tracking.writer import MlflowWriter
from tests.support.tracking import FollowerThread, contents, follower, wait_until, write_study


def tables(file: Path) -> set[str]:
    with sqlite3.connect(file) as connection:
        return {row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")}


def test_p16_studies_that_start_together_share_one_new_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "mlflow.db"
    together = threading.Barrier(6)
    failed = list[Exception]()

    def start(name: str) -> None:
        together.wait(60)
        try:
            MlflowWriter(f"sqlite:///{file}", "shared", name)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=start, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failed == []
    with sqlite3.connect(file) as connection:
        names = [row[0] for row in connection.execute("select name from experiments order by 1")]
    assert names == ["Default", "shared"]
    assert sorted(path.name for path in file.parent.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


KILLED = """
import os, signal, sys
from pathlib import Path
from orchestrator.tracking.local_database import ensure_tracking_file
import alembic.operations.batch as batch
real, calls = batch.BatchOperationsImpl.flush, []
def flush(self):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self)
batch.BatchOperationsImpl.flush = flush
ensure_tracking_file(Path(sys.argv[1]))
"""


def test_p16_a_process_killed_while_it_makes_the_file_leaves_none(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    assert list(tmp_path.iterdir()) == []
    MlflowWriter(f"sqlite:///{file}", "pets", "pets")
    assert {"runs", "metrics"} <= tables(file)


@pytest.mark.usefixtures("quick")
def test_p16_the_file_of_another_mlflow_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mlflow.db"
    real = local_database._create_tables

    def create(draft: Path) -> None:
        real(draft)
        file.write_text("of a server that was faster")

    monkeypatch.setattr(local_database, "_create_tables", create)
    ensure_tracking_file(file)
    assert file.read_text() == "of a server that was faster"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.usefixtures("quick")
def test_p16_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    ensure_tracking_file(tmp_path / "mlflow.db")
    assert {"runs", "metrics"} <= tables(tmp_path / "mlflow.db")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def half_made(template: Path, file: Path, age: float) -> bytes:
    """What an MLflow leaves that is killed in the middle of a migration: its change is there, its name is not."""
    shutil.copy(template, file)
    with sqlite3.connect(file) as connection:
        connection.execute("update alembic_version set version_num = '451aebb31d03'")
        connection.execute("drop table trace_tags")
    os.utime(file, (time.time() - age,) * 2)
    return file.read_bytes()


@pytest.fixture
def quick(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables come from a copy."""
    monkeypatch.setattr(local_database, "_create_tables", lambda draft: shutil.copyfile(template, draft))


def test_s8_a_half_made_file_from_the_future_is_not_waited_for(template: Path, tmp_path: Path) -> None:
    half = half_made(template, tmp_path / "mlflow.db", age=-3600)
    ensure_tracking_file(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_bytes() == half


def test_p16_a_file_that_another_mlflow_is_making_is_not_touched(template: Path, tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    before = half_made(template, file, age=0)
    with pytest.raises(TrackingFileError) as refused:
        MlflowWriter(f"sqlite:///{file}", "pets", "pets")
    assert str(refused.value) == (
        f"Another MLflow is making {file}, or was killed while it did; if that was so, move the file away."
    )
    assert file.read_bytes() == before


@pytest.mark.usefixtures("quick")
def test_p16_a_half_made_file_holds_up_no_study_and_moving_it_away_is_enough(
    template: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "mlflow.db"
    half_made(template, file, age=3600)
    message = (
        f"TrackingFileError: MLflow cannot open {file} (table experiment_tags already exists): it was left half-made, "
        "or is no tracking file. Move it away: the next attempt makes a new one, and the journal has every number."
    )
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal, caplog.at_level(logging.WARNING):
        write_study(journal, finish=False)
        with FollowerThread(follower(path, file)) as following:
            wait_until(lambda: following.problem is not None)
            assert message[:300] in caplog.text
            file.rename(tmp_path / "away.db")
            wait_until(lambda: following.backlog == 0)
            journal.append("study_finished", state="complete")
            assert following.close(60) == 0
    assert len(contents(file)["runs"]) == 5


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("left", ["nothing", "an empty file"])
def test_p16_a_file_that_is_removed_under_a_running_study_is_made_and_filled_again(
    left: str, template: Path, tmp_path: Path
) -> None:
    """MLflow would keep writing to the removed file."""
    file, path = tmp_path / "mlflow.db", tmp_path / "journal.jsonl"
    shutil.copy(template, file)
    with Journal(path) as journal:
        write_study(journal, finish=False)
        with FollowerThread(follower(path, file)) as following:
            wait_until(lambda: following.backlog == 0)
            assert len(contents(file)["runs"]) == 5
            file.unlink()
            if left == "an empty file":
                (tmp_path / "new").touch()
                os.utime(tmp_path / "new", (0, 0))
                (tmp_path / "new").rename(file)
            journal.append("study_finished", state="complete")
            assert following.close(60) == 0
    after = contents(file)
    assert len(after["runs"]) == 5
    assert len(after["metrics"]) == 32
