"""`luthier check`, and studies whose data or settings are not those of the last run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.support.synthetic import write_shapes
from orchestrator import Study
from orchestrator.cli import app
from orchestrator.commands.check import check_study
from orchestrator.commands.exit_status import FAILED, OK, PREFLIGHT
from orchestrator.record.changes import ChangedStudyError, versions
from orchestrator.record.checkpoints import checkpoint_folder
from orchestrator.record.journal import Journal
from orchestrator.running.study_run import plain_spec
from orchestrator.running.tracking_process import study_backlog, summarizer
from orchestrator.tracking.follower import MlflowFollower
from orchestrator.tracking.study_tracking import settings_of
from tests.support.driving import searcher
from trainables.data.store import Store
from trainables.storage.checkpoint_format import RunState, save_state
from trainables.storage.checkpoint_store import CheckpointStore

FIELDS: dict[str, Any] = {
    "name": "s",
    "data": {"source": "digits"},
    "model": {"name": "digits_vit"},
    "strategies": ["linear_probe", "full"],
    "search": {"trials": 4, "epochs": 4},
}


def facts(study: Study, digest: str) -> dict[str, Any]:
    return {
        "study": "s", "spec": plain_spec(study.spec), "dataset_digest": digest, "versions": versions(),
    }  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Trial 0 is complete, trial 1 was interrupted after two units; everything is intact."""
    study = Study(**FIELDS, storage=str(tmp_path))
    store = Store(write_shapes(tmp_path / "data" / "digits-1"))
    with Journal(study.folder / "journal.jsonl") as journal:
        journal.append("study_started", **facts(study, store.digest))
        search = searcher(study.folder, ("linear_probe", "full"), journal=journal, trials=4)
        for trial_id, ends in (("a", True), ("b", False)):
            search.suggest(trial_id)
            journal.append("trial_started", trial_id=trial_id)
            for unit in (1,) if ends else (1, 2):
                journal.append("result", trial_id=trial_id, unit=unit, metrics={"val/acc": 0.5})
                search.on_trial_result(trial_id, {"val/acc": 0.5, "unit": unit})
            if ends:
                search.on_trial_complete(trial_id, {"val/acc": 0.5, "unit": 1, "finished": True})
                journal.append("trial_finished", trial_id=trial_id, state="complete")
        search.close()
        journal.append("trial_failed", trial_id="b", reason="interrupted", error="The driver ended at unit 2.")
        journal.append("study_finished", state="interrupted")
    checkpoints = CheckpointStore(checkpoint_folder(study.folder, 1))
    checkpoints.acquire()
    for unit in (1, 2):
        save_state(checkpoints.folder / f"unit-{unit:06d}", RunState({}, {"unit": unit, "step": 0}))
    return study


def findings(study: Study, what: str) -> list[tuple[str, str]]:
    return [(f.level, f.message) for f in check_study(study).findings if f.what == what]


def test_a_study_that_is_whole(study: Study) -> None:
    checked = check_study(study)
    assert checked.sound
    assert findings(study, "journal") == [
        ("ok", "11 events, 2 trials, 1 of them finished; to be resumed: trial 1 full at unit 2")
    ]
    assert findings(study, "study") == [("ok", "study file, code and packages are those of the last run")]
    assert findings(study, "data") == [("ok", f"{study.folder.parent / 'data' / 'digits-1'} is intact")]
    assert findings(study, "search") == [("ok", f"{study.folder / 'optuna.db'} agrees with the journal")]
    kept = checkpoint_folder(study.folder, 1)
    assert findings(study, "checkpoints") == [
        ("ok", f"{kept / 'unit-000001'} is intact: unit 1"), ("ok", f"{kept / 'unit-000002'} is intact: unit 2"),
    ]  # fmt: skip
    command = f"luthier sync {study.folder}"
    left = study_backlog(study.spec, study.folder)
    assert (left.runs, left.points) == (3, 5)
    message = f"MLflow lacks {left} of this study. The next run delivers them, or at once: "
    assert findings(study, "tracking") == [("note", message + command)]


def test_p12_what_mlflow_lacks_is_said_with_the_command_until_it_is_there(study: Study) -> None:
    def deliver() -> None:
        assert MlflowFollower(settings_of(study.spec, study.folder / "journal.jsonl"), summarizer()).finish(60) == 0

    deliver()
    assert findings(study, "tracking") == [("ok", "MLflow has everything")]
    with Journal(study.folder / "journal.jsonl") as journal:
        journal.append("trial_retried", trial_id="b", reason="infra", error="gone")
    assert findings(study, "tracking") == [
        ("note", "MLflow lacks the latest states of this study. The next run delivers them, or at once: luthier sync "
                 f"{study.folder}")
    ]  # fmt: skip
    deliver()
    assert findings(study, "tracking") == [("ok", "MLflow has everything")]


def test_nothing_is_changed_by_looking(study: Study) -> None:
    def everything() -> dict[str, bytes]:
        root = study.folder.parent
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    before = everything()
    check_study(study)
    assert everything() == before


