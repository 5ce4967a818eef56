"""The soak's own machinery, without a cluster: what is drawn, what is counted. The soak itself is `make soak`."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import truncate
from benchmarks.support.soak_comparison import StudyEnd, plain, row
from benchmarks.support.soak_faults import INSIDE, OUTSIDE, PER_TRIAL, draw
from benchmarks.support.soak_run import Outcome
from trainables.specs.fault_injection import Fault

ROOT = Path(__file__).resolve().parent.parent


def test_the_same_seed_draws_the_same_faults_and_every_kind_is_there() -> None:
    drawn = draw(2023, 34, trials=12, units=10, steps=40)
    assert drawn == draw(2023, 34, trials=12, units=10, steps=40) != draw(2024, 34, trials=12, units=10, steps=40)
    assert set(drawn.kinds) == {*INSIDE, *OUTSIDE}
    assert sum(drawn.kinds.values()) == len(drawn.inside) + len(drawn.outside) == 34
    faults = [Fault.parse(text) for text in drawn.environment.split(";")]
    where = [(fault.where["trial"], fault.where["unit"]) for fault in faults[:-1]]
    assert len(set(where)) == len(where), "one fault per unit"
    assert max(Counter(trial for trial, _ in where).values()) <= PER_TRIAL
    moments = [begun for begun, _ in drawn.outside]
    assert moments == sorted(moments)
    assert 0 < moments[0] <= moments[-1] < 0.95 * 120


def test_more_faults_than_places_are_refused() -> None:
    with pytest.raises(ValueError, match="1 trials have room for 2 faults inside them; ask for fewer"):
        draw(0, 34, trials=1, units=10, steps=40)


def test_a_bench_is_not_a_soak() -> None:
    output = subprocess.run(["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "benchmarks.kills" in output
    assert "benchmarks.soak" not in output


def study_end(points: dict[Any, list[float | None]], **fields: Any) -> StudyEnd:
    given: dict[str, Any] = {"curves": {"0": 0.5, "1": 0.7}, "runs": 2, "trials_with_runs": 2, "zombies": 0, **fields}
    return StudyEnd(points=points, **given)


def test_what_is_lost_double_or_different_is_counted() -> None:
    calm, rough = Outcome(seconds=100.0), Outcome(seconds=180.0, repeated=3, longest_stall=0.5)
    whole = study_end({("0", "val/acc", 1): [0.25], ("0", "val/acc", 2): [0.5], ("1", "val/acc", 1): [0.7]})
    same = row(whole, whole, calm, calm)
    gate = ("trials_lost", "epochs_repeated", "points_lost", "points_dup", "runs_dup", "zombies", "overhead_x")
    assert [same[name] for name in gate] == [0, 0, 0, 0, 0, 0, 1.0]
    assert same["bit_exact"] is True
    points: dict[Any, list[float | None]] = {("0", "val/acc", 1): [0.25, 0.25], ("0", "val/acc", 2): [0.5]}
    worse = row(whole, study_end(points, curves={"0": 0.5}, runs=3, zombies=1), calm, rough)
    assert [worse[name] for name in gate] == [1, 3, 1, 1, 1, 1, 1.8]
    assert (worse["bit_exact"], worse["max_stall_s"]) == (False, 0.5)


@pytest.mark.parametrize("change", ["point", "final"])
def test_one_bit_of_a_curve_or_of_a_final_number_is_seen(change: str) -> None:
    other = 0.5000000000000001
    whole = study_end({("0", "val/acc", 1): [0.5]})
    changed = study_end({("0", "val/acc", 1): [other if change == "point" else 0.5]}, curves={"0": 0.5, "1": 0.7})
    if change == "final":
        changed.curves["0"] = other
    assert row(whole, changed, Outcome(seconds=1.0), Outcome(seconds=1.0))["bit_exact"] is False


def test_points_of_all_runs_of_a_trial_count_and_an_open_run_is_a_zombie(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with sqlite3.connect(database) as file:
        file.executescript(
            """
            create table runs (run_uuid, name, status, lifecycle_stage);
            create table params (run_uuid, key, value);
            create table metrics (run_uuid, key, step, value, is_nan, timestamp);
            insert into runs values ('a', 'x', 'RUNNING', 'active'), ('b', 'y', 'FINISHED', 'active');
            insert into params values ('a', 'number', '7'), ('b', 'number', '7');
            insert into metrics values ('a', 'val/acc', 1, 0.5, 0, 0), ('b', 'val/acc', 1, 0.5, 0, 1),
                ('b', 'train/loss', 1, 0.0, 1, 1), ('b', 'time_total_s', 1, 9.0, 0, 1);
            """
        )
    left = plain(tmp_path, database, units=10)
    assert left.points == {("7", "val/acc", 1): [0.5, 0.5], ("7", "train/loss", 1): [None]}
    assert (left.runs, left.trials_with_runs, left.zombies, left.curves) == (2, 1, 1, {})


def test_the_newest_file_is_cut_in_half(tmp_path: Path) -> None:
    assert truncate(tmp_path, "tensors.safetensors") is False
    for index in range(2):
        file = tmp_path / f"unit-{index}" / "tensors.safetensors"
        file.parent.mkdir()
        file.write_bytes(bytes(2000))
        os.utime(file, (index, index))
    assert truncate(tmp_path, "tensors.safetensors") is True
    assert [(tmp_path / f"unit-{i}" / "tensors.safetensors").stat().st_size for i in range(2)] == [2000, 1000]
