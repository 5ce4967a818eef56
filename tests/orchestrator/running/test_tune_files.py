"""Tune keeps no files of its own, so that none of them can be missed, fill a disk or be unpickled."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from benchmarks.support.killed_study import start, write_material, write_study
from orchestrator import Study
from orchestrator.cluster.connection import KNOBS
from orchestrator.cluster.driver_process import environment
from orchestrator.ray_internals import in_memory_tune_storage, without_tune_files
from tests.support.canary import Canary
from tests.support.clusters import plain_cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with environment(KNOBS), plain_cluster(cpus=1):
        yield


class Stumbling(tune.Trainable):  # type: ignore[misc]
    """Two results; trial 1 raises at its second unit, whenever it is tried."""

    def step(self) -> dict[str, Any]:
        if self.config["number"] == 1 and self.iteration == 1:
            raise ArithmeticError(f"attempt of trial {self.config['number']}")
        return {"unit": self.iteration + 1, "done": self.iteration == 1}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True


class Sweeper(tune.Callback):  # type: ignore[misc]
    """Removes the folder of Tune's files after every result, and notes what was there."""

    def __init__(self) -> None:
        self.found = set[str]()
        self.ended = list[str]()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        folder = Path(trial.storage._get_session_path())
        self.found |= {str(path.relative_to(folder)) for path in folder.rglob("*")}
        shutil.rmtree(folder, ignore_errors=True)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ended.append("tried again")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.ended.append("failed")


@pytest.mark.usefixtures("cluster")
def test_p4_no_file_of_tune_can_end_a_study(caplog: pytest.LogCaptureFixture) -> None:
    sweeper = Sweeper()
    errors = dict[str, str]()
    tuner = tune.Tuner(
        tune.with_resources(Stumbling, {"cpu": 1}),
        param_space={"number": tune.grid_search([0, 1, 2])},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=1, reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial-{trial.config['number']}",
        ),
        run_config=tune.RunConfig(
            name="ray", **in_memory_tune_storage(), verbose=0, callbacks=[sweeper],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING), without_tune_files(errors):
        assert list(tuner.fit()) == []
    assert sweeper.ended == ["tried again", "failed"]
    (text,) = errors.values()
    assert "ArithmeticError: attempt of trial 1" in text
    assert {Path(path).parts[0] for path in sweeper.found} == {"working_dirs"}  # that of a trial's process
    messages = [record.getMessage() for record in caplog.records if "Saving experiment state" in record.getMessage()]
    assert messages == []


@pytest.mark.slow
@pytest.mark.long
def test_a_finished_study_is_run_again_without_a_word_and_reads_nothing_of_tune(
    tmp_path: Path, one_thread: None
) -> None:
    material = write_material(tmp_path / "material")
    file = write_study(tmp_path, material, strategies=["full"], search={"trials": 1, "epochs": 1}, confirm={"top_k": 0})
    assert start(file).wait() == 0
    folder = Study.from_yaml(file).folder
    marker = tmp_path / "executed"
    (folder / "ray").mkdir()  # by another program: the study has made none
    canary = pickle.dumps(Canary(marker))
    state = {"_type": "CLOUDPICKLE_FALLBACK", "value": canary.hex()}
    (folder / "ray" / "experiment_state-9999.json").write_text(json.dumps({"trial_data": state}))
    log = file.parent / "driver.log"
    log.unlink()
    assert start(file).wait() == 0
    assert "Traceback" not in log.read_text()
    assert "ERROR" not in log.read_text()
    assert not marker.exists()
