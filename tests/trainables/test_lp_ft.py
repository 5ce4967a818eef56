"""LP-FT: it starts where the linear probe ended, with frozen BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.conformance import StrategyConformance
from tests.support.trials import MakeTrial, finish
from trainables.engine.trial import Trial


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
