"""MLflow ends up with exactly the journal's contents, whatever the server does meanwhile."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.journal import Journal
from orchestrator.running.tracking_process import follow
from orchestrator.study_file.schema import StudySpec
from tests.support.tracking import (
    SPEC,
    FollowerThread,
    contents,
    fail_with,
    follower,
    serve,
    suggest,
    tracking_process,
    wait_until,
    write_study,
)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.jsonl") as opened:
        yield opened


def test_the_run_of_a_paused_trial_waits_in_mlflow_too(journal: Journal, database: Path) -> None:
    """Also after the study's driver has ended."""
    journal.append("study_started", study="pets", spec=SPEC)
    for number in range(2):
        suggest(journal, f"t{number}", number)
        journal.append("trial_started", trial_id=f"t{number}")
        journal.append("result", trial_id=f"t{number}", unit=1, metrics={"val/acc": 0.5})
        journal.append("trial_paused", trial_id=f"t{number}")
    journal.append("trial_promoted", trial_id="t1")
    journal.append("trial_finished", trial_id="t1", state="complete")
    journal.append("study_finished", state="interrupted")
    assert follower(journal.path, database).finish(60) == 0
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("pets")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "pets": "KILLED", "0000-full": "SCHEDULED", "0001-full": "FINISHED",
    }  # fmt: skip
    assert runs["0000-full"].data.tags["status"] == "paused"


def test_a_study_becomes_one_parent_and_one_child_per_trial(journal: Journal, database: Path) -> None:
    write_study(journal)
    following = follower(journal.path, database)
    assert following.finish(60) == 0
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("pets")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["0000-full", "0001-full", "0002-full", "0003-full", "pets"]
    parent = runs["pets"]
    first = runs["0000-full"]
    pruned = runs["0001-full"]
    assert parent.info.run_id == following.run_id
    assert [runs[name].info.status for name in sorted(runs)] == ["FINISHED", "KILLED", "FAILED", "KILLED", "FINISHED"]
    assert [runs[name].data.tags["status"] for name in sorted(runs)][:4] == [
        "complete",
        "pruned",
        "failed",
        "interrupted",
    ]
    assert first.data.tags["mlflow.parentRunId"] == parent.info.run_id
    expected = {"strategy": "full", "label": "full", "backbone": "digits_vit", "dataset": "digits", "seed": "7"}
    expected |= {
        "study": "pets",
        "config_hash": "h0",
        "role": "search",
        "dataset_digest": "d" * 64,
        "status.reason": "ok",
    }
    assert expected.items() <= first.data.tags.items()
    assert first.data.tags["metrics_not_finite"] == "1"
    assert first.data.params == {
        "strategy": "full", "lr_backbone": "0.0001", "lr_backbone.log10": "-4.0", "lr_head": "0.01",
        "lr_head.log10": "-2.0", "momentum": "0.9", "epochs": "3", "batch_size": "64",
    }  # fmt: skip
    assert first.data.metrics == {
        "val/acc": 0.8, "train/loss": 1 / 3, "best/val/acc": 0.8,
        "best/epoch": 3.0, "test/acc": 0.7, "ood/mean/acc": 0.6,
    }  # fmt: skip
    points = client.get_metric_history(first.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(2, 0.5), (3, 1 / 3)]
    assert (pruned.data.metrics["best/val/acc"], pruned.data.metrics["best/epoch"]) == (0.7, 2.0)
    assert runs["0002-full"].data.tags["status.reason"] == "nan"
    (dataset,) = first.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", "d" * 36)
    assert parent.data.tags["mlflow.note.content"].startswith("# pets\n")
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        "figures", "leaderboard.csv", "leaderboard.md", "report.html", "study.json", "versions.json",
    }  # fmt: skip
    assert parent.data.metrics["test/acc"] == 0.7


@pytest.mark.parametrize("forget", [False, True], ids=["position kept", "position lost"])
@pytest.mark.parametrize("cut", [1, 3, 9, 20])
def test_stopping_anywhere_and_replaying_adds_nothing(
    cut: int, forget: bool, journal: Journal, database: Path, template: Path, tmp_path: Path
) -> None:
    write_study(journal)
    straight = Path(shutil.copy(template, tmp_path / "straight.db"))
    assert follower(journal.path, straight).finish(60) == 0
    expected = contents(straight)
    whole = journal.path.read_bytes()
    Path(f"{journal.path}.mlflow.json").unlink()

    journal.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:cut]))
    assert follower(journal.path, database).finish(60) == 0
    journal.path.write_bytes(whole)
    for _ in range(2):
        if forget:
            Path(f"{journal.path}.mlflow.json").unlink(missing_ok=True)
        assert follower(journal.path, database).finish(60) == 0
    stored = contents(database)
    assert len(stored.pop("inputs")) == len(expected.pop("inputs"))
    assert stored == expected


