"""Real studies whose driver or trials are killed with SIGKILL, against the same study undisturbed."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.kills import row
from benchmarks.support.killed_study import (
    StudyContents,
    count_events,
    read_contents,
    run_killed,
    start,
    write_material,
    write_study,
)
from orchestrator import Study
from orchestrator.commands.check import check_study
from orchestrator.record.journal import Journal, fold
from trainables.specs.fault_injection import ENV_FAULT_LOG, ENV_FAULTS
from trainables.storage.checkpoint_format import load_state

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyContents:
    file = write_study(tmp_path_factory.mktemp("whole"), material)
    assert run_killed(file, []) == 0
    return read_contents(file)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB; the study needs four."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a client of MLflow may still have its file open


def events(file: Path) -> list[dict[str, Any]]:
    return Journal.read(Study.from_yaml(file).folder / "journal.jsonl")


def test_p5_p6_p15_a_driver_killed_three_times_and_started_again_gives_the_same_study(
    material: Path, whole: StudyContents, tmp_path: Path
) -> None:
    file = write_study(tmp_path, material)
    hits = run_killed(file, [(3, 0.0), (7, 0.3), (12, 0.05)])  # before its first result, inside trials, at their end
    assert row(whole, read_contents(file), hits, concurrent=1) == {
        "kills": 3, "trials": 8, "trials_lost": 0, "runs_dup": 0, "points_dup": 0, "points_lost": 0, "zombies": 0,
        "histories_compared": 8, "bit_exact": True, "differences": [],
    }  # fmt: skip
    units = [(e["trial_id"], e["unit"]) for e in events(file) if e["kind"] == "result"]
    assert len(units) == sum(len(trial["history"]) for trial in whole.trials)
    assert not list((Study.from_yaml(file).folder / "checkpoints").glob("*"))


@pytest.mark.long
def test_p5_paused_trials_of_a_killed_driver_wait_again_and_the_study_is_the_same(
    material: Path, tmp_path: Path
) -> None:
    search = {"scheduler": "promote", "trials": 8}
    undisturbed = write_study(tmp_path / "undisturbed", material, search=search)
    assert run_killed(undisturbed, []) == 0
    file = write_study(tmp_path / "killed", material, search=search)
    hits = run_killed(file, [(12, 0.2), (16, 0.0), (20, 0.4)])
    assert row(read_contents(undisturbed), read_contents(file), hits, concurrent=1) == {
        "kills": 3, "trials": 10, "trials_lost": 0, "runs_dup": 0, "points_dup": 0, "points_lost": 0, "zombies": 0,
        "histories_compared": 10, "bit_exact": True, "differences": [],
    }  # fmt: skip
    records = fold(events(file))
    assert {r.label for r in records if r.state == "complete"} == {"linear_probe", "full", "daft"}
    assert not list((Study.from_yaml(file).folder / "checkpoints").glob("*"))
    kinds = [event["kind"] for event in events(file)]
    restarts = [index for index, kind in enumerate(kinds) if kind == "study_started"][1:]
    paused_again = [kinds[index + 1 : index + 3] == ["trial_suggested", "trial_paused"] for index in restarts]
    assert sum(paused_again) >= 2, "trials waited while no driver ran"
    assert "trial_promoted" in kinds


@pytest.mark.long
def test_p1_p2_p3_trials_killed_anywhere_in_a_unit_give_the_same_study(
    material: Path, whole: StudyContents, tmp_path: Path
) -> None:
    file = write_study(tmp_path, material)
    faults = (
        "trial=1,unit=2,step=3,phase=step,action=kill",
        "trial=1,unit=4,phase=before_checkpoint,action=kill",
        "trial=2,unit=3,phase=after_checkpoint,action=kill",
        "trial=2,unit=1,phase=in_checkpoint,action=kill",
        "trial=6,unit=1,phase=after_checkpoint,action=kill",
    )
    driver = start(file, **{ENV_FAULTS: ";".join(faults), ENV_FAULT_LOG: str(tmp_path / "faults")})
    assert driver.wait() == 0
    assert len((tmp_path / "faults").read_text().splitlines()) == len(faults)
    assert row(whole, read_contents(file), 0, concurrent=1)["differences"] == []
    assert [e["reason"] for e in events(file) if e["kind"] == "trial_retried"] == ["infra"] * len(faults)


@pytest.mark.long
def test_p20_a_trial_whose_process_always_dies_fails_alone_and_a_later_run_continues_with_it(
    material: Path, whole: StudyContents, tmp_path: Path
) -> None:
    file = write_study(tmp_path, material, search={"trials": 3})
    driver = start(file, **{ENV_FAULTS: "trial=1,unit=2,phase=before_unit,action=kill,times=0"})
    assert driver.wait() == 0
    records = fold(events(file))
    assert [(r.number, r.state, r.reason, r.attempts, r.unit) for r in records[:3]] == [
        (0, "complete", None, 1, 1), (1, "failed", "infra", 3, 1), (2, "complete", None, 1, 4),
    ]  # fmt: skip
    assert start(file).wait() == 0
    again = {record.number: record for record in fold(events(file))}
    assert (again[1].state, again[1].unit) == ("complete", 4)
    assert [dict(unit)["val/acc"] for unit in again[1].history] == [u["val/acc"] for u in whole.trials[1]["history"]]


@pytest.mark.long
def test_s1_a_disk_that_fills_up_ends_the_run_and_with_room_the_same_command_finishes(
    material: Path, whole: StudyContents, small_disk: Path, tmp_path: Path
) -> None:
    file = write_study(tmp_path, material, storage=str(small_disk / "studies"))
    driver = start(file)
    pause = threading.Event()
    while driver.poll() is None and count_events(file) < 8:  # the second trial trains
        pause.wait(0.02)
    filler = small_disk / "filler"
    assert subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], capture_output=True).returncode == 1
    assert driver.wait() == 1
    log = (file.parent / "driver.log").read_text()
    assert f"orchestrator.running.failure_policy.DiskError: A study writes its record to {small_disk}" in log
    folder = Study.from_yaml(file).folder / "checkpoints"
    for path in folder.glob("trial-*/unit-*"):
        load_state(path)  # what is visible is whole
    assert [record.state for record in fold(events(file))].count("complete") >= 1
    filler.unlink()
    assert start(file).wait() == 0
    contents = read_contents(file)
    assert (contents.trials, contents.search, contents.table) == (whole.trials, whole.search, whole.table)
    assert [run["points"] for run in contents.runs if run["name"] != "shapes"] == [
        run["points"] for run in whole.runs if run["name"] != "shapes"
    ]


@pytest.mark.long
@pytest.mark.parametrize(("process", "word"), [("gcs_server", "head process"), ("raylet", "raylet")])
def test_p8_when_rays_head_dies_the_run_ends_with_a_word_and_its_folder_is_whole(
    process: str, word: str, material: Path, tmp_path: Path
) -> None:
    """What the same command does then is that of any dead driver: P5."""
    file = write_study(tmp_path, material)
    driver = start(file)
    pause = threading.Event()
    while driver.poll() is None and count_events(file) < 8:
        pause.wait(0.02)
    (head,) = [p for p in psutil.Process(driver.pid).children(recursive=True) if p.name() == process]
    head.kill()
    assert driver.wait(timeout=60) == 1
    assert f"the {word} of Ray was killed by signal 9. Everything" in (file.parent / "driver.log").read_text()
    study = Study.from_yaml(file)
    assert len(events(file)) >= 8
    assert [finding for finding in check_study(study).findings if finding.level == "problem"] == []
