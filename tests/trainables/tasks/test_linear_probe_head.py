"""How a head starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainables.models.task_model import TaskModel
from trainables.tasks import classification
from trainables.tasks.base import TargetSpec
from trainables.tasks.linear_probe_head import Probe


@pytest.fixture
def model() -> TaskModel:
    return TaskModel(nn.Identity(), nn.Linear(4, 3))


TASK = classification.Classification(TargetSpec(("a", "b", "c")))


@pytest.fixture
def data() -> Any:
    return Path  # nothing of it is looked at


def test_random_leaves_what_was_drawn(model: TaskModel, data: Any) -> None:
    before = model.head.weight.clone()
    assert TASK.initialise_head(model, data, "random") == {}
    assert torch.equal(model.head.weight, before)


def test_zeros(model: TaskModel, data: Any) -> None:
    assert TASK.initialise_head(model, data, "zeros") == {}
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    assert model.head.weight.requires_grad


def test_the_linear_probes_solution(model: TaskModel, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    bias = torch.arange(3.0)
    probe = Probe(weight.numpy(), bias.numpy(), C=0.25, validation=0.5)
    rules = []

    def solved(given: Any, path: object, rule: str) -> Probe:
        assert given is data
        rules.append(rule)
        return probe

    monkeypatch.setattr(classification, "best_linear_probe", solved)
    assert TASK.initialise_head(model, data, "linear_probe", "nll") == {
        "linear_probe/C": 0.25, "linear_probe/val_acc": 0.5,
    }  # fmt: skip
    assert rules == ["nll"]
    assert torch.equal(model.head.weight, weight)
    assert torch.equal(model.head.bias, bias)
    assert model.head.weight.requires_grad
