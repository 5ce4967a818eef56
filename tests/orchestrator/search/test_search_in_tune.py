"""The searcher and the scheduler inside a real `tune.Tuner`, with a trainable that computes nothing."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray import tune

from orchestrator.results.selection import top_candidates
from orchestrator.search.asha import StudyScheduler
from orchestrator.search.searcher import StudySearcher
from orchestrator.search.stages import ConfirmStage, Entry
from tests.support.clusters import plain_cluster
from tests.support.driving import EPOCHS, accuracy, optuna_trials, searcher, task

pytestmark = pytest.mark.ray


class Sketch(tune.Trainable):  # type: ignore[misc]
    """Reports the made-up objective, rising with the units; some labels misbehave."""

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.spec = new_config
        self.unit = 0
        return True

    def step(self) -> dict[str, Any]:
        self.unit += 1
        label = self.spec["label"]
        if label == "daft" and self.spec["_number"] % 2 and self.spec["role"] == "search":
            raise FloatingPointError("diverged")
        value = accuracy(self.spec) * (0.5 + 0.5 * self.unit / EPOCHS)
        if label == "lp_ft" and self.unit == 2:
            value = math.nan
        end = label == "linear_probe" or self.unit >= EPOCHS or math.isnan(value)
        return {
            "unit": self.unit,
            "val/acc": value,
            "best/val/acc": value,
            "finished": end,
            "done": end,
            "pid_": os.getpid(),
        }


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with plain_cluster(cpus=2):
        yield


def run(search: StudySearcher, folder: Path, scheduler: Any = None) -> Any:
    tuner = tune.Tuner(
        tune.with_resources(Sketch, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=search, scheduler=scheduler, num_samples=-1, max_concurrent_trials=2, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(folder),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    return tuner.fit()


@pytest.mark.usefixtures("local_ray")
def test_a_study_in_one_tuner(tmp_path: Path) -> None:
    stage = ConfirmStage(task(), lambda records: top_candidates(records, 2, "id_val"), seeds=2, seed=3)
    search = searcher(tmp_path, trials=18, stages=[stage])
    results = run(search, tmp_path, StudyScheduler("val/acc", True, EPOCHS, grace=1, reduction=3))
    assert len(results) == 18 + 4
    trials = optuna_trials(tmp_path) + optuna_trials(tmp_path, "s/given")
    assert {t.state for t in trials} == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    by_label: dict[str, Counter[str]] = {}
    for trial in trials:
        spec = trial.user_attrs["trial"]
        by_label.setdefault(trial.user_attrs["label"] if spec["role"] == "search" else "confirm", Counter())[
            trial.state.name
        ] += 1
    assert by_label["linear_probe"] == {"COMPLETE": 1}
    assert set(by_label["lp_ft"]) <= {"FAIL", "PRUNED"}
    assert by_label["confirm"] == {"COMPLETE": 4}  # the scheduler leaves them alone
    assert by_label["full"]["PRUNED"] > 0
    assert by_label["full"]["COMPLETE"] > 0
    assert "FAIL" not in by_label["full"]
    for trial in trials:
        if trial.state == TrialState.PRUNED:
            assert max(trial.intermediate_values) in (1, 3)  # the rungs
            assert trial.value == trial.intermediate_values[max(trial.intermediate_values)]
    ended = [r.metrics for r in results if r.metrics]
    failed = Counter(t.state.name for t in trials)["FAIL"]
    assert len({m["pid_"] for m in ended if "pid_" in m}) <= 2 + failed  # reused, except after an error
    assert search.ledger.running == []


@pytest.mark.usefixtures("local_ray")
def test_a_sequential_sweep_waits_and_ends(tmp_path: Path) -> None:
    search = searcher(tmp_path, ("full", "linear_probe"), sampler="paper", trials=9)
    results = run(search, tmp_path)
    assert len(results) == 9
    assert {t.state for t in optuna_trials(tmp_path)} == {TrialState.COMPLETE}
    assert {r.metrics["pid_"] for r in results} <= {r.metrics["pid_"] for r in list(results)[:2]}


@pytest.mark.usefixtures("local_ray")
def test_when_all_trials_of_step_one_fail_the_run_ends(tmp_path: Path) -> None:
    search = searcher(tmp_path, entries=[Entry("lp_ft", "daft")], sampler="paper", trials=14)
    results = run(search, tmp_path)
    assert len(results) == 10  # step two has no point to start from
    assert {t.state for t in optuna_trials(tmp_path)} == {TrialState.FAIL}
