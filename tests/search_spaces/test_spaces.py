"""The search spaces as a whole: registry, default points, define-by-run, and the papers' numbers."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from itertools import pairwise

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FixedTrial

import search_spaces
from search_spaces import Hyperparameter
from trainables.engine.contract import TrainingConfig

BACKBONE_RATE = {"lp_ft": "lr_backbone_relative"}
"""The backbone's rate that is searched, where it is not `lr_backbone`."""
SPLIT = ("daft", "full", "lp_ft")


def test_the_folder_is_the_registry() -> None:
    assert {"daft", "full", "linear_probe", "lp_ft"} <= set(search_spaces.names())
    assert "_hyperparameter" not in search_spaces.names()


def test_unknown_names_are_errors_that_name_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"^A search space belongs to one of .*, but got 'dafd'\. Did you mean 'daft'\?$"
    ):
        search_spaces.space("dafd")
    with pytest.raises(ValueError, match=r"^full has no preset 'papr'\. Did you mean 'paper'\? It has: paper\.$"):
        search_spaces.preset("full", "papr")


def test_search_spaces_import_optuna_and_nothing_heavy() -> None:
    code = (
        "import sys, search_spaces as s; [s.space(n) for n in s.names()];"
        "print([m for m in ('torch', 'ray', 'trainables', 'orchestrator') if m in sys.modules])"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "[]"


@pytest.mark.parametrize("name", search_spaces.names())
def test_default_point_can_be_suggested_and_every_range_names_its_source(name: str) -> None:
    default = search_spaces.default_point(name)
    assert search_spaces.suggest(FixedTrial(default), name) == default
    assert all(hyperparameter.source for hyperparameter in search_spaces.space(name).values())
    assert all(preset.source for preset in search_spaces.presets(name).values())
    assert search_spaces.near_edge(name, default) == []


@pytest.mark.parametrize("name", SPLIT)
def test_backbone_and_head_have_rates_of_their_own_that_training_accepts(name: str) -> None:
    assert search_spaces.searched(name) == [BACKBONE_RATE.get(name, "lr_backbone"), "lr_head"]
    names = {field.name for field in dataclasses.fields(TrainingConfig)}
    for preset in search_spaces.presets(name).values():
        assert set(preset.fixed) | preset.swept <= names
        for step in range(len(preset.steps)):
            for point in preset.points(step):
                TrainingConfig(**{**preset.fixed, **point})


@pytest.mark.parametrize("name", SPLIT)
def test_the_range_of_the_backbone_rate_covers_nearly_all_of_the_papers_sweep(name: str) -> None:
    if name in BACKBONE_RATE:
        pytest.skip("its range is in another unit than the paper's rates")
    searched = search_spaces.space(name)["lr_backbone"].distribution
    assert isinstance(searched, FloatDistribution)
    assert searched.log
    swept = search_spaces.preset(name, "paper").steps[0]["lr_backbone"]
    inside = [v for v in swept if searched.low <= v <= searched.high]
    assert len(inside) >= len(swept) - 1


def test_the_papers_sweeps_have_the_papers_values() -> None:
    full = search_spaces.preset("full", "paper")
    assert full.fixed == {"lr_head": None}
    assert full.steps == ({"lr_backbone": (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)},)
    assert search_spaces.preset("lp_ft", "paper").steps[0]["lr_backbone"] == (1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7)
    swav = search_spaces.preset("lp_ft", "paper_swav").steps[0]["lr_backbone"]
    assert (swav[0], swav[-1], len(swav)) == (1e-2, 3e-6, 8)
    daft = search_spaces.preset("daft", "paper")
    assert daft.fixed == {"head_rate": "absolute", "lr_head": 1.0}
    assert daft.steps[0]["lr_backbone"] == (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6)
    assert daft.steps[1] == {"lr_head": (10.0, 3.0, 0.3, 0.1)}
    grid = search_spaces.preset("linear_probe", "grid").steps[0]["C"]
    assert (len(grid), grid[0], grid[-1]) == (100, 1e-7, 100.0)
    ratios = {round(b / a, 9) for a, b in pairwise(grid)}
    assert ratios == {round(10 ** (9 / 99), 9)}


def test_suggest_asks_for_what_is_not_fixed_under_the_prefix() -> None:
    trial = FixedTrial({"mine.lr_backbone": 0.01})
    assert search_spaces.suggest(trial, "full", "mine", {"lr_head": None, "bn_conversion": True}) == {
        "lr_head": None,
        "bn_conversion": True,
        "lr_backbone": 0.01,
    }
    assert set(trial.distributions) == {"mine.lr_backbone"}
    assert search_spaces.searched("full", {"lr_head": None}) == ["lr_backbone"]
    assert search_spaces.searched("linear_probe") == []


def test_a_conditional_hyperparameter_exists_only_beside_its_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("search_spaces.full")
    conditional = Hyperparameter(0.5, FloatDistribution(0.0, 1.0), when=lambda h: h.get("clip_norm") is not None)
    monkeypatch.setattr(module, "SPACE", {**module.SPACE, "momentum": conditional})
    assert "momentum" not in search_spaces.default_point("full")
    assert search_spaces.default_point("full", {"clip_norm": 1.0})["momentum"] == 0.5
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert "momentum" not in search_spaces.suggest(study.ask(), "full")
    assert 0 <= search_spaces.suggest(study.ask(), "full", fixed={"clip_norm": 1.0})["momentum"] <= 1


def test_near_edge_states_which_value_and_which_side() -> None:
    assert search_spaces.near_edge("full", {"lr_backbone": 0.29, "lr_head": None}) == [
        "lr_backbone = 0.29 lies at the upper edge of its range 0.0001 to 0.3: a better value may lie outside."
    ]
    assert search_spaces.near_edge("full", {"lr_backbone": 0.29}, fixed=["lr_backbone"]) == []
    assert search_spaces.near_edge("full", {"momentum": 0.9}) == []


def test_near_edge_of_a_preset_looks_at_its_grid() -> None:
    best = {"head_rate": "absolute", "lr_head": 0.1, "lr_backbone": 0.03}
    assert search_spaces.near_edge("daft", best, preset="paper") == [
        "lr_head = 0.1 lies at the lower edge of the preset 'paper': a better value may lie outside."
    ]
    assert search_spaces.near_edge("daft", {**best, "lr_head": 1.0}, preset="paper") == []
