"""What a process keeps for all of its trials."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.support.synthetic import SIDE, write_shapes
from trainables.engine.process_cache import on_device, open_store, pretrained_for
from trainables.specs.trial_spec import ModelSpec


def test_a_store_is_opened_once(tmp_path: Path) -> None:
    path = str(write_shapes(tmp_path / "store"))
    assert open_store(path) is open_store(path)


@pytest.mark.parametrize(
    ("image_size", "stored", "seen"),
    [(None, SIDE, SIDE), (None, SIDE + 8, SIDE), (None, 8, 8), (8, SIDE, 8), (SIDE + 8, SIDE + 8, SIDE + 8)],
)
def test_images_are_never_enlarged(
    network: Callable[[str], str], image_size: int | None, stored: int, seen: int
) -> None:
    for kind in ("cnn", "vit"):
        backbone = pretrained_for(ModelSpec(name=network(kind)), image_size, stored, None)
        assert backbone.data_config.image_size == seen
        with torch.no_grad():
            assert backbone.module(torch.zeros(1, 3, seen, seen)).shape == (1, 16)


def test_a_network_enters_the_process_once(network: Callable[[str], str]) -> None:
    spec = ModelSpec(name=network("cnn"))
    backbone = pretrained_for(spec, None, SIDE, None)
    assert pretrained_for(ModelSpec(name=network("cnn")), None, SIDE, None) is backbone
    assert on_device(backbone, torch.device("cpu")) is backbone
