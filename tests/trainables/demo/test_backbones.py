"""The demo's networks: pretrained once, accurate on printed digits, the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from trainables.demo import backbones
from trainables.demo.backbones import NETWORKS, architecture, pretrained_folder
from trainables.demo.digits import printed_digits
from trainables.models.backbone import backbone_data_config, check_model, load_pretrained
from trainables.specs.trial_spec import ModelSpec

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The machine is shared."""


@pytest.mark.parametrize("name", NETWORKS)
def test_accuracy_on_unseen_printed_digits(name: str, own_cache: Path) -> None:
    folder = pretrained_folder(name)
    assert folder.parent == own_cache / "backbones"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.glob(".*")] == []
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images, labels = printed_digits(40, seed=99)
    with torch.no_grad():
        logits = model((torch.tensor(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5)
    assert (logits.argmax(1).numpy() == labels).mean() > 0.9


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_loaded_by_name_with_its_own_view_and_without_classifier(name: str) -> None:
    spec = ModelSpec(name=name)
    check_model(spec)
    backbone = load_pretrained(spec)
    config = backbone.data_config
    assert (config.image_size, config.crop_pct, config.interpolation) == (32, 1.0, "bilinear")
    assert config.mean == config.std == (0.5, 0.5, 0.5)
    assert backbone_data_config(spec) == config
    state = load_file(pretrained_folder(name) / "model.safetensors")
    loaded = backbone.module.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert {key.rpartition(".")[0] for key in state.keys() - loaded.keys()} <= {"fc", "head"}
    random = load_pretrained(ModelSpec(name=name, pretrained=False))
    assert random.digest != backbone.digest
    assert random.num_features == backbone.num_features == 64


def test_one_has_batch_norm_and_the_other_layer_norm() -> None:
    kinds = {name: {type(m).__name__ for m in architecture(name).modules()} for name in NETWORKS}
    assert "LayerNorm" in kinds["digits_vit"]
    assert not any("BatchNorm" in kind for kind in kinds["digits_vit"])
    assert "BatchNorm2d" in kinds["digits_cnn"]


def test_another_process_loads_the_same_network(own_cache: Path) -> None:
    script = (
        "from trainables.demo import backbones\n"
        "from trainables.models.backbone import load_pretrained\n"
        "from trainables.specs.trial_spec import ModelSpec\n"
        "backbones._pretrain = None\n"  # calling it would fail
        "print(load_pretrained(ModelSpec(name='digits_cnn')).digest)\n"
    )
    expected = load_pretrained(ModelSpec(name="digits_cnn")).digest
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env={**os.environ, "LUTHIER_CACHE": str(own_cache)}, cwd=str(Path(__file__).parents[3]),
    )  # fmt: skip
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_pretraining_depends_on_nothing_but_its_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backbones.STEPS, name, 3)
    monkeypatch.setattr(backbones, "PER_CLASS", 10)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.random.get_rng_state()
        states.append(backbones._pretrain(name).state_dict())
        assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_an_interrupted_pretraining_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backbones.STEPS, "digits_cnn", 1)
    monkeypatch.setattr(backbones, "PER_CLASS", 10)

    def full(*arguments: object, **options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(backbones, "save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        pretrained_folder("digits_cnn", tmp_path)
    assert [path.name for path in (tmp_path / "backbones").iterdir() if path.is_dir()] == []
