"""From the study file to the parts that run it."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.planning import build
from trainables.specs.trial_spec import ModelSpec


@pytest.mark.parametrize(
    ("model", "made"),
    [
        (ModelSpec(name="digits_cnn"), ["digits_cnn"]),
        (ModelSpec(name="digits_cnn", pretrained=False), []),
        (ModelSpec(name="digits_cnn", weights="/data/own.safetensors"), []),
        (ModelSpec(name="resnet18"), []),
    ],
)
def test_a_built_in_network_is_pretrained_only_where_its_weights_are_used(
    model: ModelSpec, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def folder(name: str, cache: Path | None = None) -> Path:
        asked.append(name)
        return Path()

    monkeypatch.setattr("orchestrator.planning.build.pretrained_folder", folder)
    build.make_built_in(model)
    assert asked == made
