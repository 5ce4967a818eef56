"""Full fine-tuning: the recipe of Ha et al. (2024), Table 1, and its ablation with BatchNorm conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import pytest
import torch

from tests.conformance import StrategyConformance
from tests.support.trials import MakeTrial
from trainables.engine.trial import Trial


class TestConformance(StrategyConformance):
    strategy = "full"
    learning: ClassVar[Mapping[str, Any]] = {"lr_backbone": 0.02, "lr_head": 1.0}


@pytest.fixture
def trial(make_trial: MakeTrial) -> Callable[..., Trial]:
    return partial(make_trial, "full", "cnn", task={"epochs": 1})


def test_one_rate_moves_backbone_and_head_unless_the_head_has_its_own(trial: Callable[..., Trial]) -> None:
    for hparams, head in (
        ({"lr_backbone": 0.01}, (0.01, False)),
        ({"lr_backbone": 0.01, "lr_head": 2.0}, (2.0, True)),
        ({"lr_backbone": 0.01, "lr_head": 2.0, "head_rate": "absolute"}, (2.0, False)),
    ):
        run = trial(**hparams)
        groups = {group.name: (group.lr, group.relative) for group in run.param_groups()}
        assert groups == {"backbone": (0.01, False), "head": head}


def test_the_head_is_drawn_and_batch_norm_follows_the_data_while_training(trial: Callable[..., Trial]) -> None:
    run = trial()
    assert run.model.head.weight.abs().max() > 0
    before = run.model.backbone.state_dict()["bn1.running_mean"].clone()
    metrics = run.step()
    assert not torch.equal(run.model.backbone.state_dict()["bn1.running_mean"], before)
    assert not any(name.startswith("bn_conversion/") for name in metrics)


def test_with_bn_conversion_it_starts_from_converted_layers(trial: Callable[..., Trial]) -> None:
    run = trial(bn_conversion=True)
    pristine = run.data.backbone.module.state_dict()
    state = run.model.backbone.state_dict()
    assert not torch.equal(state["bn1.running_mean"], pristine["bn1.running_mean"])
    assert not torch.equal(state["bn1.weight"], pristine["bn1.weight"])
    assert run.model.head.weight.abs().max() > 0
    assert run.step()["bn_conversion/layers"] > 0


def test_the_other_heads_are_reachable_by_config(trial: Callable[..., Trial]) -> None:
    assert not trial(head_init="zeros").model.head.weight.any()
    assert "linear_probe/C" in trial(head_init="linear_probe").step()
