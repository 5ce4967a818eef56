"""MedMNIST-style archives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.ingest.errors import DataError
from orchestrator.ingest.npz import scan_npz
from tests.orchestrator.ingest.pictures import read


def arrays(*shape: int, splits: tuple[str, ...] = ("train", "val", "test"), **fields: Any) -> dict[str, Any]:
    """Images of `shape` and labels 0, 1, 0, 1, … for each split."""
    random = np.random.default_rng(0)
    content: dict[str, Any] = {}
    for split in splits:
        content[f"{split}_images"] = random.integers(0, 256, shape).astype(np.uint8)
        content[f"{split}_labels"] = (np.arange(shape[0]) % 2).reshape(-1, 1)
    return {**content, **fields}


def save(path: Path, **content: Any) -> Path:
    np.savez_compressed(path, **content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        scan_npz(path)
    return str(error.value)


@pytest.mark.parametrize("shape", [(6, 16, 16), (6, 16, 16, 1), (6, 16, 16, 3)])
def test_given_splits_are_kept_and_pixels_are_the_arrays(tmp_path: Path, shape: tuple[int, ...]) -> None:
    content = arrays(*shape)
    store = read(save(tmp_path / "set.npz", **content), tmp_path / "stores", "npz")
    assert store.splits == ["train", "val", "test"]
    assert store.domains == ["id"]
    assert store.classes == ["0", "1"]
    for split in store.splits:
        rows = [int(name.split("#")[1]) for name in store.names(split)]
        assert sorted(rows) == list(range(6))
        expected = content[f"{split}_images"][rows].reshape(6, 16, 16, -1)
        assert np.array_equal(store.images(split), np.broadcast_to(expected, (6, 16, 16, 3)))
        assert store.labels(split).tolist() == [row % 2 for row in rows]


def test_missing_splits_are_cut_from_training(tmp_path: Path) -> None:
    store = read(save(tmp_path / "set.npz", **arrays(40, 16, 16, splits=("train", "test"))), tmp_path / "s", "npz")
    assert store.manifest["counts"] == {"train": 34, "val": 6, "test": 40}


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    content = arrays(6, 16, 16)
    for split in ("train", "val", "test"):
        content[f"{split}_images"] = content[f"{split}_images"].astype(np.uint16) * 257
    store = read(save(tmp_path / "set.npz", **content), tmp_path / "stores", "npz")
    row = int(store.names("train")[0].split("#")[1])
    assert np.array_equal(store.images("train")[0, ..., 0], content["train_images"][row] // 257)
    assert store.manifest["notes"] == {"sixteen_bit": 18}


def test_larger_images_are_resized_and_many_labels_sort_as_numbers(tmp_path: Path) -> None:
    content = arrays(36, 40, 30, 3)
    for split in ("train", "val", "test"):
        content[f"{split}_labels"] = np.arange(36) % 12
    store = read(save(tmp_path / "set.npz", **content), tmp_path / "stores", "npz")
    assert store.classes == [str(i) for i in range(12)]
    assert store.images("train").shape == (36, 16, 16, 3)


def test_files_of_a_folder_are_domains(tmp_path: Path) -> None:
    for name in ("north", "south"):
        save(tmp_path / f"{name}.npz", **arrays(12, 16, 16))
    store = read(tmp_path, tmp_path / "stores", "npz", id=("north",), ood=("south",))
    assert store.manifest["counts"] == {"train": 12, "val": 12, "test": 12, "ood/south": 36}


class TestRefusals:
    def test_s7_object_arrays_are_not_unpickled(self, tmp_path: Path) -> None:
        class Canary:
            def __reduce__(self) -> Any:
                return (Path(tmp_path / "executed").touch, ())

        content = arrays(6, 16, 16)
        content["train_labels"] = np.array([Canary()] * 6, dtype=object)
        text = refusal(save(tmp_path / "evil.npz", **content))
        assert text.startswith("evil.npz must be an .npz file of plain arrays, but it cannot be read as one: ")
        assert not (tmp_path / "executed").exists()

    def test_no_archive(self, tmp_path: Path) -> None:
        (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 truncated")
        assert refusal(tmp_path / "x.npz").startswith("x.npz must be an .npz file of plain arrays, but it cannot be")

    def test_another_kind_of_file(self, tmp_path: Path) -> None:
        """NumPy would suggest to load it as a pickle."""
        (tmp_path / "x.npz").write_text("label,image")
        assert refusal(tmp_path / "x.npz") == (
            "x.npz must be an .npz file of plain arrays, but it cannot be read as one: it is no zip archive. Give an "
            "undamaged file, as numpy.savez writes it."
        )

    def test_missing_arrays(self, tmp_path: Path) -> None:
        assert refusal(save(tmp_path / "x.npz", images=np.zeros(3))) == (
            "An .npz file needs the arrays train_images and train_labels, and may have val_ and test_ ones, but x.npz "
            "has images."
        )

    def test_missing_labels(self, tmp_path: Path) -> None:
        content = arrays(6, 16, 16)
        del content["val_labels"]
        assert refusal(save(tmp_path / "x.npz", **content)) == (
            "Every array of images needs one of labels, but x.npz has no val_labels."
        )

    @pytest.mark.parametrize("images", [np.zeros((6, 28, 28, 28), np.uint8), np.zeros((6, 28, 28), np.float32)])
    def test_volumes_and_floats(self, tmp_path: Path, images: np.ndarray) -> None:
        assert refusal(save(tmp_path / "x.npz", **arrays(6, 28, 28, train_images=images))) == (
            "train_images must be uint8 or uint16 of shape (n, H, W), (n, H, W, 1) or (n, H, W, 3), but in x.npz it is "
            f"{images.dtype} of shape {images.shape}."
        )

    @pytest.mark.parametrize("labels", [np.zeros((6, 14), int), np.zeros(6), np.zeros(5, int)])
    def test_several_labels_per_image_floats_or_too_few(self, tmp_path: Path, labels: np.ndarray) -> None:
        assert refusal(save(tmp_path / "x.npz", **arrays(6, 28, 28, train_labels=labels))) == (
            "train_labels must hold one integer per image, shape (6,) or (6, 1), but in x.npz it is "
            f"{labels.dtype} of shape {labels.shape}."
        )

    def test_negative_labels(self, tmp_path: Path) -> None:
        labels = np.array([0, 1, -1, 0, 1, 0])
        assert refusal(save(tmp_path / "x.npz", **arrays(6, 28, 28, train_labels=labels))) == (
            "train_labels must hold numbers from 0, but in x.npz row 2 has -1."
        )

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        assert refusal(tmp_path) == (
            f"An npz source needs files that end in .npz, but {tmp_path} holds none. Set data.source to what is there."
        )