def test_a_running_study_is_followed(journal: Journal, database: Path) -> None:
    with FollowerThread(follower(journal.path, database)) as following:
        write_study(journal, finish=False)
        wait_until(lambda: following.backlog == 0)
        assert len(contents(database)["runs"]) == 5
        journal.append("study_finished", state="interrupted")
        assert following.close(60) == 0
    assert ("pets", "KILLED") in [(run[0], run[1]) for run in contents(database)["runs"]]


def test_a_resumed_trial_keeps_its_run_and_repeated_units_are_not_added(journal: Journal, database: Path) -> None:
    write_study(journal)
    follower(journal.path, database).finish(60)
    before = contents(database)
    journal.append("study_started", study="pets", spec=SPEC, dataset_digest="d" * 64)
    suggest(journal, "t3-again", 3)
    journal.append("trial_started", trial_id="t3-again", node=None, pid=None)
    for unit in (2, 3):
        journal.append("result", trial_id="t3-again", unit=unit, metrics={"val/acc": 0.5 + unit / 10})
    journal.append("trial_finished", trial_id="t3-again", state="complete")
    assert follower(journal.path, database).finish(60) == 0
    after = contents(database)
    assert len(after["runs"]) == len(before["runs"])
    assert ("0003-full", "FINISHED") in [(run[0], run[1]) for run in after["runs"]]
    new = [point for point in after["metrics"] if point not in before["metrics"]]
    assert [(name, key, step) for name, key, _, _, step in new if key == "val/acc"] == [("0003-full", "val/acc", 3)]


