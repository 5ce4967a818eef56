"""BitFit: exactly the bias terms and the head move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from benchmarks.support.synthetic import shapes
from tests.conformance import StrategyConformance
from trainables.bitfit import BitFit, is_bias
from trainables.engine.trial import Trial
from trainables.models.task_model import TaskModel
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec


class TestConformance(StrategyConformance):
    strategy = "bitfit"
    learning: ClassVar[Mapping[str, Any]] = {"lr_backbone": 0.1, "lr_head": 3.0}


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_exactly_the_biases_and_the_head_move(
    network: Callable[[str], str], kind: str, tmp_path: Path, one_thread: None
) -> None:
    model = ModelSpec(name=network(kind))
    task = SharedTrialSettings(store="m", model=model, epochs=1, batch_size=16, cache=str(tmp_path))
    run = Trial(TrialSpec(shared=task, strategy="bitfit", hparams={"lr_backbone": 0.1}), store=shapes(), device="cpu")
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.step()
    moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.endswith(".bias") or name.startswith("head.")}
    assert any("norm" in name or "bn" in name for name in moved)


def test_what_counts_as_a_bias() -> None:
    names = ["blocks.0.norm1.bias", "blocks.0.attn.q_bias", "blocks.0.attn.relative_position_bias_table", "fc.weight"]
    assert [is_bias(name) for name in [*names, "attn.rel_pos.relative_position_bias"]] == [True, True, *[False] * 3]


def test_a_network_without_biases_is_refused() -> None:
    model = TaskModel(nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    with pytest.raises(ValueError) as error:
        BitFit.from_hparams({}).param_groups(model)
    assert str(error.value) == ("BitFit needs a network with bias terms, but this one has none. Use another strategy.")
