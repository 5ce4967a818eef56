"""docs/full_fine_tuning.md: the page's plain PyTorch computes what a trial computes, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.pages import code_blocks
from tests.support.trials import MakeTrial, finish, same_tensors


def split(data: Any, name: str) -> tuple[Tensor, Tensor]:
    """All images of a split, as the network takes them, and their labels, in the order of the store."""
    images, labels = zip(*data.batches(name), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_the_forty_lines_equal_the_engine(make_trial: MakeTrial, kind: str) -> None:
    (block,) = code_blocks("docs/full_fine_tuning.md")
    page: dict[str, Any] = {}
    exec(compile(block, "docs/full_fine_tuning.md", "exec"), page)
    trial = make_trial("full", kind, seed=5, task={"epochs": 4}, lr_backbone=0.02)
    backbone = copy.deepcopy(trial.data.backbone.module)
    classes = trial.data.num_classes
    train, val = split(trial.data, "train"), split(trial.data, "val")
    before = torch.random.get_rng_state()
    model = page["fine_tune"](
        backbone, trial.data.backbone.num_features, classes, train, val, rate=0.02, epochs=4, batch=16, seed=5
    )
    torch.random.set_rng_state(before)
    metrics = finish(trial)
    assert metrics["best/epoch"] > 1, "the trial learned nothing, and the best epoch proves nothing"
    assert same_tensors(trial.model.backbone.state_dict(), model[0].state_dict())
    assert same_tensors(trial.model.head.state_dict(), model[1].state_dict())
