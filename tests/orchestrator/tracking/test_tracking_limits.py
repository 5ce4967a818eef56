"""Limits of a tracking server, a driver that dies while points are in flight, and many writers at once."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.journal import Journal
from orchestrator.tracking.follower import MlflowFollower
from tests.support.tracking import SPEC, contents, follower, suggest, write_study


def deliver(journal: Path, database: Path) -> MlflowFollower:
    following = follower(journal, database)
    assert following.finish(120, 60) == 0
    return following


def test_c7_long_parameters_and_tags_are_artifacts_as_a_whole_and_state_it(tmp_path: Path, database: Path) -> None:
    value, error, name = "v" * 6001 + "end", "Error: " + "e" * 9000 + "end", "model" * 2000
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("study_started", study="pets", spec=SPEC | {"model": {"name": name}}, dataset_digest="d" * 64)
        suggest(journal, "t0", 0, note=value, short="s" * 500)
        journal.append("trial_started", trial_id="t0", node=None, pid=None)
        journal.append("trial_failed", trial_id="t0", reason="user", error=error)
    assert deliver(path, database).refused == 0
    stored = contents(database)
    params = {key: text for run, key, text in stored["params"] if run == "0000-full"}
    tags = {key: text for run, key, text in stored["tags"] if run == "0000-full"}
    (folder,) = database.parent.glob("artifacts/*/artifacts/long/note.txt")
    whole = {file.name: file.read_text() for file in folder.parent.iterdir()}
    assert whole == {"note.txt": value, "status.error.txt": error, "backbone.txt": name}
    assert params["short"] == "s" * 500
    for text, full, file in (
        (params["note"], value, "note"),
        (tags["status.error"], error, "status.error"),
        (tags["backbone"], name, "backbone"),
    ):
        notice = f"… (whole: long/{file}.txt)"
        assert text.endswith(notice)
        assert full.startswith(text.removesuffix(notice))
        assert len(text) in (500, 5000)


DYING = """
import sys, threading
from pathlib import Path
from orchestrator.record.journal import Journal
from tests.support.tracking import SPEC, suggest, tracking_process
path = Path(sys.argv[1])
with Journal(path) as journal, tracking_process(path, sys.argv[2]) as following:
    journal.append("study_started", study="pets", spec=SPEC, dataset_digest="d" * 64)
    while sys.argv[2].startswith("sqlite") and not following.delivered_offset:
        threading.Event().wait(0.1)
    suggest(journal, "t0", 0)
    journal.append("trial_started", trial_id="t0", node=None, pid=None)
    for unit in range(1, 100000):
        journal.append("result", trial_id="t0", unit=unit, metrics={"val/acc": unit / 1e6})
        print(unit, flush=True)
"""


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("where", ["silent", "database"])
def test_p15_points_of_a_killed_driver_are_delivered_later(
    where: str, silent: str, tmp_path: Path, database: Path
) -> None:
    """All that were reported as recorded; whatever else is in the journal: once."""
    path = tmp_path / "journal.jsonl"
    uri = silent if where == "silent" else f"sqlite:///{database}"
    driver = subprocess.Popen([sys.executable, "-c", DYING, str(path), uri], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    try:
        printed = [line for _, line in zip(range(300), driver.stdout, strict=False)]
        driver.send_signal(signal.SIGKILL)
        printed += driver.stdout.readlines()
    finally:
        driver.kill()
        driver.wait()
    if where == "silent":  # nothing is delivered, and nothing counts as such
        assert not Path(f"{path}.mlflow.json").exists()
    recorded = max(int(line) for line in printed if line.endswith("\n"))
    deliver(path, database)
    steps = sorted(row[4] for row in contents(database)["metrics"] if row[1] == "val/acc")
    assert steps == [event["unit"] for event in Journal.read(path) if event["kind"] == "result"]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) in (recorded, recorded + 1)  # one may be on the disk that was not reported yet
    assert len(contents(database)["runs"]) == 2


WRITER = """
import sys, threading
from pathlib import Path
from orchestrator.record.journal import Journal
from tests.support.tracking import SPEC, FollowerThread, follower, suggest
left = []
def write(path, name):
    delivery = follower(path, sys.argv[2], experiment="shared", study=name)
    with Journal(path) as journal, FollowerThread(delivery) as following:
        journal.append("study_started", study=name, spec=SPEC, dataset_digest="d" * 64)
        for trial in range(4):
            suggest(journal, f"t{trial}", trial)
            journal.append("trial_started", trial_id=f"t{trial}", node=None, pid=None)
            for unit in range(1, 51):
                journal.append("result", trial_id=f"t{trial}", unit=unit, metrics={"val/acc": unit / 100})
                if unit % 10 == 0:
                    threading.Event().wait(0.05)
            journal.append("trial_finished", trial_id=f"t{trial}", state="complete")
        journal.append("study_finished", state="complete")
        left.append((following.close(240, 120), delivery.refused))