def test_every_damage_is_found(study: Study) -> None:
    folder = study.folder
    os.truncate(folder / "journal.jsonl", (folder / "journal.jsonl").stat().st_size - 7)
    file = checkpoint_folder(folder, 1) / "unit-000002" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (folder / "optuna.db").write_bytes(b"no database" * 100)
    (checkpoint_folder(folder, 0) / "unit-000001").mkdir(parents=True)
    put_aside = folder / "checkpoints" / "quarantine" / "trial-0000-unit-000009"
    put_aside.mkdir(parents=True)
    (put_aside / "problem.txt").write_text("flipped\n")
    store = folder.parent / "data" / "digits-1" / "data.arrow"
    content = bytearray(store.read_bytes())
    content[len(content) // 2] ^= 1
    store.write_bytes(content)
    assert [level for level, _ in findings(study, "journal")] == ["note", "ok"]
    assert findings(study, "data")[0][0] == "problem"
    assert "the file is damaged" in findings(study, "data")[0][1]
    assert findings(study, "search")[0][0] == "note"
    assert "cannot be read" in findings(study, "search")[0][1]
    assert [level for level, _ in findings(study, "checkpoints")] == ["note", "ok", "problem", "note"]
    assert findings(study, "checkpoints")[-1] == ("note", f"{put_aside} is quarantined: flipped")
    assert not check_study(study).sound


def test_p29_what_the_next_run_would_refuse_is_a_problem(study: Study) -> None:
    other = Study(**{**FIELDS, "search": {"trials": 9, "epochs": 5}}, storage=study.spec.storage)
    assert findings(other, "study") == [
        ("note", "search.trials: 4 -> 9 (no number depends on it)"),
        ("problem", "search.epochs: 4 -> 5 (needs --allow-change search.epochs)"),
    ]


@pytest.mark.parametrize("harm", [False, True])
def test_the_command_reports_it_also_by_its_exit_code(study: Study, tmp_path: Path, harm: bool) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps({**FIELDS, "storage": str(tmp_path)}))
    if harm:
        (checkpoint_folder(study.folder, 1) / "unit-000002" / "manifest.json").unlink()
    result = CliRunner().invoke(app, ["check", str(file), "--json"])
    assert result.exit_code == (FAILED if harm else OK)
    report = json.loads(result.stdout)
    assert report["sound"] is not harm
    assert {f["what"] for f in report["findings"]} == {"journal", "study", "data", "search", "checkpoints", "tracking"}


def test_a_run_that_ended_before_the_study_began(tmp_path: Path) -> None:
    """Such as one that was interrupted while the data were read: its journal is empty."""
    study = Study(**FIELDS, storage=str(tmp_path))
    Journal(study.folder / "journal.jsonl").close()
    assert check_study(study).sound
    assert findings(study, "study") == [
        ("note", "The last run ended before the study began: there is nothing to compare.")
    ]
    assert findings(study, "data") == []


def test_a_study_that_never_ran_has_nothing_to_check(tmp_path: Path) -> None:
    study = Study(**FIELDS, storage=str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        check_study(study)
    assert (
        str(error.value)
        == f"The study 's' has no journal at {study.folder}/journal.jsonl. Start it with `luthier run`."
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for domain in ("day", "night"):
        for label in ("cat", "dog"):
            (root / domain / label).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (16, 16), (number * 20, 9, 9)).save(root / domain / label / f"{number}.png")
    return root


def test_d26_data_that_changed_since_the_last_run_are_refused(
    pictures: Path, one_thread: None, network: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(nice: int) -> Any:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr("orchestrator.running.study_run.connect", connect)
    fields = {
        "name": "s", "data": {"root": str(pictures), "ood": ["night"]}, "model": {"name": network("cnn")},
        "strategies": ["linear_probe"], "search": {"trials": 1}, "storage": str(tmp_path / "studies"),
    }  # fmt: skip
    first = Study(**fields)
    digest = first.prepare().digest
    with Journal(first.folder / "journal.jsonl") as journal:
        journal.append("study_started", **facts(first, digest))
        journal.append("trial_started", trial_id="a")
    shutil.copy(pictures / "day" / "cat" / "1.png", pictures / "day" / "cat" / "again.png")
    again = Study(**fields)
    before = {p: p.read_bytes() for p in first.folder.iterdir() if not p.name.endswith(".lock")}
    with pytest.raises(ChangedStudyError) as error:
        again.run(progress=False)
    assert again.prepare().digest != digest
    assert str(error.value) == (
        f"The study 's' was changed since its last run: dataset_digest: {digest} -> {again.prepare().digest} "
        "(images, classes or splits differ)\n"
        "Put the old values back, or give the study another name. If its trials may differ in this, run it with "
        "--allow-change dataset_digest"
    )
    assert {p: p.read_bytes() for p in first.folder.iterdir() if not p.name.endswith(".lock")} == before
    with pytest.raises(AssertionError, match="a cluster was started"):
        again.run(progress=False, allow_change=["dataset_digest"])


def test_p29_the_command_refuses_with_exit_code_4(
    pictures: Path, one_thread: None, network: Callable[[str], str], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "name": "s", "data": {"root": str(pictures), "ood": ["night"]}, "model": {"name": network("cnn")},
        "strategies": ["linear_probe"], "search": {"trials": 1}, "storage": str(tmp_path / "studies"),
    }  # fmt: skip
    study = Study(**fields)
    with Journal(study.folder / "journal.jsonl") as journal:
        digest = study.prepare().digest
        choices = {"copies": "near", "view": {"crop_pct": 1.0}}
        journal.append("study_started", **facts(study, digest), **choices)
        journal.append("trial_started", trial_id="a")
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps({**fields, "search": {"trials": 1, "batch_size": 8}}))
    result = CliRunner().invoke(app, ["run", str(file)])
    assert result.exit_code == PREFLIGHT
    assert "search.batch_size: 64 -> 8\n" in result.stderr
    assert result.stderr.endswith("run it with --allow-change search.batch_size\n")
