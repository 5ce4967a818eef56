"""The feature cache: values, computed once, the same bits for every number of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.support.synthetic import MemoryStore, shapes
from trainables.data import feature_cache as module
from trainables.data.feature_cache import FeatureCache
from trainables.models.backbone import Backbone, load_pretrained
from trainables.specs.trial_spec import ModelSpec
from trainables.storage.compute_once import cache_root


@pytest.fixture
def backbone(network: Callable[[str], str], one_thread: None) -> Backbone:
    return load_pretrained(ModelSpec(name=network("cnn")))


@pytest.fixture
def store() -> MemoryStore:
    return shapes()


class View:
    """A view that counts its images."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.permute(0, 3, 1, 2).float() / 255


def test_features_equal_the_pretrained_networks_output(backbone: Backbone, store: Any, tmp_path: Path) -> None:
    features = FeatureCache(tmp_path).features(backbone, store, "test", 32, view := View())
    with torch.no_grad():
        expected = backbone.module(view(torch.tensor(store.images("test"))))
    np.testing.assert_array_equal(features, expected.numpy())
    assert features.dtype == np.float32
    assert not features.flags.writeable


def test_features_are_computed_once_and_read_by_other_processes(backbone: Backbone, store: Any, tmp_path: Path) -> None:
    view = View()
    first = FeatureCache(tmp_path).features(backbone, store, "val", 32, view)
    module._mapped.clear()  # as in another process
    second = FeatureCache(tmp_path).features(backbone, store, "val", 32, view)
    np.testing.assert_array_equal(first, second)
    assert view.seen == 32


def test_a_prefix_is_served_from_the_whole_and_has_the_same_bits(
    backbone: Backbone, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 10)
    view = View()
    whole = FeatureCache(tmp_path / "a").features(backbone, store, "train", 64, view)
    assert view.seen == 64
    np.testing.assert_array_equal(FeatureCache(tmp_path / "a").features(backbone, store, "train", 33, view), whole[:33])
    assert view.seen == 64
    part = FeatureCache(tmp_path / "b").features(backbone, store, "train", 33, view)
    assert view.seen == 64 + 40  # to the end of a batch
    np.testing.assert_array_equal(part, whole[:33])


@pytest.mark.parametrize("change", ["weights", "data", "split", "view"])
def test_other_weights_data_splits_and_views_have_features_of_their_own(
    backbone: Backbone, store: Any, tmp_path: Path, change: str
) -> None:
    cache = FeatureCache(tmp_path)
    view = View()
    cache.features(backbone, store, "test", 32, view)
    if change == "weights":
        backbone = dataclasses.replace(backbone, digest="other")
    elif change == "data":
        store.digest = "other"
    elif change == "view":
        backbone = dataclasses.replace(backbone, data_config=dataclasses.replace(backbone.data_config, crop_pct=0.5))
    cache.features(backbone, store, "val" if change == "split" else "test", 32, view)
    assert view.seen == 64


def test_a_damaged_file_is_computed_again(
    backbone: Backbone, store: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    view = View()
    first = np.array(FeatureCache(tmp_path).features(backbone, store, "test", 32, view))
    (path,) = (tmp_path / "features").glob("*.npy")
    module._mapped.clear()
    content = path.read_bytes()
    path.unlink()  # a mapped file must not shrink under its readers
    path.write_bytes(content[:-100])
    np.testing.assert_array_equal(FeatureCache(tmp_path).features(backbone, store, "test", 32, view), first)
    assert view.seen == 64
    assert f"The stored features {path} are damaged" in caplog.text


def test_a_failure_on_the_way_leaves_no_file(
    backbone: Backbone, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        FeatureCache(tmp_path).features(backbone, store, "test", 32, View())
    assert [path.suffix for path in (tmp_path / "features").iterdir() if path.suffix != ".lock"] == []


def test_more_images_than_there_are(backbone: Backbone, store: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        FeatureCache(tmp_path).features(backbone, store, "test", 33, View())
    assert str(error.value) == "Features of the first 33 images of test were asked for, but it has 32."


def test_few_arrays_are_mapped_at_a_time(
    backbone: Backbone, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAPPED_LIMIT", 2)
    module._mapped.clear()
    for split in ("train", "val", "test"):
        FeatureCache(tmp_path).features(backbone, store, split, 8, View())
    assert len(module._mapped) == 2


def test_the_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", "/from/environment")
    assert cache_root(tmp_path) == tmp_path
    assert cache_root() == Path("/from/environment")
    monkeypatch.delenv("LUTHIER_CACHE")
    assert cache_root() == Path.home() / ".cache" / "luthier"


def test_p21_images_go_through_in_smaller_pieces_where_memory_runs_out(
    backbone: Backbone, store: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = FeatureCache(tmp_path / "whole").features(backbone, store, "train", 64, View())
    sizes: list[int] = []

    class Limited(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = backbone.module

        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory. Planted.")
            sizes.append(len(images))
            features: Tensor = self.network(images)
            return features

    limited = dataclasses.replace(backbone, module=Limited())
    features = FeatureCache(tmp_path / "pieces").features(limited, store, "train", 64, View())
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert sizes == [16, 16, 16, 16]  # 64 → 32 → 16
    assert "Memory ran out while computing features of 32 images at once; going on with 16 at a time." in caplog.text


def test_an_image_that_does_not_fit_alone_is_an_error(backbone: Backbone, store: Any, tmp_path: Path) -> None:
    class Never(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Planted.")

    with pytest.raises(torch.OutOfMemoryError):
        FeatureCache(tmp_path).features(dataclasses.replace(backbone, module=Never()), store, "train", 64, View())
