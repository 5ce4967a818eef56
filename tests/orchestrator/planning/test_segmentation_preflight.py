"""What a study of segmentation is refused for before anything is trained, beside its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import PreflightError, StudyError
from orchestrator.planning.build import entries_of
from orchestrator.planning.configurations import structure
from orchestrator.planning.preflight import preflight
from orchestrator.search.space import SearchSpace
from orchestrator.study_file.schema import StudySpec
from tests.support.masked import write_pairs

Problems = Callable[..., list[str]]


def spec_of(root: Path, network: str, **sections: Any) -> StudySpec:
    fields: dict[str, Any] = {
        "name": "masks",
        "task": "segmentation",
        "data": {"root": str(root), "image_size": 64},
        "model": {"name": network, "pretrained": False},
        "strategies": ["full"],
        "storage": str(root.parent / "studies"),
    }
    for key, value in sections.items():
        fields[key] = {**fields[key], **value} if isinstance(fields.get(key), dict) else value
    return StudySpec.from_fields(fields)


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Problems:
    """`problems("test_resnet", model={"decoder": "fpn"})`: those of a study on a few pictures with masks."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    root = tmp_path / "pairs"
    write_pairs(root, 12, (0, 1, 2))

    def found(network: str = "test_resnet", **sections: Any) -> list[str]:
        try:
            preflight(spec_of(root, network, **sections))
        except PreflightError as error:
            return [str(problem) for problem in error.problems]
        return []

    return found


def test_every_strategy_has_a_sound_study(problems: Problems) -> None:
    assert problems(strategies=["linear_probe", "full", "lp_ft", "daft", "bitfit"]) == []
    everything = ["linear_probe", "full", "lp_ft", "daft", "bitfit", "layernorm", "lora", "components"]
    assert problems("test_vit", strategies=everything, data={"image_size": 160}) == []


def test_a_decoder_that_does_not_fit_the_network(problems: Problems) -> None:
    (message,) = problems("test_vit", model={"decoder": "unet"}, data={"image_size": 160})
    assert message.startswith("model.decoder: The decoder unet needs an encoder with maps of several strides")
    (message,) = problems("resnetblur18", model={"decoder": "deeplabv3plus"})
    assert message.startswith("model.decoder: The decoder deeplabv3plus dilates the last stage")


def test_a_batch_of_one_picture_that_batch_norm_cannot_take(problems: Problems) -> None:
    """At 32 px a map of stride 32 has one pixel; DeepLabv3+ has none of that stride."""
    one = {"data": {"image_size": 32}, "search": {"batch_size": 1}}
    (message,) = problems(**one, model={"decoder": "unet"})
    assert message.startswith("search.batch_size: batches of one picture leave one element per channel to a BatchNorm")
    assert message.endswith("Raise search.batch_size or data.image_size.")
    assert problems(**one) == []
    assert problems(**one, model={"decoder": "unet"}, strategies=["linear_probe"]) == []


def test_settings_that_the_task_does_not_have(problems: Problems) -> None:
    (message,) = problems(loss={"class_weights": "balanced"})
    assert "loss.class_weights needs a task whose loss has it, but 'segmentation' has not" in message
    (message,) = problems(strategies=["lp_ft"], search={"epochs": 1})
    assert "Probing and tuning take at least 2 units" in message


def test_the_metric_that_selects_is_one_of_the_task(tmp_path: Path) -> None:
    assert spec_of(tmp_path, "test_resnet", search={"metric": "pixel_acc"}).search.metric == "pixel_acc"
    with pytest.raises(StudyError, match="the metric that selects is one of miou, pixel_acc, nll, but got 'acc'"):
        spec_of(tmp_path, "test_resnet", search={"metric": "acc"})


def test_hyperparameters_and_sweeps_are_those_of_the_task(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="linear_probe has no hyperparameter 'C'"):
        spec_of(tmp_path, "test_resnet", strategies=[{"name": "linear_probe", "fixed": {"C": 1.0}}])
    with pytest.raises(StudyError, match="layernorm has no preset 'cyclic'"):
        spec_of(tmp_path, "test_resnet", strategies=[{"name": "layernorm", "preset": "cyclic"}])
    spec = spec_of(tmp_path, "test_resnet", strategies=["linear_probe", {"name": "full", "preset": "paper"}])
    space = SearchSpace(entries_of(spec), "tpe")
    assert list(space.searched) == ["linear_probe"]
    assert space.default(space.searched["linear_probe"]) == {"strategy": "linear_probe", "linear_probe.lr_head": 0.03}
    assert space.presets["full"].fixed == {"lr_head": None, "schedule": "poly"}


def test_the_structure_has_the_decoder_of_the_study(tmp_path: Path) -> None:
    model = structure(spec_of(tmp_path, "test_efficientnet", model={"decoder": "fpn"}), classes=5)
    assert model.head.classifier.out_channels == 5
    assert all(parameter.is_meta for parameter in model.parameters())
    assert "backbone.conv_head.weight" in model.unused
