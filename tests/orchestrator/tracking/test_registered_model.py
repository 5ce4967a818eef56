"""The chosen model of a study as a version of a registered model: once, whatever fails, and never by itself."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from orchestrator.commands import sync as sync_command
from orchestrator.commands.sync import sync
from orchestrator.record.journal import Journal
from orchestrator.study import Study
from orchestrator.tracking.follower import MlflowFollower
from orchestrator.tracking.model_export import ExportedModel, export_chosen_model
from tests.support.exports import finished_study, fresh, pictures
from tests.support.tracking import follower, make_study, suggest, tracking_process, wait_until, write_study

CLASSES = ("cat", "dog")
SECRET = "hunter2-registry-token"
ROOT = str(Path(__file__).parents[3])


class FakeExporter:
    """Exports of a model that is one text file; `trial` is the chosen one."""

    def __init__(self, folder: Path) -> None:
        self.trial = 0
        self.calls = 0
        self._folder = folder

    def __call__(self, study: Path, target: str) -> ExportedModel:
        self.calls += 1
        folder = self._folder / str(self.calls) / "model"
        folder.mkdir(parents=True)
        (folder / "MLmodel").write_text("flavors: {}\n")
        return ExportedModel(folder, self.trial, "full", f"Trial {self.trial}: chosen.", {"lr_backbone": "0.1"})


@pytest.fixture
def exporter(tmp_path: Path) -> FakeExporter:
    return FakeExporter(tmp_path / "exports")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.jsonl") as opened:
        yield opened


def registered(database: Path) -> dict[str, Any]:
    """Registered models, versions and logged models of a database."""
    client = MlflowClient(f"sqlite:///{database}", f"sqlite:///{database}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    versions = sorted(client.search_model_versions(), key=lambda version: int(version.version))
    return {
        "models": {
            model.name: {alias: int(v) for alias, v in model.aliases.items()}
            for model in client.search_registered_models()
        },
        "versions": [(v.name, int(v.version), v.tags["trial"]) for v in versions],
        "logged": sorted(str(m.status.value) for m in client.search_logged_models(experiments)),
        "runs": [v.run_id is not None for v in versions],
        "files": [sorted(p.name for p in Path(v.source.removeprefix("file://")).iterdir()) for v in versions],
    }


ONE_VERSION = {
    "models": {"pets": {"chosen": 1}},
    "versions": [("pets", 1, "0")],
    "logged": ["READY"],
    "runs": [True],
    "files": [["MLmodel"]],
}


@pytest.mark.slow
class TestARealModel:
    @pytest.fixture(scope="class")
    def study(self, tmp_path_factory: pytest.TempPathFactory) -> Study:
        root = tmp_path_factory.mktemp("registered")
        confirmed = {"strategy": "full", "hparams": {"lr_backbone": 0.01}}
        trials = ({**confirmed, "seed": 1}, {**confirmed, "seed": 2, "role": "confirm"})
        images = pictures(root / "pictures", CLASSES)
        return finished_study(root / "studies", images, {"name": "test_vit", "pretrained": False}, trials)

    @pytest.mark.timeout(300)
    def test_it_loads_without_luthier_and_pickle_and_gives_the_exported_logits(
        self, study: Study, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
        exported = export_chosen_model(study.folder, "expected")
        sent = follower(study.folder / "journal.jsonl", database, registered_model="pets")
        assert sent.finish(60) == 0
        assert registered(database)["versions"] == [("pets", 1, "1")], "the confirmed trial"
        logits = fresh(
            """
            import os
            os.environ |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
            import mlflow, numpy
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
            images = numpy.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(numpy.float32)
            models = [mlflow.pyfunc.load_model(address) for address in ("models:/pets@chosen", source)]
            result = [numpy.asarray(model.predict(images)).tolist() for model in models]
            """,
            tmp_path, uri=f"sqlite:///{database}", source=str(exported.folder),
        )  # fmt: skip
        assert logits[0] == logits[1]
        assert np.asarray(logits[0]).shape == (5, 2)
        exported.remove()
        again = follower(study.folder / "journal.jsonl", database, registered_model="pets", replay=True)
        assert again.finish(60) == 0
        assert registered(database)["versions"] == [("pets", 1, "1")]
        assert [path.name for path in study.folder.glob(".*")] == [], "the exported folder is temporary"
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
        assert [path for path in written if path.suffix in (".pkl", ".pickle", ".pt", ".pth")] == []

    @pytest.mark.timeout(300)
    def test_p31_the_end_of_a_study_waits_for_the_export(self, study: Study, database: Path) -> None:
        process = tracking_process(study.folder / "journal.jsonl", database, registered_model="pets").start()
        wait_until(lambda: bool(list(study.folder.glob(".mlflow-model-*"))), 120)
        # Less than an export takes: its seconds are not the server's.
        assert process.close(timeout_s=5.0) == 0
        assert registered(database)["versions"] == [("pets", 1, "1")]

    @pytest.mark.timeout(300)
    def test_p31_an_export_ends_with_its_driver(self, study: Study, database: Path) -> None:
        command = [sys.executable, "-c", DRIVER, str(study.folder / "journal.jsonl"), str(database)]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert driver.stdout is not None
            session = int(driver.stdout.readline())
            wait_until(lambda: bool(list(study.folder.glob(".mlflow-model-*"))) and len(session_of(session)) > 1, 120)
        finally:
            driver.kill()
            driver.wait()
        wait_until(lambda: not session_of(session))

    def test_a_model_that_is_not_kept_is_said_and_the_rest_is_delivered(
        self, study: Study, database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "pets"
        folder.mkdir()
        for name in ("journal.jsonl", "study.yaml"):
            (folder / name).write_bytes((study.folder / name).read_bytes())
        sent = follower(folder / "journal.jsonl", database, registered_model="pets")
        assert sent.finish(60) == 0
        assert registered(database)["models"] == {}
        (warning,) = [r.getMessage() for r in caplog.records if "chosen model" in r.getMessage()]
        assert warning.startswith(
            "The chosen model is not registered in MLflow (A trial's model is restored from its kept"
        )
        assert "but trial 1 (full, confirm) has none in" in warning
        assert warning.endswith("every confirmed trial). `luthier sync --verify` tries again.")


DRIVER = """
import sys, threading
from pathlib import Path
from tests.support.tracking import tracking_process, wait_until
process = tracking_process(Path(sys.argv[1]), Path(sys.argv[2]), registered_model="pets").start()
wait_until(lambda: process.pid is not None)
print(process.pid, flush=True)
threading.Event().wait()
"""


def session_of(leader: int) -> list[int]:
    """Processes of a session that still run."""
    members = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdecimal() else None
        except OSError:  # it has ended meanwhile
            continue
        if fields is not None and int(fields[3]) == leader and fields[0] != "Z":
            members.append(int(entry.name))
    return members


def fail_once(
    monkeypatch: pytest.MonkeyPatch, call: str, when: str, error: type[BaseException] = ConnectionError
) -> None:
    """Let the first call of a method of MLflow's client fail, before or after the server has done it."""
    original = getattr(MlflowClient, call)
    failed: list[str] = []

    def fails(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
        if failed:
            return original(self, *arguments, **options)
        failed.append(call)
        if when == "after":
            original(self, *arguments, **options)
        raise error("injected")

    monkeypatch.setattr(MlflowClient, call, fails)


def test_no_weights_are_sent_unless_the_study_asks_for_it(
    journal: Journal, exporter: FakeExporter, database: Path
) -> None:
    write_study(journal)
    assert follower(journal.path, database, exporter=exporter).finish(30) == 0
    assert exporter.calls == 0
    assert registered(database) == {k: type(v)() for k, v in ONE_VERSION.items()}


def test_a_study_that_is_not_complete_registers_nothing(
    journal: Journal, exporter: FakeExporter, database: Path
) -> None:
    write_study(journal, finish=False)
    journal.append("study_finished", state="interrupted")
    sent = follower(journal.path, database, exporter=exporter, registered_model="pets")
    assert sent.finish(30) == 0
    assert exporter.calls == 0


@pytest.mark.parametrize("lost", ["before", "after"], ids=["never arrived", "its answer was lost"])
@pytest.mark.parametrize(
    "call",
    ["search_model_versions", "search_logged_models", "create_logged_model", "log_model_artifacts",
     "finalize_logged_model", "create_registered_model", "create_model_version", "set_registered_model_alias",
     "set_model_version_tag"],
)  # fmt: skip
def test_p31_a_request_that_fails_anywhere_doubles_nothing(
    journal: Journal, exporter: FakeExporter, database: Path, monkeypatch: pytest.MonkeyPatch, call: str, lost: str
) -> None:
    write_study(journal)
    fail_once(monkeypatch, call, lost)
    sent = follower(journal.path, database, exporter=exporter, registered_model="pets")
    assert sent.finish(30, 30) == 0
    assert registered(database) == ONE_VERSION
    assert exporter.calls == 1, "an export is not repeated because a server failed"
    again = follower(journal.path, database, exporter=exporter, registered_model="pets", replay=True)
    assert again.finish(30) == 0
    assert registered(database) == ONE_VERSION
    assert exporter.calls == 1, "a model that is registered is not exported again"


@pytest.mark.parametrize("call", ["create_logged_model", "create_model_version"])
def test_p31_a_model_that_a_server_makes_late_is_not_there_twice(
    journal: Journal, exporter: FakeExporter, database: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The request times out, is sent again, and the server does both in the end."""
    write_study(journal)
    late: list[Callable[[], object]] = []
    original = getattr(MlflowClient, call)

    def slow(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
        if not late:
            late.append(lambda: original(self, *arguments, **options))
            raise MlflowException("timed out")
        made = original(self, *arguments, **options)
        if len(late) == 1:
            late.append(late[0])
            late[0]()
        return made

    monkeypatch.setattr(MlflowClient, call, slow)
    sent = follower(journal.path, database, exporter=exporter, registered_model="pets")
    assert sent.finish(30, 30) == 0
    assert registered(database) == ONE_VERSION


def test_p31_a_delivery_that_was_killed_is_completed_by_the_next_one(
    journal: Journal, exporter: FakeExporter, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(journal)
    with monkeypatch.context() as patched:
        fail_once(patched, "set_registered_model_alias", "before", error=KeyboardInterrupt)
        sent = follower(journal.path, database, exporter=exporter, registered_model="pets")
        with pytest.raises(KeyboardInterrupt):
            sent.finish(30)
    again = follower(journal.path, database, exporter=exporter, registered_model="pets")
    assert again.finish(30) == 0
    assert registered(database) == ONE_VERSION


def test_a_continued_study_adds_a_version_only_for_another_choice(
    journal: Journal, exporter: FakeExporter, database: Path, template: Path, tmp_path: Path
) -> None:
    write_study(journal)

    def deliver() -> dict[str, Any]:
        sent = follower(journal.path, database, exporter=exporter, registered_model="pets")
        assert sent.finish(30) == 0
        return registered(database)

    deliver()
    journal.append("study_started", study="pets")
    journal.append("study_finished", state="complete")
    assert deliver() == ONE_VERSION, "the same trial"
    exporter.trial = 9
    journal.append("study_started", study="pets")
    suggest(journal, "t9", 9)
    journal.append("trial_started", trial_id="t9", node=None, pid=None)
    journal.append("result", trial_id="t9", unit=1, metrics={"val/acc": 0.9}, node="n1")
    journal.append("trial_finished", trial_id="t9", state="complete")
    journal.append("study_finished", state="complete")
    after = deliver()
    assert after["versions"] == [("pets", 1, "0"), ("pets", 2, "9")]
    assert after["models"] == {"pets": {"chosen": 2}}
    elsewhere = Path(shutil.copy(template, tmp_path / "other.db"))
    whole = follower(journal.path, elsewhere, exporter=exporter, registered_model="pets", position="other.json")
    assert whole.finish(30) == 0
    assert registered(elsewhere)["versions"] == [("pets", 1, "9")], "the latest choice alone"


def test_p31_a_server_that_will_never_take_a_model_ends_the_delivery(
    journal: Journal,
    exporter: FakeExporter,
    database: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_study(journal)

    def refuse(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
        raise MlflowException(f"token {SECRET}: no", error_code=PERMISSION_DENIED)

    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    monkeypatch.setattr(MlflowClient, "create_registered_model", refuse)
    sent = follower(journal.path, database, exporter=exporter, registered_model="pets")
    assert sent.finish(30) == 0
    assert sent.refused == 1
    messages = [record.getMessage() for record in caplog.records]
    assert any(message.startswith("MLflow refuses the chosen model: ") for message in messages)
    assert SECRET not in "".join(messages)


def test_sync_counts_the_model_among_the_artifacts(
    exporter: FakeExporter, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make_study(tmp_path)
    text = (folder / "study.yaml").read_text()
    assert "registered_model: null" in text
    (folder / "study.yaml").write_text(text.replace("registered_model: null", "registered_model: pets"))
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal, trials=1)
    monkeypatch.setattr(sync_command, "MlflowFollower", functools.partial(MlflowFollower, exporter=exporter))
    first = sync(folder)
    again = sync(folder, verify=True)
    assert registered(database)["versions"] == [("pets", 1, "0")]
    assert first.whole
    assert first.added.artifacts > 0
    assert not again.added
