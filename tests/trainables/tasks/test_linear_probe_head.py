"""How a head starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainables.tasks.linear_probe_head
from trainables.models.backbone import Classifier
from trainables.tasks.linear_probe_head import Probe, initialise_head


@pytest.fixture
def model() -> Classifier:
    return Classifier(nn.Identity(), nn.Linear(4, 3))


@pytest.fixture
def data() -> Any:
    return Path  # nothing of it is looked at


def test_random_leaves_what_was_drawn(model: Classifier, data: Any) -> None:
    before = model.head.weight.clone()
    assert initialise_head(model, data, "random") == {}
    assert torch.equal(model.head.weight, before)


def test_zeros(model: Classifier, data: Any) -> None:
    assert initialise_head(model, data, "zeros") == {}
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    assert model.head.weight.requires_grad


def test_the_linear_probes_solution(model: Classifier, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = torch.arange(12.0).reshape(3, 4), torch.arange(3.0)
    probe = Probe(weight.numpy(), bias.numpy(), C=0.25, val_accuracy=0.5)
    monkeypatch.setattr(
        trainables.tasks.linear_probe_head, "best_linear_probe", lambda given: probe if given is data else None
    )
    assert initialise_head(model, data, "linear_probe") == {"linear_probe/C": 0.25, "linear_probe/val_acc": 0.5}
    assert torch.equal(model.head.weight, weight)
    assert torch.equal(model.head.bias, bias)
    assert model.head.weight.requires_grad
