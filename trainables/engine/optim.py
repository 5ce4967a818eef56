"""Optimisers, schedules and the check that the sampled learning rates are really used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from trainables.engine.contract import ParamGroup, Phase, TrainingConfig
from trainables.specs.metrics import LR_BACKBONE, LR_HEAD


def select_groups(groups: Sequence[ParamGroup], phase: Phase) -> list[ParamGroup]:
    """The groups that one phase moves, in the strategy's order.

    Raises:
        ValueError: the phase names a group that does not exist, nothing is selected, or a parameter is in two groups.
    """
    names = [group.name for group in groups]
    wanted = set(names) if phase.groups is None else set(phase.groups)
    if missing := sorted(wanted - set(names)):
        raise ValueError(
            f"Phase {phase.name!r} can only move parameter groups that exist ({', '.join(names) or 'none'}), "
            f"but it names {', '.join(map(repr, missing))}."
        )
    chosen = [group for group in groups if group.name in wanted and len(group.parameters) > 0]
    if not chosen:
        raise ValueError(
            f"Phase {phase.name!r} must move at least one parameter, but its groups "
            f"({', '.join(sorted(wanted)) or 'none'}) hold none. Check the strategy's selection."
        )
    owner: dict[int, str] = {}
    for group in chosen:
        for parameter in group.parameters:
            if id(parameter) in owner:
                raise ValueError(
                    f"A parameter belongs to one group, but {owner[id(parameter)]!r} and {group.name!r} share one of "
                    f"shape {tuple(parameter.shape)}. Make the groups disjoint."
                )
            owner[id(parameter)] = group.name
    return chosen


def freeze_all_but(model: nn.Module, groups: Sequence[ParamGroup]) -> None:
    """Set `requires_grad` on exactly the parameters of `groups`, and drop gradients of all others."""
    moving = {id(parameter) for group in groups for parameter in group.parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in moving)
        parameter.grad = None


def resolved_rate(group: ParamGroup, parameter: nn.Parameter, feature_scale: float) -> float:
    """The rate that the optimiser gets: `lr`, or for a weight of a relative group `lr / mean ‖φ‖²`.

    Why a quotient: for a linear head the curvature of the cross-entropy is proportional to ‖φ‖², so the largest stable
    step is proportional to 1/‖φ‖², and one range of `lr` then serves backbones of any feature scale. A bias is the
    weight of a feature that is always 1, so its rate is never above `lr`: without that limit, heads on features of
    mean ‖φ‖² well below 1 diverge by their bias at rates at which their weights hardly move (benchmarks/head_rate.py).
    """
    if not group.relative:
        return group.lr
    return group.lr / (feature_scale if parameter.ndim > 1 else max(feature_scale, 1.0))


def build_optimizer(
    groups: Sequence[ParamGroup], config: TrainingConfig, feature_scale: Callable[[], float]
) -> torch.optim.Optimizer:
    """An optimiser over `groups`; fused on a GPU.

    Args:
        groups: what moves, see `select_groups`.
        config: optimizer kind, momentum (β₁ for AdamW), weight decay.
        feature_scale: gives mean ‖φ‖² of the pretrained training features; only called if a group is relative.

    Raises:
        ValueError: a relative group where the mean squared norm is not a positive number.
    """
    scale = feature_scale() if any(group.relative for group in groups) else 1.0
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"A relative head rate needs a positive mean squared norm of the pretrained features, but got {scale!r}. "
            "Use head_rate='absolute' or another backbone."
        )
    table = [
        {"params": found, "name": group.name, "lr": rate, "initial_lr": rate}
        for group in groups
        for rate, found in _by_rate(group, scale).items()
    ]
    fused = all(p.is_cuda and p.is_floating_point() for group in groups for p in group.parameters)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        betas = (config.momentum, 0.999)
        optimizer = torch.optim.AdamW(table, betas=betas, weight_decay=config.weight_decay, fused=fused)
    else:
        optimizer = torch.optim.SGD(table, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused)
    check_rates(optimizer, groups, scale)
    return optimizer


def _by_rate(group: ParamGroup, feature_scale: float) -> dict[float, list[nn.Parameter]]:
    """Parameters of a group by the rate that they get; one entry unless the features are small."""
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in group.parameters:
        found.setdefault(resolved_rate(group, parameter, feature_scale), []).append(parameter)
    return found


def check_rates(optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup], feature_scale: float) -> None:
    """Raise RuntimeError unless every group's parameters sit in the optimiser at exactly the sampled rate."""
    actual = {id(p): float(table["initial_lr"]) for table in optimizer.param_groups for p in table["params"]}
    expected = {id(p): resolved_rate(group, p, feature_scale) for group in groups for p in group.parameters}
    if actual.keys() != expected.keys():
        raise RuntimeError(
            f"The optimiser must hold exactly the {len(expected)} parameters that the strategy moves, "
            f"but it holds {len(actual)}."
        )
    for group in groups:
        for parameter in group.parameters:
            rate, wrong = expected[id(parameter)], actual[id(parameter)]
            if wrong != rate:
                raise RuntimeError(
                    f"Group {group.name!r} must train at the sampled rate {rate!r}, but the optimiser has {wrong!r}."
                )


def rate_factor(step: int, total: int, config: TrainingConfig) -> float:
    """What the base rates are multiplied by at `step` (0-based) of a phase of `total` steps: in [0, 1].

    Linear warm-up from zero over `config.warmup * total` steps (the first step is already above zero), then constant,
    or cosine from 1 towards 0 (Loshchilov & Hutter 2017, without restarts). A pure function of the step, so that a
    resumed trial needs no scheduler state.
    """
    warm = round(config.warmup * total)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its base rate times `factor`."""
    for table in optimizer.param_groups:
        table["lr"] = table["initial_lr"] * factor


def current_rates(optimizer: torch.optim.Optimizer | None) -> Mapping[str, float]:
    """`lr/backbone` and `lr/head` as they stand in the optimiser; 0 where nothing moves.

    A strategy may name its groups as it likes: every group but "head" counts as backbone, the largest rate is shown.
    """
    tables = [] if optimizer is None else optimizer.param_groups
    return {
        LR_BACKBONE.name: max((float(t["lr"]) for t in tables if t["name"] != "head"), default=0.0),
        LR_HEAD.name: max((float(t["lr"]) for t in tables if t["name"] == "head"), default=0.0),
    }
