"""A search over accuracy and costs: what Optuna is given, where the proposals go, and which trials do not count."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from orchestrator.search.searcher import Entry, StudySearcher
from tests.support.driving import Config, accuracy, complete, drive, finished, optuna_trials, searcher, url

COSTS = ("val/acc", "device_seconds")


def outcome(config: Config) -> dict[str, Any]:
    """Accuracy peaks at a rate of 1e-3, seconds rise with the rate: every rate above the peak is beaten by the peak."""
    return {**finished(config), "cost/total_seconds": 1000 * config["hparams"].get("lr_backbone", 0.0)}


def test_optuna_has_one_direction_and_one_value_per_objective(tmp_path: Path) -> None:
    proposed = drive(searcher(tmp_path, ("full", "daft"), objectives=COSTS, trials=14), outcome, concurrent=3)
    study = optuna.load_study(study_name="s", storage=url(tmp_path))
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    trials = optuna_trials(tmp_path)
    expected = [[accuracy(c), 1000 * c["hparams"]["lr_backbone"]] for c in proposed]
    assert [t.values for t in trials] == [pytest.approx(values) for values in expected]
    assert not any(t.intermediate_values for t in trials)


def test_proposals_move_to_the_known_front(tmp_path: Path) -> None:
    """Of the rates of full tuning, 1e-4 to 0.3 on a logarithmic scale, 29 % lie on the front."""
    entries = [Entry("", "full", {"lr_head": 0.5})]
    search = searcher(tmp_path, entries=entries, objectives=COSTS, trials=30, seed=1)
    rates = [config["hparams"]["lr_backbone"] for config in drive(search, outcome)]
    late = rates[12:]
    assert sum(rate <= 1.1e-3 for rate in late) >= 0.6 * len(late)
    assert min(late) < 3e-4, "the cheap end"
    assert any(5e-4 < rate <= 1.1e-3 for rate in late), "the accurate end"


def test_a_direction_that_is_minimised_comes_first_too(tmp_path: Path) -> None:
    drive(searcher(tmp_path, ("full",), objectives=("val/nll", "peak_memory"), trials=3), lambda c: {
        **finished(c), "best/val/nll": 1 - accuracy(c), "cost/peak_host_bytes": 1e9, "cost/peak_gpu_bytes": 4e9,
    })  # fmt: skip
    study = optuna.load_study(study_name="s", storage=url(tmp_path))
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    assert [t.values[1] for t in optuna_trials(tmp_path)] == [4e9] * 3  # of the GPU, where there is one


@pytest.mark.parametrize("cost", [None, math.nan, math.inf])
def test_a_trial_without_one_of_its_objectives_is_no_result(tmp_path: Path, cost: float | None) -> None:
    search = searcher(tmp_path, ("full",), objectives=COSTS, trials=3)
    config = search.suggest("a")
    assert isinstance(config, dict)
    recorded = {} if cost is None else {"cost/total_seconds": cost}
    complete(search, "a", config, lambda c: {**finished(c), **recorded})
    (trial,) = optuna_trials(tmp_path)
    assert (trial.state, trial.values) == (TrialState.FAIL, None)


def test_more_objectives_than_before_are_another_study(tmp_path: Path) -> None:
    drive(searcher(tmp_path, ("full",), trials=3))
    with pytest.raises(ValueError, match=r"has the directions maximize, but this study needs maximize, minimize\."):
        searcher(tmp_path, ("full",), objectives=COSTS, trials=3)


def test_an_unfinished_trial_has_no_front_values(tmp_path: Path) -> None:
    """A trial that was stopped early is no cheap one: its costs are those of a part of its budget."""
    search: StudySearcher = searcher(tmp_path, ("full",), objectives=COSTS, trials=3)
    config = search.suggest("a")
    assert isinstance(config, dict)
    search.on_trial_complete("a", {"val/acc": 0.5, "unit": 1, "cost/total_seconds": 1.0})
    (trial,) = optuna_trials(tmp_path)
    assert (trial.state, trial.values) == (TrialState.PRUNED, None)
