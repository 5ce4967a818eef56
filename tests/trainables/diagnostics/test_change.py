"""Relative change of tensors against its definition, with the reference that a strategy starts from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.trials import MakeTrial
from trainables.diagnostics.change import TensorChange, change_report, parameter_change
from trainables.engine.trial import Trial
from trainables.models.task_model import TaskModel
from trainables.specs.measurements import Curve
from trainables.storage.checkpoint_format import load_state, save_state


@pytest.fixture
def make(make_trial: MakeTrial) -> Callable[..., Trial]:
    """`make("full", "cnn", lr_backbone=…)`: a short run on the tiny networks."""
    return partial(make_trial, seed=1)


def plain(before: Tensor, after: Tensor) -> float:
    """‖W̃ − W‖₂ / ‖W‖₂, or ‖W̃‖₂ where W = 0; number by number."""
    pairs = list(zip(before.flatten().tolist(), after.flatten().tolist(), strict=True))
    moved = math.sqrt(sum((b - a) ** 2 for a, b in pairs))
    length = math.sqrt(sum(a * a for a, _ in pairs))
    return moved / length if length else moved


def curve(metrics: dict[str, Any], name: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = metrics["curves"][name]["columns"]
    return columns


def small() -> TaskModel:
    """One convolution with BatchNorm, and a head."""
    generator = torch.Generator().manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = TaskModel(backbone, nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("strategy", "kind"), [("full", "vit"), ("full", "cnn"), ("daft", "cnn"), ("lp_ft", "cnn")])
def test_every_tensor_is_compared_with_its_value_before_training(
    make: Callable[..., Trial], strategy: str, kind: str
) -> None:
    """W of DAFT is the value after the conversion, that of the head the value after its initialisation."""
    run = make(strategy, kind, lr_backbone=0.01)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.step()
    last = run.step()
    table = curve(last, "change")
    after = run.model.state_dict()
    expected = [name for name, _ in run.model.named_parameters()]
    expected += [name for name in after if name.endswith(("running_mean", "running_var"))]
    assert sorted(table["tensor"]) == sorted(expected)
    for name, value, absolute in zip(table["tensor"], table["change"], table["absolute"], strict=True):
        assert value == pytest.approx(plain(before[name], after[name]), rel=1e-5), name
        assert absolute == float(not before[name].any())
    backbone = [name for name, _ in run.model.named_parameters() if name.startswith("backbone.")]
    together = torch.cat([before[n].flatten() for n in backbone]), torch.cat([after[n].flatten() for n in backbone])
    assert last["change/total"] == pytest.approx(plain(*together), rel=1e-5)


def test_daft_is_not_compared_with_the_network_before_its_conversion(make: Callable[..., Trial]) -> None:
    run = make("daft", "cnn", lr_backbone=1e-6, lr_head=1e-6)
    run.step()
    last = run.step()
    pretrained = run.data.reference.state_dict()
    end = run.model.backbone.state_dict()
    from_pretrained = plain(pretrained["bn1.weight"], end["bn1.weight"])
    assert last["change/norm"] < 1e-4 < 0.05 < from_pretrained
    assert last["change/head"] < 1e-4
    table = curve(last, "change")
    assert [a for n, a in zip(table["tensor"], table["absolute"], strict=True) if n.startswith("head.")] == [1.0, 1.0]


def test_a_trial_that_trains_the_head_alone_changes_nothing_else(make: Callable[..., Trial]) -> None:
    last = make("linear_probe", "cnn").step()
    changed = {name: value for name, value in last.items() if name.startswith("change/")}
    assert changed.pop("change/head") > 0
    assert set(changed) == {"change/conv", "change/norm", "change/bn_mean", "change/bn_var", "change/total"}
    assert set(changed.values()) == {0.0}


def test_a_resumed_trial_compares_with_the_same_start(make: Callable[..., Trial], tmp_path: Path) -> None:
    whole, first, second = (make("daft", "cnn") for _ in range(3))
    whole.step()
    first.step()
    save_state(tmp_path / "state", first.state())
    second.load_state(load_state(tmp_path / "state"))
    assert curve(whole.step(), "change") == curve(second.step(), "change")


def test_means_over_kinds_and_stages() -> None:
    changes = [
        TensorChange("a", "conv", "stem", distance=1.0, reference=2.0),
        TensorChange("b", "conv", "layer1", distance=3.0, reference=1.0),
        TensorChange("c", "norm", "layer1", distance=0.5, reference=0.0),
        TensorChange("d", "norm", "layer1", distance=0.1, reference=0.2),
        TensorChange("e", "bn_mean", "layer1", distance=9.0, reference=1.0),
        TensorChange("head.weight", "head", "head", distance=4.0, reference=0.0),
        TensorChange("head.bias", "head", "head", distance=2.0, reference=0.0),
    ]
    report = change_report(changes)
    metrics = {name: value for name, value in report.items() if not isinstance(value, Curve)}
    assert metrics == pytest.approx(
        {
            "change/conv": 1.75,
            "change/norm": 0.5,  # the tensor that started at zero has no relative change and does not count
            "change/bn_mean": 9.0,
            "change/head": 3.0,  # the whole head started at zero: absolute
            "change/total": math.sqrt(1 + 9 + 0.25 + 0.01) / math.sqrt(4 + 1 + 0.04),
        }
    )
    stages = report["change_by_stage"]
    assert isinstance(stages, Curve)
    assert stages.columns == {
        "stage": ["stem", "layer1", "head"],
        "conv": [0.5, 3.0, None],
        "norm": [None, 0.5, None],
        "bn_mean": [None, 9.0, None],
        "head": [None, None, 3.0],
    }


def test_kinds_and_stages_of_a_trial(make: Callable[..., Trial]) -> None:
    run = make("full", "vit")
    run.step()
    last = run.step()
    kinds = {"embed", "attention", "mlp", "norm", "head", "total"}
    assert {name.removeprefix("change/") for name in last if name.startswith("change/")} == kinds
    assert curve(last, "change_by_stage")["stage"] == ["stem", "blocks.0", "blocks.1", "norm", "head"]
    run = make("full", "cnn")
    run.step()
    last = run.step()
    assert {name.removeprefix("change/") for name in last if name.startswith("change/")} == {
        *("conv", "norm", "bn_mean", "bn_var", "head", "total"),
    }
    stages = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert curve(last, "change_by_stage")["stage"] == stages


def test_the_reference_is_the_pretrained_value_unless_training_started_from_another() -> None:
    model = small()
    end = copy.deepcopy(model).state_dict()
    end["backbone.0.weight"] *= 1.5
    end["backbone.1.running_mean"] += 1.0
    start = {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
    changes = {change.name: change for change in parameter_change(model.backbone, start, end)}
    assert changes["backbone.0.weight"].value == pytest.approx(0.5)
    assert (changes["backbone.1.running_mean"].absolute, changes["backbone.1.running_mean"].value) == (
        True,
        math.sqrt(2),
    )
    assert changes["backbone.1.weight"].value == changes["head.weight"].value == 0.0
    start["backbone.0.weight"] = 3 * model.state_dict()["backbone.0.weight"]
    (change, *_) = parameter_change(model.backbone, start, end)
    assert (change.name, change.value) == ("backbone.0.weight", pytest.approx(0.5))


def test_a_network_that_was_not_put_back_is_an_error() -> None:
    model = small()
    start = {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
    end = {name.replace(".0.weight", ".0.base_layer.weight"): v for name, v in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        parameter_change(model.backbone, start, end)
    assert str(error.value) == (
        "The tuned network must have the pretrained one's tensors, backbone.0.weight of shape (2, 1, 1, 1) among "
        "them, but it has none of that name. A strategy's finalize puts the structure back."
    )
