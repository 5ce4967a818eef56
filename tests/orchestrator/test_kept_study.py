"""A whole study keeps the weights of its best trials, also where its driver was killed or its disk was full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.synthetic import write_images
from orchestrator import Study
from orchestrator.commands.check import check_study
from orchestrator.planning.build import retention_of
from orchestrator.record.journal import Journal
from orchestrator.record.kept_files import kept_problems, numbers_on_disk
from orchestrator.record.kept_paths import weights_folder
from orchestrator.record.records import TrialRecord, fold
from orchestrator.running.study_run import plain_spec
from orchestrator.study_file.yaml_text import write_yaml
from trainables.engine.tuned_network import tuned_network
from trainables.specs.fault_injection import ENV_FAULT_LOG, ENV_FAULTS
from trainables.storage.kept_weights import load_weights

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def study(images: Path, network: Callable[[str], str], tmp_path: Path) -> Study:
    return new_study(images, network("vit"), tmp_path)


@pytest.fixture(scope="module")
def whole(images: Path, network: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Study:
    """An undisturbed run of the same study."""
    made = new_study(images, network("vit"), tmp_path_factory.mktemp("whole"))
    assert run(made) == 0
    return made


def new_study(images: Path, model: str, storage: Path) -> Study:
    """Two strategies, four search trials, two confirmations."""
    fields: dict[str, Any] = {
        "name": "kept",
        "data": {"root": str(images), "id": ["bright", "dim"], "ood": ["inverted", "noisy"]},
        "model": {"name": model},
        "strategies": ["linear_probe", "lora"],
        "search": {"trials": 4, "epochs": 2, "scheduler": "none", "seed": 3, "batch_size": 16},
        "confirm": {"top_k": 2, "seeds": 1},
        "resources": {"concurrent": 1, "channels_last": False},
        "storage": str(storage),
    }
    return Study(**fields)


def run(study: Study, faults: str = "") -> int:
    """`luthier run` in a process of its own."""
    file = study.folder.parent / "study.yaml"
    file.write_text(write_yaml(plain_spec(study.spec)))
    environment = {**os.environ, ENV_FAULTS: faults, ENV_FAULT_LOG: str(study.folder.parent / "faults")}
    command = [sys.executable, "-m", "luthier", "run", "--no-progress", str(file)]
    return subprocess.run(command, env=environment, capture_output=True).returncode


def records(study: Study) -> list[TrialRecord]:
    return fold(Journal.read(study.folder / "journal.jsonl"))


def assert_kept(study: Study) -> None:
    """Best of each entry and every confirmed trial, whole, in record and folder, and nothing else."""
    superseded = {r.number for r in retention_of(study.spec).superseded(records(study))}
    kept = [r for r in records(study) if r.number not in superseded]
    assert [(r.label, r.role) for r in kept].count(("lora", "confirm")) == 1
    assert numbers_on_disk(study.folder) == [r.number for r in kept]
    assert [r.number for r in records(study) if r.weights and r.predictions] == [r.number for r in kept]
    assert [kept_problems(study.folder, record) for record in kept] == [[]] * len(kept)
    assert not list(study.folder.glob("weights/.*")) + list(study.folder.glob("predictions/.*"))


def test_a_study_keeps_the_best_and_the_confirmed_and_its_folder_is_sound(whole: Study) -> None:
    assert_kept(whole)
    levels = [(f.what, f.level, f.message) for f in check_study(whole).findings if f.what == "weights"]
    assert levels == [("weights", "ok", "kept files of 4 trials are intact")]
    lora = next(r for r in records(whole) if (r.label, r.role) == ("lora", "confirm"))
    weights = load_weights(weights_folder(whole.folder, lora.number))
    assert weights.meta["config_hash"] == lora.config_hash
    assert weights.adapter
    tuned_network(weights)


@pytest.mark.long
@pytest.mark.parametrize(
    "fault",
    [
        "phase=before_event,event=trial_finished,action=kill",  # files are written and reported, the trial is open
        "phase=after_event,event=weights_discarded,action=kill",  # the record has let go of them, the disk has not
        "phase=after_event,event=trial_finished,action=kill,times=3",
    ],
)
def test_s12_a_killed_driver_loses_nothing_and_discards_at_its_next_start(study: Study, fault: str) -> None:
    codes = [run(study, fault)]
    while codes[-1] == -signal.SIGKILL and len(codes) < 6:
        codes.append(run(study, fault))
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0]
    assert len(codes) > 1
    assert_kept(study)


@pytest.mark.long
def test_s12_a_driver_killed_between_the_weights_and_their_record_loses_neither(study: Study, whole: Study) -> None:
    """The files are there, the journal does not have the result that names them."""
    events = Journal.read(whole.folder / "journal.jsonl")
    first = next(event for event in events if event["kind"] == "result" and event.get("weights"))
    assert run(study, f"phase=before_event,event=result,seq={first['seq']},action=kill") == -signal.SIGKILL
    killed = records(study)
    assert [r.number for r in killed if r.weights] == []
    written = numbers_on_disk(study.folder)
    assert len(written) == 1
    assert run(study) == 0
    assert_kept(study)
    assert [(r.label, r.role, r.weights) for r in records(study)] == [
        (r.label, r.role, r.weights) for r in records(whole)
    ]


@pytest.mark.long
@pytest.mark.parametrize("phase", ["in_weights", "in_predictions", "after_kept"])
def test_s12_a_process_of_a_trial_killed_while_it_keeps_writes_again(study: Study, whole: Study, phase: str) -> None:
    assert run(study, f"phase={phase},action=kill") == 0
    retried = [e["reason"] for e in Journal.read(study.folder / "journal.jsonl") if e["kind"] == "trial_retried"]
    assert retried == ["infra"]
    assert_kept(study)
    assert [r.weights for r in records(study)] == [r.weights for r in records(whole)]
    assert [r.predictions for r in records(study)] == [r.predictions for r in records(whole)]


@pytest.mark.long
@pytest.mark.parametrize(("lost", "other"), [("weights", "predictions"), ("predictions", "weights")])
def test_s12_a_full_disk_loses_a_file_with_a_word_and_no_trial(study: Study, lost: str, other: str) -> None:
    assert run(study, f"phase=in_{lost},action=full,times=0") == 0
    assert {r.state for r in records(study)} == {"complete"}
    assert [getattr(r, lost) for r in records(study)] == [None] * 6
    problems = [e for e in Journal.read(study.folder / "journal.jsonl") if e["kind"] == "checkpoint_problem"]
    assert len(problems) == 6
    assert all(e["problem"].startswith(f"No {lost} could be kept in ") for e in problems)
    assert len([r for r in records(study) if getattr(r, other)]) == 4, "the other file is kept all the same"
    assert [path.name for path in (study.folder / lost).iterdir()] == []
