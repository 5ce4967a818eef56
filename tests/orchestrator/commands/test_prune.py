"""`luthier prune`: kept files go, the record says so; a running study and unfinished trials are left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from orchestrator import Study
from orchestrator.cli import app
from orchestrator.commands.exit_status import FAILED, OK
from orchestrator.commands.prune import prune
from orchestrator.record.journal import Journal, JournalError
from orchestrator.record.kept_files import kept_bytes, numbers_on_disk
from orchestrator.record.kept_paths import predictions_file, weights_folder
from orchestrator.record.records import fold
from orchestrator.running.study_run import plain_spec
from orchestrator.study_file.yaml_text import write_yaml
from orchestrator.wording import bytes_text
from trainables.specs.fault_injection import ENV_FAULTS
from trainables.storage.kept_weights import KeptWeights, load_weights, save_weights

runner = CliRunner()
ROOT = str(Path(__file__).parents[3])


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Trials 0 (search) and 1 (confirm) are complete and kept; trial 2 wrote files and was interrupted."""
    made = Study(
        name="s", data={"source": "digits"}, model={"name": "digits_vit"}, strategies=["full"], storage=str(tmp_path)
    )
    with Journal(made.folder / "journal.jsonl") as journal:
        journal.append("study_started", study="s", spec=plain_spec(made.spec))
        for number, role in enumerate(("search", "confirm", "search")):
            trial_id = f"t{number}"
            folder = weights_folder(made.folder, number)
            file = save_weights(folder, KeptWeights({"head.bias": torch.ones(1000)}, {}, {"number": number}))
            predictions = predictions_file(made.folder, number)
            predictions.parent.mkdir(exist_ok=True)
            predictions.write_bytes(b"arrow")
            kept = {"weights": {"sha256": file.sha256, "bytes": file.bytes}}
            journal.append("trial_suggested", trial_id=trial_id, number=number, strategy="full", role=role)
            journal.append("trial_started", trial_id=trial_id)
            if number < 2:
                journal.append("result", trial_id=trial_id, unit=1, metrics={"val/acc": 0.5}, **kept)
                journal.append("trial_finished", trial_id=trial_id, state="complete")
    (made.folder / "study.yaml").write_text(write_yaml(plain_spec(made.spec)))
    return made


def records(study: Study) -> dict[int, Any]:
    return {r.number: r for r in fold(Journal.read(study.folder / "journal.jsonl"))}


def test_files_go_and_the_record_stays(study: Study) -> None:
    pruned = prune(study.folder)
    assert [(t.number, t.label, t.role) for t in pruned.trials] == [(0, "full", "search"), (1, "full", "confirm")]
    assert pruned.bytes > 2 * 4000
    assert numbers_on_disk(study.folder) == [2], "an unfinished trial reports its files with its result"
    after = records(study)
    assert [after[number].weights for number in (0, 1)] == [None, None]
    assert [after[number].metrics for number in (0, 1)] == [{"val/acc": 0.5}] * 2
    assert prune(study.folder).trials == ()


def test_a_dry_run_changes_nothing(study: Study) -> None:
    before = (study.folder / "journal.jsonl").read_bytes()
    assert [t.number for t in prune(study.folder, dry_run=True).trials] == [0, 1]
    assert numbers_on_disk(study.folder) == [0, 1, 2]
    assert (study.folder / "journal.jsonl").read_bytes() == before


def test_a_running_study_is_refused(study: Study) -> None:
    with Journal(study.folder / "journal.jsonl"):
        with pytest.raises(JournalError, match="A study is written by one process at a time"):
            prune(study.folder)
        assert [t.number for t in prune(study.folder, dry_run=True).trials] == [0, 1]
    assert numbers_on_disk(study.folder) == [0, 1, 2]


def test_on_the_command_line(study: Study) -> None:
    size = sum(kept_bytes(study.folder, number) for number in (0, 1))
    shown = runner.invoke(app, ["prune", str(study.folder), "--dry-run"])
    assert shown.exit_code == OK
    assert shown.stdout.splitlines() == [
        "  trial 0 full (search): 4 kB",
        "  trial 1 full (confirm): 4 kB",
        f"Would remove the weights and predictions of 2 trials, {bytes_text(size)}, from {study.folder}",
    ]
    done = runner.invoke(app, ["prune", str(study.folder), "--json"])
    document = json.loads(done.stdout)
    assert (document["study"], document["dry_run"], [t["number"] for t in document["trials"]]) == ("s", False, [0, 1])
    again = runner.invoke(app, ["prune", str(study.folder)])
    assert again.stdout.strip() == f"No trial of s has kept weights or predictions in {study.folder}"


def test_a_study_that_was_never_run(tmp_path: Path, study: Study) -> None:
    (study.folder / "journal.jsonl").unlink()
    result = runner.invoke(app, ["prune", str(study.folder)])
    assert result.exit_code == FAILED
    assert "has no journal at" in result.stderr


@pytest.mark.parametrize(
    "fault",
    [
        "phase=before_event,event=weights_discarded,action=kill",
        "phase=after_event,event=weights_discarded,action=kill",
        "phase=in_discard,action=kill",
    ],
)
def test_s12_a_removal_that_was_killed_is_completed_by_the_next_one(study: Study, fault: str) -> None:
    command = [sys.executable, "-m", "luthier", "prune", str(study.folder)]
    killed = subprocess.run(command, env={**os.environ, ENV_FAULTS: fault}, cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    for number, record in records(study).items():
        if record.weights is not None:
            load_weights(weights_folder(study.folder, number))
    assert numbers_on_disk(study.folder)[-1] == 2
    prune(study.folder)
    assert numbers_on_disk(study.folder) == [2]
    assert [r.weights for r in records(study).values()] == [None, None, None]
    names = sorted(path.name for folder in ("weights", "predictions") for path in (study.folder / folder).iterdir())
    assert names == ["trial-0002", "trial-0002.arrow"], "nothing hidden is left"