sys.stdin.readline()
names = sys.argv[3:]
threads = [threading.Thread(target=write, args=(Path(sys.argv[1]) / f"{name}.jsonl", name)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(left)
"""


@pytest.mark.timeout(300)
def test_p16_eight_studies_write_200_points_each_to_one_new_sqlite_file(tmp_path: Path) -> None:
    """Four in each of two processes, for importing mlflow eight times would take longer than all else."""
    file = tmp_path / "new" / "mlflow.db"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), f"sqlite:///{file}", *names],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for names in ("abcd", "efgh")
    ]  # fmt: skip
    try:
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        outputs = [writer.communicate(timeout=250)[0] for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert outputs == [f"{[(0, 0)] * 4}\n"] * 2
    with sqlite3.connect(file) as connection:
        counted = connection.execute(
            "select count(*), count(distinct run_uuid || ' ' || step) from metrics where key = 'val/acc'"
        ).fetchone()
        runs = connection.execute("select status, count(*) from runs group by status").fetchall()
    assert counted == (1600, 1600)
    assert runs == [("FINISHED", 40)]


def test_p11_an_update_that_only_fails_for_one_run_does_not_hold_back_the_others(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may have a defect that concerns one run, and answer 500 each time."""
    from mlflow import MlflowClient

    log_batch = MlflowClient.log_batch

    def unreliable(self: MlflowClient, run_id: str, **parts: list[Any]) -> None:
        if "'0001-full'" in str(self.get_run(run_id).data.tags):
            raise ConnectionError("500")
        log_batch(self, run_id, **parts)

    monkeypatch.setattr(MlflowClient, "log_batch", unreliable)
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        write_study(journal)
    assert follower(path, database).finish(30, 1) > 0
    others = {row[0] for row in contents(database)["metrics"]}
    assert others == {"0000-full", "0002-full", "0003-full", "pets"}
    monkeypatch.undo()
    deliver(path, database)
    assert len([row for row in contents(database)["metrics"] if row[0] == "0001-full"]) == 6
    assert json.loads(Path(f"{path}.mlflow.json").read_text())["seq"] == len(Journal.read(path)) - 1


def test_p14_points_whose_answer_was_lost_are_not_sent_again(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own database drops a point that is sent twice; not every server does."""
    from mlflow import MlflowClient

    log_batch = MlflowClient.log_batch
    sent = list[tuple[str, str, int]]()
    answers = iter(range(1000))

    def unreliable(self: MlflowClient, run_id: str, **parts: list[Any]) -> None:
        log_batch(self, run_id, **parts)
        sent.extend((run_id, point.key, point.step) for point in parts["metrics"])
        if next(answers) % 2 == 0:
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(MlflowClient, "log_batch", unreliable)
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        write_study(journal)
    assert follower(path, database).finish(60, 30) == 0
    assert next(answers) > 6
    assert len(sent) == len(set(sent)) == len(contents(database)["metrics"])
