"""LP-FT: it starts where the linear probe ended, with frozen BatchNorm statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import search_spaces
from tests.conformance import StrategyConformance
from tests.support.trials import MakeTrial, finish
from trainables.engine.optim import build_optimizer
from trainables.engine.trial import Trial
from trainables.lp_ft import LpFt, head_curvature
from trainables.models.task_model import TaskModel
from trainables.tasks.linear_probe_head import fit_linear_probe


class TestConformance(StrategyConformance):
    strategy = "lp_ft"
    reports = frozenset(["linear_probe/*"])


@pytest.fixture
def trial(make_trial: MakeTrial) -> MakeTrial:
    return make_trial


@torch.no_grad()
def loss(run: Trial, split: str) -> float:
    """Mean cross-entropy in eval mode."""
    images, labels = next(run.data.batches(split, batch_size=64))
    return float(cross_entropy(run.model.eval()(images), labels))


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_its_first_loss_is_that_of_the_linear_probe(trial: Callable[..., Trial], kind: str) -> None:
    probe = trial("linear_probe", kind)
    metrics = probe.step()
    for conversion in (False, True):
        run = trial("lp_ft", kind, bn_conversion=conversion)
        assert loss(run, "train") == pytest.approx(metrics["train/loss"], rel=1e-4)
        assert loss(run, "val") == pytest.approx(metrics["val/nll"], rel=1e-4)
        assert finish(run)["linear_probe/C"] == metrics["linear_probe/C"]


def test_the_first_training_step_sees_the_loss_of_the_probe(trial: Callable[..., Trial]) -> None:
    metrics = trial("linear_probe", "cnn").step()
    still = trial("lp_ft", "cnn", lr_backbone=1e-12)
    assert still.step()["train/loss"] == pytest.approx(metrics["train/loss"], rel=1e-4)


def test_batch_norm_keeps_its_statistics(trial: Callable[..., Trial]) -> None:
    run = trial("lp_ft", "cnn", lr_backbone=0.01)
    finish(run)
    pristine = run.data.backbone.module.state_dict()
    for name, value in run.model.backbone.state_dict().items():
        if "running_" in name:
            assert torch.equal(value, pristine[name])
    assert not torch.equal(run.model.backbone.state_dict()["bn1.weight"], pristine["bn1.weight"])


def test_with_bn_conversion_the_statistics_are_those_of_the_target(trial: Callable[..., Trial]) -> None:
    run = trial("lp_ft", "cnn", bn_conversion=True)
    pristine = run.data.backbone.module.state_dict()
    assert not torch.equal(run.model.backbone.state_dict()["bn1.running_mean"], pristine["bn1.running_mean"])
    assert finish(run)["bn_conversion/layers"] > 0


def test_one_absolute_rate_moves_backbone_and_head(trial: Callable[..., Trial]) -> None:
    run = trial("lp_ft", "vit", lr_backbone=1e-5)
    groups = {group.name: (group.lr, group.relative) for group in run.param_groups()}
    assert groups == {"backbone": (1e-5, False), "head": (1e-5, False)}


def test_a_relative_rate_is_divided_by_the_curvature_of_the_solved_head(trial: Callable[..., Trial]) -> None:
    run = trial("lp_ft", "vit", lr_backbone_relative=0.3, lr_head=0.1)
    groups = {group.name: (group.lr, group.relative) for group in run.param_groups()}
    features = torch.tensor(run.data.features("train"), dtype=torch.float64)
    head = run.model.head.double()
    weight, bias = (p.detach().numpy() for p in head.parameters())

    def loss_of(phi: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(head(phi), 0)  # the label adds no curvature

    traces = [float(torch.autograd.functional.hessian(loss_of, phi).trace()) for phi in features[:8]]
    spread = float((features[:8] - features[:8].mean(0)).square().sum(1).mean())
    assert head_curvature(features[:8].numpy(), weight, bias) == pytest.approx(spread * sum(traces) / 8, rel=1e-6)
    curvature = head_curvature(features.numpy(), weight, bias)
    assert groups == {"backbone": (pytest.approx(0.3 / curvature), False), "head": (0.1, True)}


class Scaled(nn.Module):
    """A backbone whose features are multiplied by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.maps = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.factor * self.maps(images)


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_the_trajectory_does_not_depend_on_the_scale_of_the_features(factor: float) -> None:
    """From the solved head, at equal relative rates, the logits of every step are the same.

    The head's bias, whose rate is not in the features' unit, is left out.
    """

    def trajectory(factor: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(60, 12, generator=generator, dtype=torch.float64)
        labels = torch.arange(60) % 3
        torch.manual_seed(0)
        model = TaskModel(Scaled(factor).double(), nn.Linear(8, 3).double())
        with torch.no_grad():
            features = model.backbone(images).numpy()
        scale = features.std()
        rows, offsets = fit_linear_probe((features - features.mean()) / scale, labels.numpy(), 1.0)
        weight, bias = rows / scale, offsets - rows.sum(1) * features.mean() / scale
        with torch.no_grad():
            model.head.weight.copy_(torch.tensor(weight))
            model.head.bias.copy_(torch.tensor(bias))
        strategy = LpFt.from_hparams({"lr_backbone_relative": 0.3, "lr_head": 0.1})
        groups = strategy.param_groups(model, head_curvature(features, weight, bias))
        model.head.bias.requires_grad_(False)
        groups = [dataclasses.replace(g, parameters=[p for p in g.parameters if p.requires_grad]) for g in groups]
        optimizer = build_optimizer(groups, strategy.config, lambda: float(np.square(features).sum(1).mean()))
        logits = []
        for _ in range(20):
            outputs = model(images)
            logits.append(outputs.detach())
            optimizer.zero_grad()
            cross_entropy(outputs, labels).backward()
            optimizer.step()
        return torch.stack(logits)

    plain = trajectory(1.0)
    assert (plain[-1] - plain[0]).abs().max() > 0.1
    torch.testing.assert_close(trajectory(factor), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"lr_backbone_relative": 0.0}, "lr_backbone_relative must be positive, but got 0.0."),
        (
            {"lr_backbone_relative": 0.1, "head_init": "zeros"},
            "lr_backbone_relative is relative to a solved head, but head_init is 'zeros'. Use lr_backbone.",
        ),
    ],
)
def test_bad_rates(hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        LpFt.from_hparams(hparams)
    assert str(error.value) == message


def test_the_search_is_over_the_relative_rate_unless_an_absolute_one_is_given() -> None:
    assert search_spaces.searched("lp_ft") == ["lr_backbone_relative", "lr_head"]
    assert search_spaces.searched("lp_ft", {"lr_backbone": 1e-3}) == ["lr_head"]
    assert search_spaces.searched("lp_ft", {"head_init": "random"}) == ["lr_backbone", "lr_head"]


def test_published_sweeps_start_from_the_most_accurate_probe() -> None:
    for name in ("paper", "paper_swav"):
        preset = search_spaces.preset("lp_ft", name)
        assert LpFt.from_hparams(dict(preset.fixed)).config.probe_rule == "argmax"
    assert search_spaces.preset("linear_probe", "paper").fixed == {"rule": "argmax"}