def test_a_server_that_fails_now_and_then_loses_and_doubles_nothing(
    journal: Journal, database: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    write_study(journal)
    straight = Path(shutil.copy(template, tmp_path / "straight.db"))
    follower(journal.path, straight).finish(60)
    Path(f"{journal.path}.mlflow.json").unlink()
    calls: Counter[str] = Counter()

    def unreliable(name: str) -> Callable[..., Any]:
        real = getattr(MlflowClient, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            if calls[name] % 3 == 1:
                raise ConnectionError("refused before the server did anything")
            result = real(*args, **kwargs)
            if calls[name] % 3 == 2:
                raise ConnectionError("the answer was lost after the server did it")
            return result

        return call

    for name in ("create_run", "log_batch", "log_inputs", "log_artifacts", "log_artifact", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, unreliable(name))
    assert follower(journal.path, database).finish(100, 100) == 0
    assert calls.pop("log_artifacts") == 1  # after its failure the artifacts are uploaded one by one
    assert min(calls.values()) >= 5
    stored = contents(database)
    expected = contents(straight)
    del stored["inputs"], expected["inputs"]
    assert stored == expected


def test_a_deleted_run_stays_deleted(journal: Journal, database: Path) -> None:
    from mlflow import MlflowClient

    write_study(journal, finish=False)
    follower(journal.path, database).finish(60)
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("pets")
    for run in client.search_runs([experiment.experiment_id], "tags.number = '1'"):
        client.delete_run(run.info.run_id)
    journal.append("trial_failed", trial_id="t1", reason="user", error="late")
    journal.append("study_finished", state="complete")
    assert follower(journal.path, database).finish(60) == 0
    assert "0001-full" not in [run[0] for run in contents(database)["runs"]]


def test_an_emptied_server_gets_everything_again(journal: Journal, database: Path, template: Path) -> None:
    write_study(journal, finish=False)
    follower(journal.path, database).finish(60)
    shutil.copy(template, database)
    journal.append("study_finished", state="complete")
    assert follower(journal.path, database).finish(60) == 0
    assert len(contents(database)["runs"]) == 5


class Killed(BaseException):
    """Ends a delivery, as a kill ends its process."""


def test_p15_a_driver_killed_while_it_fills_an_emptied_server_leaves_the_rest_to_the_next(
    journal: Journal, database: Path, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new server has the study then, but not all that was delivered to the old one."""
    from mlflow import MlflowClient

    write_study(journal, finish=False)
    assert follower(journal.path, database).finish(60) == 0
    whole = contents(database)
    log_batch = MlflowClient.log_batch
    calls = list[str]()
    database.unlink()
    shutil.copy(template, database)
    journal.append("study_started", study="pets", spec=SPEC, dataset_digest="d" * 64)

    def dying(self: MlflowClient, run_id: str, **parts: list[Any]) -> None:
        calls.append(run_id)
        if len(calls) == 3:
            raise Killed
        log_batch(self, run_id, **parts)

    monkeypatch.setattr(MlflowClient, "log_batch", dying)
    with pytest.raises(Killed):
        follower(journal.path, database).finish(60)
    monkeypatch.undo()
    assert 0 < len(contents(database)["runs"]) < 5
    assert follower(journal.path, database).finish(60) == 0
    assert contents(database)["metrics"] == whole["metrics"]


def test_what_a_server_refuses_for_ever_does_not_hold_back_the_rest(
    journal: Journal, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_study(journal, trials=1, finish=False)
    follower(journal.path, database).finish(60)
    changed = SPEC | {"search": {"epochs": 9, "batch_size": 64}}  # parameters of a run cannot be changed
    journal.append("study_started", study="pets", spec=changed, dataset_digest="d" * 64)
    suggest(journal, "t0-again", 0)
    journal.append("trial_started", trial_id="t0-again", node=None, pid=None)
    journal.append("result", trial_id="t0-again", unit=4, metrics={"val/acc": 0.875})
    following = follower(journal.path, database)
    with caplog.at_level(logging.WARNING):
        assert following.finish(60) == 0
    assert following.refused == 1
    assert "MLflow refuses part of the record" in caplog.text
    assert 0.875 in [row[2] for row in contents(database)["metrics"]]


def test_a_run_costs_one_call_of_each_kind_and_no_look_up(
    journal: Journal, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many points, parameters, tags and artifacts it has."""
    from mlflow import MlflowClient

    curve = {"columns": {"layer": ["a", "b"], "value": [1.0, 2.0]}, "note": ""}
    write_study(journal, trials=1, finish=False, curves={"cka": curve, "ln_shift": curve})
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        call = getattr(MlflowClient, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return call(*args, **kwargs)

        return count

    for name in dir(MlflowClient):
        if not name.startswith("_") and callable(getattr(MlflowClient, name)):
            monkeypatch.setattr(MlflowClient, name, counted(name))
    assert follower(journal.path, database).finish(60) == 0
    connecting = {"get_experiment_by_name": 1, "create_experiment": 1, "search_runs": 1}
    # The run of the study has points, parameters and status of its creation, so that only the trial's are written.
    per_run = {"create_run": 2, "log_batch": 1, "log_inputs": 2, "log_artifacts": 2, "set_terminated": 1}
    assert calls == connecting | per_run


@pytest.fixture(params=["500", "502 html", "401", "silent", "refused"])
def broken_server(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "refused":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            yield f"http://127.0.0.1:{unused.getsockname()[1]}"
        return
    server = serve(
        {
            "500": fail_with(500, b'{"error_code": "INTERNAL_ERROR", "message": "no"}'),
            "502 html": fail_with(502, b"<html>Bad Gateway</html>"),
            "401": fail_with(401, b"You are not authenticated"),
            "silent": lambda request: threading.Event().wait(30),
        }[request.param]
    )
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_backlog_of_a_broken_server_is_delivered_later(
    broken_server: str, journal: Journal, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    write_study(journal)
    with tracking_process(journal.path, broken_server) as following:
        wait_until(lambda: following.problem is not None)
        assert following.close(0.5) == len(journal.events())
    assert follower(journal.path, database).finish(60) == 0
    assert len(contents(database)["runs"]) == 5


def test_the_end_of_a_study_logs_the_backlog_and_the_command_that_delivers_it(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"name": "pets", "data": {"source": "digits"}, "model": {"name": "digits_vit"}, "strategies": ["full"]}
    spec = StudySpec.from_fields(fields | {"tracking": {"uri": "http://127.0.0.1:9"}})
    with caplog.at_level(logging.WARNING), follow(spec, journal) as following:
        write_study(journal)
        wait_until(lambda: following.problem is not None)
    assert "MLflow does not take the record (NewConnectionError: Failed to" in caplog.text
    assert "MLflow lacks 5 runs, 32 points and 5 artifacts of this study (NewConnectionError: Failed to" in caplog.text
    command = f"Nothing is lost: the journal keeps them. Deliver them later: luthier sync {journal.path.parent}"
    assert command in caplog.text


def test_an_invalid_event_is_skipped(journal: Journal, database: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal.append("study_started", study="pets", spec=SPEC)
    suggest(journal, "t0", 0)
    journal.append("trial_started", trial_id="t0")
    journal.append("result", trial_id="t0", metrics="none")
    journal.append("result", trial_id="t0", unit=1, metrics={"val/acc": 0.5})
    assert follower(journal.path, database).finish(60) == 0
    assert f"Event 3 of {journal.path} is not delivered to MLflow" in caplog.text
    assert 0.5 in [row[2] for row in contents(database)["metrics"]]


def test_two_followers_of_one_journal_do_not_write_at_once(journal: Journal, database: Path) -> None:
    write_study(journal)
    with FollowerThread(follower(journal.path, database)) as first:
        wait_until(lambda: first.backlog == 0)
        second = FollowerThread(follower(journal.path, database)).start()
        wait_until(lambda: second.problem is not None)
        assert second.problem is not None
        assert second.problem.startswith(
            "DeliveryError: One process at a time delivers a journal, but process "
            f"{os.getpid()} on {socket.gethostname()} (since 2"
        )
        assert first.close(60) == 0
        assert second.close(60) == 0
    assert len(contents(database)["runs"]) == 5


def test_importing_the_records_imports_no_heavy_package() -> None:
    program = (
        "import sys, orchestrator.tracking.follower, orchestrator.record.journal\n"
        "import orchestrator.results.selection, orchestrator.running.progress\n"
        "print(sorted({'mlflow', 'ray', 'torch', 'optuna', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
