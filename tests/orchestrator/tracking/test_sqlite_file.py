"""A new SQLite file for MLflow: whole, or not there."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.tracking import sqlite_file
from orchestrator.tracking.sqlite_file import ensure_tracking_file
from orchestrator.tracking.writer import MlflowWriter


def tables(file: Path) -> set[str]:
    with sqlite3.connect(file) as connection:
        return {row[0] for row in connection.execute("select name from sqlite_master where type = 'table'")}


def test_p16_studies_that_start_together_share_one_new_file(tmp_path: Path) -> None:
    file, together, failed = tmp_path / "new" / "mlflow.db", threading.Barrier(6), list[Exception]()

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
from alembic.script import ScriptDirectory
from orchestrator.tracking.sqlite_file import ensure_tracking_file
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
    left = file.with_name(".mlflow.db.new")
    assert left.exists()
    assert not file.exists()
    MlflowWriter(f"sqlite:///{file}", "pets", "pets")
    assert {"runs", "metrics"} <= tables(file)
    assert not left.exists()


def test_p16_the_file_of_another_mlflow_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = tmp_path / "mlflow.db", sqlite_file._migrate

    def migrate(draft: Path) -> None:
        real(draft)
        file.write_text("of a server that was faster")

    monkeypatch.setattr(sqlite_file, "_migrate", migrate)
    ensure_tracking_file(file)
    assert file.read_text() == "of a server that was faster"


def test_p16_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    ensure_tracking_file(tmp_path / "mlflow.db")
    assert {"runs", "metrics"} <= tables(tmp_path / "mlflow.db")
