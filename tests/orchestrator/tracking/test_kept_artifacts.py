"""Predictions, figures and the use of the machine in a study's runs; a large file holds nothing else back."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import requests
from mlflow import MlflowClient

from orchestrator.record.journal import Journal
from orchestrator.record.kept_files import discard_kept
from orchestrator.record.kept_paths import predictions_file
from tests.support.tracking import follower

CONTENT = b"arrow" * 1000
BOTH = ["0001-full-confirm/predictions.arrow", "0002-full-confirm/predictions.arrow"]


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Journal]:
    """A search trial and two confirmed ones, all with predictions."""
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append("study_started", study="pets", spec={"name": "pets", "search": {"epochs": 1}})
        record_trial(journal, 0, "search")
        record_trial(journal, 1, "confirm")
        record_trial(journal, 2, "confirm")
        journal.append("study_finished", state="complete")
        yield journal


def record_trial(journal: Journal, number: int, role: str) -> None:
    """Record a complete trial that has kept its predictions."""
    file = predictions_file(journal.path.parent, number)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(CONTENT)
    kept = {"sha256": hashlib.sha256(CONTENT).hexdigest(), "bytes": len(CONTENT)}
    trial_id = f"t{number}"
    journal.append(
        "trial_suggested", trial_id=trial_id, number=number, strategy="full", label="full", seed=number, role=role,
        hparams={}, config_hash="h",
    )  # fmt: skip
    journal.append("trial_started", trial_id=trial_id, node=None, pid=None)
    metrics = {
        "val/acc": 0.5 + number / 100, "best/val/acc": 0.5, "test/acc": 0.5, "cost/cpu_use": 1.5,
        "cost/host_bytes": 5e8, "cost/gpu_use": 0.25, "cost/gpu_bytes": 2e9, "cost/unit_seconds": 3.0,
    }  # fmt: skip
    journal.append("result", trial_id=trial_id, unit=1, metrics={"val/acc": 0.4}, node="n1")
    journal.append("result", trial_id=trial_id, unit=2, metrics=metrics, node="n1", predictions=kept)
    journal.append("trial_finished", trial_id=trial_id, state="complete")


def artifacts(database: Path) -> dict[str, bytes]:
    """`<name of the run>/<artifact>` → contents."""
    with sqlite3.connect(database) as connection:
        runs = connection.execute("select name, artifact_uri from runs").fetchall()
    roots = [(name, Path(uri.removeprefix("file://"))) for name, uri in runs]
    return {
        f"{name}/{path.relative_to(root)}": path.read_bytes()
        for name, root in roots
        for path in root.rglob("*")
        if path.is_file()
    }


def with_predictions(database: Path) -> list[str]:
    return sorted(name for name in artifacts(database) if name.endswith("predictions.arrow"))


def test_predictions_of_confirmed_trials_are_artifacts_of_their_runs(study: Journal, database: Path) -> None:
    for replay in (False, True):
        assert follower(study.path, database, replay=replay).finish(30) == 0
        assert with_predictions(database) == BOTH
    assert artifacts(database)[BOTH[0]] == CONTENT


def test_they_are_not_sent_where_the_study_does_not_want_it(study: Journal, database: Path) -> None:
    assert follower(study.path, database, predictions=False).finish(30) == 0
    assert with_predictions(database) == []


def test_s13_predictions_that_were_removed_are_left_out_and_damaged_ones_with_a_word(
    study: Journal, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    discard_kept(study.path.parent, 1)
    damaged = predictions_file(study.path.parent, 2)
    damaged.write_bytes(CONTENT[:-1] + b"X")
    assert follower(study.path, database).finish(30) == 0
    assert with_predictions(database) == []
    messages = [record.getMessage() for record in caplog.records if "kept file" in record.getMessage()]
    assert messages == [
        f"A kept file must have the SHA-256 of its record, but {damaged} has another one: it is not sent to MLflow. "
        "`luthier check` says more."
    ]


def test_s13_a_file_that_a_server_cannot_store_holds_nothing_else_back(
    study: Journal, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MlflowClient.log_artifact

    def full(self: MlflowClient, run_id: str, local_path: str, artifact_path: str | None = None) -> Any:
        if local_path.endswith("predictions.arrow"):
            raise OSError("No space left on device")
        return original(self, run_id, local_path, artifact_path)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_artifact", full)
        assert follower(study.path, database).finish(5, 0.1) > 0
    assert {"pets/report.html", "pets/leaderboard.md"} <= artifacts(database).keys()
    assert with_predictions(database) == []
    assert follower(study.path, database).finish(30) == 0
    assert with_predictions(database) == BOTH


def test_s13_a_file_that_is_too_large_for_a_server_is_refused_and_the_delivery_ends(
    study: Journal, database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = MlflowClient.log_artifact

    def too_large(self: MlflowClient, run_id: str, local_path: str, artifact_path: str | None = None) -> Any:
        if local_path.endswith("predictions.arrow"):
            response = requests.Response()
            response.status_code = 413
            raise requests.HTTPError("413 Client Error", response=response)
        return original(self, run_id, local_path, artifact_path)

    monkeypatch.setattr(MlflowClient, "log_artifact", too_large)
    sent = follower(study.path, database)
    assert sent.finish(30) == 0
    assert sent.refused == 2
    assert "MLflow refuses the artifact predictions.arrow of " in caplog.text


def test_figures_of_the_report_are_artifacts_of_the_study(study: Journal, database: Path) -> None:
    assert follower(study.path, database).finish(30) == 0
    sent = artifacts(database)
    figures = {name: content for name, content in sent.items() if name.startswith("pets/figures/")}
    assert "pets/figures/training.svg" in figures
    roots = {ElementTree.fromstring(content).tag for content in figures.values()}
    assert roots == {"{http://www.w3.org/2000/svg}svg"}
    assert sent["pets/report.html"].count(b"data:image/svg+xml") == len(figures)


def test_the_use_of_the_machine_is_among_mlflows_system_metrics(study: Journal, database: Path) -> None:
    assert follower(study.path, database).finish(30) == 0
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "select key, value, step from metrics join runs using (run_uuid) where name = '0001-full-confirm'"
        ).fetchall()
    points = {key: (value, step) for key, value, step in rows}
    assert {key: value for key, value in points.items() if key.startswith("system/")} == {
        "system/process_cpu_utilization_percentage": (150.0, 2),
        "system/process_memory_usage_megabytes": (500.0, 2),
        "system/gpu_utilization_percentage": (25.0, 2),
        "system/process_gpu_memory_usage_megabytes": (2000.0, 2),
    }
    assert [key for key in points if key.startswith("cost/")] == ["cost/unit_seconds"]
