"""Optimisers, learning-rate schedules, and the check that sampled learning rates are applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from trainables.engine.contract import ParamGroup, Phase, TrainingConfig
from trainables.specs.metrics import LR_BACKBONE, LR_HEAD

POLY_POWER = 0.9
"""Exponent of the polynomial schedule (Chen et al., 2018, "DeepLab")."""
HEAD = "head"
"""First word of the name of every group of the head."""


def select_groups(groups: Sequence[ParamGroup], phase: Phase) -> list[ParamGroup]:
    """Parameter groups that a phase trains, in the strategy's order.

    Raises:
        ValueError: the phase names a group that does not exist, nothing is selected, or a parameter is in two groups.
    """
    names = [group.name for group in groups]
    requested = set(names) if phase.groups is None else set(phase.groups)
    if missing := sorted(requested - set(names)):
        raise ValueError(
            f"Phase {phase.name!r} can only move parameter groups that exist ({', '.join(names) or 'none'}), "
            f"but it names {', '.join(map(repr, missing))}."
        )
    chosen = [group for group in groups if group.name in requested and len(group.parameters) > 0]
    if not chosen:
        raise ValueError(
            f"Phase {phase.name!r} must move at least one parameter, but its groups "
            f"({', '.join(sorted(requested)) or 'none'}) hold none. Check the strategy's selection."
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
    """Set `requires_grad` on exactly the parameters of `groups`; clear all gradients."""
    trainable = {id(parameter) for group in groups for parameter in group.parameters}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)
        # Gradients of an earlier phase would keep memory as large as what that phase trained.
        parameter.grad = None


def resolved_rate(group: ParamGroup, parameter: nn.Parameter, feature_scale: float) -> float:
    """Learning rate of a parameter: `lr`, in relative groups divided by mean ‖φ‖².

    Why a quotient: for a linear head the curvature of the cross-entropy is proportional to ‖φ‖², so the largest stable
    step is proportional to 1/‖φ‖², and one range of `lr` then serves backbones of any feature scale. A bias is the
    weight of a feature that is always 1, so its rate is never above `lr`: without that limit, heads on features of
    mean ‖φ‖² well below 1 diverge by their bias at rates at which their weights hardly move (benchmarks/head_rate.py).
    """
    if not group.relative:
        return group.lr
    is_bias = parameter.ndim <= 1
    return group.lr / (max(feature_scale, 1.0) if is_bias else feature_scale)


def build_optimizer(
    groups: Sequence[ParamGroup], config: TrainingConfig, feature_scale: Callable[[], float]
) -> torch.optim.Optimizer:
    """Create the optimiser of `groups`; fused on a GPU.

    Args:
        groups: groups to train, see `select_groups`.
        config: optimizer kind, momentum (β₁ for AdamW), weight decay.
        feature_scale: computes mean ‖φ‖² of the pretrained training features; only called if a group is relative.

    Raises:
        ValueError: a relative group where the mean squared norm is not a positive number.
    """
    scale = feature_scale() if any(group.relative for group in groups) else 1.0
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"A relative head rate needs a positive mean squared norm of the pretrained features, but got {scale!r}. "
            "Use head_rate='absolute' or another backbone."
        )
    # `lr` is overwritten by the schedule at every step; `initial_lr` stays the base rate that it is computed from.
    table = [
        {"params": parameters, "name": group.name, "lr": rate, "initial_lr": rate}
        for group in groups
        for rate, parameters in _by_rate(group, scale).items()
    ]
    fused = all(p.is_cuda and p.is_floating_point() for group in groups for p in group.parameters)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        betas = (config.momentum, 0.999)
        optimizer = torch.optim.AdamW(table, betas=betas, weight_decay=config.weight_decay, fused=fused)
    else:
        optimizer = torch.optim.SGD(table, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused)
    # In every trial: a rate that is not applied makes a search over it meaningless, and nothing else shows it.
    check_rates(optimizer, groups, scale)
    return optimizer


def _by_rate(group: ParamGroup, feature_scale: float) -> dict[float, list[nn.Parameter]]:
    """Parameters of a group by learning rate; one entry unless mean ‖φ‖² is below 1."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    for parameter in group.parameters:
        by_rate.setdefault(resolved_rate(group, parameter, feature_scale), []).append(parameter)
    return by_rate


def check_rates(optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup], feature_scale: float) -> None:
    """Raise RuntimeError unless the optimiser trains each parameter at exactly its sampled rate."""
    actual = {id(p): float(table["initial_lr"]) for table in optimizer.param_groups for p in table["params"]}
    expected = {id(p): resolved_rate(group, p, feature_scale) for group in groups for p in group.parameters}
    if actual.keys() != expected.keys():
        raise RuntimeError(
            f"The optimiser must hold exactly the {len(expected)} parameters that the strategy moves, "
            f"but it holds {len(actual)}."
        )
    for group in groups:
        for parameter in group.parameters:
            sampled = expected[id(parameter)]
            used = actual[id(parameter)]
            if used != sampled:
                raise RuntimeError(
                    f"Group {group.name!r} must train at the sampled rate {sampled!r}, but the optimiser has {used!r}."
                )


def rate_factor(step: int, total: int, config: TrainingConfig) -> float:
    """Factor in [0, 1] on the base rates at a step.

    `step` (0-based) is one of a phase of `total` steps. Linear warm-up from zero over `config.warmup * total` steps
    (the first step is already above zero), then constant, or from 1 towards 0: by a cosine (Loshchilov & Hutter 2017,
    without restarts), or as (1 − step/steps)^0.9 (Chen et al., 2018). A pure function of the step, so that a resumed
    trial needs no scheduler state.
    """
    warm = round(config.warmup * total)
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    progress = (step - warm) / max(1, total - warm)
    if config.schedule == "poly":
        return float((1.0 - progress) ** POLY_POWER)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its base rate times `factor`."""
    for table in optimizer.param_groups:
        table["lr"] = table["initial_lr"] * factor


def current_rates(optimizer: torch.optim.Optimizer | None) -> Mapping[str, float]:
    """Current learning rates `lr/backbone` and `lr/head`; 0 where nothing is trained.

    Group names are the strategy's choice: every group whose first word is not "head" counts as backbone, and the
    largest rate is reported.
    """
    tables = [] if optimizer is None else optimizer.param_groups
    of_head = [float(table["lr"]) for table in tables if table["name"].split()[0] == HEAD]
    others = [float(table["lr"]) for table in tables if table["name"].split()[0] != HEAD]
    return {LR_BACKBONE.name: max(others, default=0.0), LR_HEAD.name: max(of_head, default=0.0)}
