"""Optimiser construction, schedules, and the check of the sampled rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trainables.engine.contract import ParamGroup, Phase, TrainingConfig
from trainables.engine.optim import (
    build_optimizer,
    check_rates,
    current_rates,
    freeze_all_but,
    rate_factor,
    select_groups,
    set_rates,
)


def two_layers() -> tuple[nn.Sequential, list[ParamGroup]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [
        ParamGroup("backbone", list(model[0].parameters()), 0.01),
        ParamGroup("head", list(model[1].parameters()), 2.0, relative=True),
    ]
    return model, groups


def test_a_relative_rate_is_divided_by_the_mean_squared_norm_and_others_are_not() -> None:
    _, groups = two_layers()
    optimizer = build_optimizer(groups, TrainingConfig(), lambda: 8.0)
    assert {t["name"]: t["lr"] for t in optimizer.param_groups} == {"backbone": 0.01, "head": 0.25}


def test_the_bias_of_a_relative_group_never_trains_above_the_sampled_rate() -> None:
    model, groups = two_layers()
    optimizer = build_optimizer(groups, TrainingConfig(), lambda: 0.5)
    rates = {id(p): t["lr"] for t in optimizer.param_groups for p in t["params"]}
    assert (rates[id(model[1].weight)], rates[id(model[1].bias)]) == (4.0, 2.0)
    assert current_rates(optimizer) == {"lr/backbone": 0.01, "lr/head": 4.0}


def test_the_norm_is_not_asked_for_when_no_group_is_relative() -> None:
    _, groups = two_layers()
    optimizer = build_optimizer(groups[:1], TrainingConfig(), lambda: pytest.fail("features were computed"))
    assert current_rates(optimizer) == {"lr/backbone": 0.01, "lr/head": 0.0}


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_norm_is_an_error(scale: float) -> None:
    _, groups = two_layers()
    with pytest.raises(ValueError) as error:
        build_optimizer(groups, TrainingConfig(), lambda: scale)
    assert str(error.value) == (
        f"A relative head rate needs a positive mean squared norm of the pretrained features, but got {scale!r}. "
        "Use head_rate='absolute' or another backbone."
    )


def test_a_rate_that_is_not_the_sampled_one_is_found() -> None:
    _, groups = two_layers()
    optimizer = build_optimizer(groups, TrainingConfig(), lambda: 4.0)
    optimizer.param_groups[1]["initial_lr"] = 0.7
    with pytest.raises(RuntimeError) as error:
        check_rates(optimizer, groups, 4.0)
    assert str(error.value) == "Group 'head' must train at the sampled rate 0.5, but the optimiser has 0.7."


def test_a_parameter_that_is_missing_from_the_optimiser_is_found() -> None:
    _, groups = two_layers()
    optimizer = build_optimizer(groups[:1], TrainingConfig(), lambda: 1.0)
    with pytest.raises(RuntimeError) as error:
        check_rates(optimizer, groups, 1.0)
    assert str(error.value) == (
        "The optimiser must hold exactly the 4 parameters that the strategy moves, but it holds 2."
    )


def test_a_phase_moves_only_its_groups() -> None:
    model, groups = two_layers()
    model[0].weight.grad = torch.ones(4, 3)
    chosen = select_groups(groups, Phase("head", 1, groups=frozenset({"head"})))
    freeze_all_but(model, chosen)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert model[0].weight.grad is None


def test_an_unknown_group_is_an_error() -> None:
    _, groups = two_layers()
    with pytest.raises(ValueError) as error:
        select_groups(groups, Phase("norms", 1, groups=frozenset({"norms"})))
    assert str(error.value) == (
        "Phase 'norms' can only move parameter groups that exist (backbone, head), but it names 'norms'."
    )


def test_a_selection_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError) as error:
        select_groups([ParamGroup("norms", [], 0.1)], Phase("train", 1))
    assert str(error.value) == (
        "Phase 'train' must move at least one parameter, but its groups (norms) hold none. "
        "Check the strategy's selection."
    )


def test_a_parameter_in_two_groups_is_an_error() -> None:
    model, groups = two_layers()
    groups.append(ParamGroup("bias", [model[1].bias], 0.1))
    with pytest.raises(ValueError) as error:
        select_groups(groups, Phase("train", 1))
    assert str(error.value) == (
        "A parameter belongs to one group, but 'head' and 'bias' share one of shape (2,). Make the groups disjoint."
    )


def test_cosine_with_warm_up_against_closed_form() -> None:
    config = TrainingConfig(warmup=0.2)
    factors = [rate_factor(step, 10, config) for step in range(10)]
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert factors == pytest.approx(expected)
    assert rate_factor(0, 10, TrainingConfig()) == 1.0


def test_constant_stays_at_one_after_warm_up() -> None:
    config = TrainingConfig(schedule="constant", warmup=0.5)
    assert [rate_factor(step, 4, config) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_cosine_agrees_with_torch() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    for step in range(7):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * rate_factor(step, 7, TrainingConfig()))
        optimizer.step()
        scheduler.step()


def test_every_group_follows_the_schedule() -> None:
    _, groups = two_layers()
    optimizer = build_optimizer(groups, TrainingConfig(), lambda: 1.0)
    set_rates(optimizer, 0.5)
    assert current_rates(optimizer) == {"lr/backbone": 0.005, "lr/head": 1.0}


def test_adamw_takes_momentum_as_its_first_beta() -> None:
    _, groups = two_layers()
    optimizer = build_optimizer(groups, TrainingConfig(optimizer="adamw", momentum=0.8, weight_decay=0.1), lambda: 1.0)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(t["betas"], t["weight_decay"]) for t in optimizer.param_groups] == [((0.8, 0.999), 0.1)] * 2
