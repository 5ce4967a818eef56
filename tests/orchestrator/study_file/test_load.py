"""A study that is read on another machine names the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.study_file.load import absolute_paths, load_study, resolved_study


def test_relative_paths_are_taken_from_the_studys_folder() -> None:
    fields = {
        "name": "pets",
        "data": {"source": "folder", "root": "images"},
        "model": {"name": "local-dir:models/vit", "weights": "w.safetensors"},
        "tracking": {"uri": "sqlite:///runs.db"},
        "storage": "../studies",
    }
    assert absolute_paths(fields, Path("/home/ann/pets")) == {
        "name": "pets",
        "data": {"source": "folder", "root": "/home/ann/pets/images"},
        "model": {"name": "local-dir:/home/ann/pets/models/vit", "weights": "/home/ann/pets/w.safetensors"},
        "tracking": {"uri": "sqlite:////home/ann/pets/runs.db"},
        "storage": "/home/ann/pets/../studies",
    }
    assert fields["data"] == {"source": "folder", "root": "images"}


def test_absolute_paths_and_urls_stay() -> None:
    fields = {
        "data": {"source": "digits"},
        "model": {"name": "resnet18"},
        "tracking": {"uri": "http://mlflow:5000"},
        "storage": "s3://bucket/luthier",
    }
    assert absolute_paths(fields, Path("/home/ann")) == fields
    assert absolute_paths({"data": {"root": "/data"}}, Path("/home/ann")) == {
        "data": {"root": "/data"},
        "storage": "/home/ann/studies",
    }


@pytest.mark.parametrize(
    ("given", "kept"), [("cifar/c", "/home/ann/cifar/c"), ("common", "common"), (["fog"], ["fog"])]
)
def test_a_folder_of_corrupted_pictures_is_a_path(given: Any, kept: Any) -> None:
    assert absolute_paths({"evaluate": {"corruptions": given}}, Path("/home/ann"))["evaluate"] == {"corruptions": kept}


def test_a_submitted_copy_states_the_same_as_the_file(tmp_path: Path) -> None:
    """The cluster reads the copy from another folder, and must come to the same study."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    (here / "study.yaml").write_text(
        "name: pets\n"
        "data: {source: folder, root: images, ood: [sketch], seed: 3}\n"
        "model: {name: resnet18, weights: w.safetensors}\n"
        "strategies: [linear_probe, {name: full, label: slow, fixed: {lr_head: 1e-1}}]\n"
        "search: {trials: 4, epochs: 2}\n"
    )
    (there / "study.yaml").write_text(yaml.safe_dump(resolved_study(here / "study.yaml")))
    copy = load_study(there / "study.yaml")
    assert copy == load_study(here / "study.yaml")
    assert copy.data.root == str(here / "images")
    assert copy.model.weights == str(here / "w.safetensors")
    assert copy.storage == str(here / "studies")
    assert copy.strategies[1].fixed == {"lr_head": 0.1}
