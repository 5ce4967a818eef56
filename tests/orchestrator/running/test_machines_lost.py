"""P4, S12: a machine of the cluster dies under a study; its trials continue elsewhere, also in what they keep."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.support.killed_study import ROOT, write_material, write_study
from orchestrator import Study
from orchestrator.record.journal import Journal, fold
from orchestrator.record.kept_files import kept_problems, numbers_on_disk

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

SEARCH = {"trials": 3, "epochs": 6, "scheduler": "none", "sampler": "random"}


def test_p4_trials_of_a_machine_that_dies_continue_elsewhere(tmp_path: Path, one_thread: None) -> None:
    material = write_material(tmp_path / "material")
    file = write_study(
        tmp_path, material, strategies=["full", "daft"], search=SEARCH, confirm={"top_k": 0},
        resources={"concurrent": 2, "gpus": 0},
    )  # fmt: skip
    command = [sys.executable, "-m", "tests.support.machines", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + (file.parent / "driver.log").read_text()[-4000:]
    events = Journal.read(Study.from_yaml(file).folder / "journal.jsonl")
    records = fold(events)
    assert [(record.state, record.unit) for record in records] == [("complete", 6)] * 3
    retried = [event for event in events if event["kind"] == "trial_retried"]
    assert {event["reason"] for event in retried} == {"infra"}
    units = Counter((event["trial_id"], event["unit"]) for event in events if event["kind"] == "result")
    assert set(units.values()) == {1}
    assert len(units) == 3 * 6


def test_s12_a_machine_that_dies_while_weights_are_written_costs_nothing(tmp_path: Path, one_thread: None) -> None:
    material = write_material(tmp_path / "material")
    file = write_study(
        tmp_path, material, strategies=["full"], search={**SEARCH, "trials": 2, "epochs": 2}, confirm={"top_k": 0},
        keep="all", resources={"concurrent": 2, "gpus": 0},
    )  # fmt: skip
    command = [sys.executable, "-m", "tests.support.machines", str(file), "in_weights"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + (file.parent / "driver.log").read_text()[-4000:]
    study = Study.from_yaml(file).folder
    events = Journal.read(study / "journal.jsonl")
    records = fold(events)
    assert [event["reason"] for event in events if event["kind"] == "trial_retried"] == ["infra"]
    assert [(record.state, record.unit) for record in records] == [("complete", 2)] * 2
    assert [kept_problems(study, record) for record in records if record.weights and record.predictions] == [[], []]
    assert numbers_on_disk(study) == [0, 1]
    hidden = [path.name for folder in ("weights", "predictions") for path in (study / folder).glob(".*")]
    assert hidden == [], "what the lost process had begun"
