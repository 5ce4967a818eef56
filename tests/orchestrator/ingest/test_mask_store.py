"""Pictures with masks become a store: whole pictures of their own sizes, masks of class indices, counted pixels."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.ingest.errors import DataError
from orchestrator.ingest.label_map import mask_request
from orchestrator.ingest.pipeline import IngestRequest, ingest, survey
from tests.support.masked import (
    VOID,
    boxes,
    palette_image,
    photo,
    save,
    write_cityscapes,
    write_domains,
    write_pairs,
    write_sizes,
    write_voc,
    write_voids,
)
from trainables.data.store import IGNORED, Store, StoreError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def request_of(root: Path, labels: Any = None, ignore: Any = None, **fields: Any) -> IngestRequest:
    return IngestRequest(source="folder", root=str(root), masks=mask_request(labels, ignore), **fields)


def read(root: Path, into: Path, labels: Any = None, ignore: Any = None, **fields: Any) -> Store:
    return ingest(request_of(root, labels, ignore, **fields), into, workers=1)


def test_whole_pictures_and_masks_are_stored_with_their_sizes(tmp_path: Path) -> None:
    root = write_domains(tmp_path / "data")
    store = read(root, tmp_path / "stores", ood=("sketch",))
    assert (store.targets, store.image_size, store.classes) == ("masks", 0, ["0", "1"])
    assert store.domains == ["photo", "sketch"]
    assert {split: len(store.pictures(split)) for split in store.splits} == {
        "train": 4, "val": 1, "test": 1, "ood/sketch": 6,
    }  # fmt: skip
    for split in store.splits:
        pictures, masks, sizes = store.pictures(split), store.masks(split), store.sizes(split)
        assert sizes.dtype == np.int64
        for i, name in enumerate(store.names(split)):
            with Image.open(root / name) as image, Image.open(root / name.replace("images", "masks")) as mask:
                assert np.array_equal(pictures[i], np.asarray(image))
                assert np.array_equal(masks[i], np.asarray(mask))
            assert pictures[i].shape == (*sizes[i], 3)
            assert masks[i].shape == tuple(sizes[i])
        assert store.labels(split).tolist() == [0] * len(pictures)
    store.verify()


def test_views_are_read_only_and_pickled_as_the_path(tmp_path: Path) -> None:
    store = read(write_pairs(tmp_path / "data"), tmp_path / "stores")
    pictures = store.pictures("train")
    assert pictures is store.pictures("train")
    assert not pictures[0].flags.writeable
    assert not pictures[0].flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        store.masks("train")[0][0, 0] = 1
    assert np.array_equal(pictures[-1], pictures[len(pictures) - 1])
    assert [mask.shape for mask in store.masks("train")[:2]] == [(32, 32)] * 2
    with pytest.raises(IndexError, match="The split has 6 pictures, but got index 6"):
        pictures[6]
    again = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own
    assert np.array_equal(again.masks("val")[0], store.masks("val")[0])
    with pytest.raises(StoreError, match="whose targets are labels"):
        store.images("train")


def test_the_manifest_counts_pixels_per_split_and_domain(tmp_path: Path) -> None:
    store = read(write_voids(tmp_path / "data"), tmp_path / "stores")
    assert store.pixels == {
        "train": {"id": {"classes": [6528, 1152, 512], "ignored": 1024}},
        "val": {"id": {"classes": [2640, 432, 0], "ignored": 0}},
        "test": {"id": {"classes": [2448, 432, 192], "ignored": 0}},
    }
    for split in store.splits:
        values = np.bincount(np.concatenate([mask.ravel() for mask in store.masks(split)]), minlength=256)
        assert [*values[:3], values[IGNORED]] == [
            *store.pixels[split]["id"]["classes"],
            store.pixels[split]["id"]["ignored"],
        ]
    json.dumps(store.manifest)


def test_a_class_that_a_split_lacks_is_a_warning_of_every_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_voids(tmp_path / "data")
    read(root, tmp_path / "stores")
    with caplog.at_level(logging.INFO, "luthier"):
        read(root, tmp_path / "stores")
    assert "val lacks pixels of 2: its numbers are over the other classes." in caplog.messages
    assert "1 mask has no labelled pixel: 'train/masks/8.png'." in caplog.messages


def test_classes_are_indices_and_ignored_ones_255_whatever_their_values_were(tmp_path: Path) -> None:
    store = read(write_voc(tmp_path / "data"), tmp_path / "stores")
    assert store.classes == ["0", "1", "15"]
    assert sorted({int(v) for mask in store.masks("val") for v in np.unique(mask)}) == [0, 1, 2, IGNORED]
    assert store.pixels["val"]["id"] == {"classes": [4788, 512, 256], "ignored": 204}


def test_label_ids_are_mapped_once(tmp_path: Path) -> None:
    store = read(write_cityscapes(tmp_path / "data"), tmp_path / "stores")
    assert len(store.classes) == 19
    # Test pictures are drawn from training: the split of the source has no labelled pixel.
    assert store.manifest["counts"] == {"train": 3, "val": 2, "test": 1}
    mask = store.masks("val")[0]
    assert np.unique(mask).tolist() == [0, 2, 10, 13, IGNORED]
    assert [int((mask == i).sum()) for i in (0, 2, 10, 13, IGNORED)] == [572, 688, 496, 96, 196]


def test_declared_values_and_another_ignored_value(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "data", values=(0, 255))
    store = read(root, tmp_path / "stores", labels={"background": 0, "object": 255})
    assert store.classes == ["background", "object"]
    assert np.unique(store.masks("train")[0]).tolist() == [0, 1]
    other = read(root, tmp_path / "stores", ignore=[254])
    assert other.classes == ["0", "255"]
    merged = read(
        write_pairs(tmp_path / "three", values=(0, 3, 9)), tmp_path / "stores", labels={"no": 0, "yes": [3, "9"]}
    )
    assert merged.classes == ["no", "yes"]
    assert all(np.unique(mask).tolist() == [0, 1] for mask in merged.masks("train"))
    ignored = read(tmp_path / "three", tmp_path / "stores", ignore=0)
    assert ignored.classes == ["3", "9"]
    assert np.unique(ignored.masks("train")[0]).tolist() in ([0, IGNORED], [1, IGNORED])


def test_orientation_holds_for_the_pair(tmp_path: Path) -> None:
    store = read(write_sizes(tmp_path / "data", "turned"), tmp_path / "stores")
    sizes = {name: size for split in store.splits for name, size in zip(
        store.names(split), store.sizes(split).tolist(), strict=True)}  # fmt: skip
    assert sizes["images/000.jpg"] == sizes["images/001.jpg"] == [48, 40]
    assert sizes["images/002.jpg"] == [40, 48]
    for split in store.splits:
        for picture, mask in zip(store.pictures(split), store.masks(split), strict=True):
            red, green, _ = picture[mask == 1].mean(axis=0)
            assert (mask == 1).sum() == 160
            assert red < 90
            assert green > 180


def test_a_damaged_picture_and_a_damaged_mask_are_left_out_as_pairs(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "data", count=12)
    data = (root / "images" / "003.png").read_bytes()
    (root / "images" / "003.png").write_bytes(data[: len(data) // 2])  # the header is intact
    (root / "masks" / "005.png").write_bytes(b"<html>")
    (root / "images" / "006.png").write_bytes(b"")
    store = read(root, tmp_path / "stores")
    quarantine = {entry["name"]: entry["reason"] for entry in store.manifest["quarantine"]}
    assert quarantine.keys() == {"images/003.png", "images/005.png", "images/006.png"}
    assert "truncated or damaged" in quarantine["images/003.png"]
    assert quarantine["images/005.png"].startswith("mask masks/005.png: not a picture")
    assert sum(store.manifest["counts"].values()) == 9
    for split in store.splits:
        for name, picture, mask in zip(store.names(split), store.pictures(split), store.masks(split), strict=True):
            with Image.open(root / name) as image:
                assert np.array_equal(picture, np.asarray(image))
            assert (mask == 1).sum() == 144
    pixels = [entry["id"]["classes"] for entry in store.pixels.values()]
    assert np.sum(pixels, axis=0).tolist() == [9 * 880, 9 * 144]
    with pytest.raises(DataError, match="3 images cannot be read"):
        read(root, tmp_path / "stores", on_bad="fail")


def test_equal_pictures_stay_together_and_equal_masks_do_not(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "data", count=12)
    for copy, original in (("100", "001"), ("101", "001")):
        for folder in ("images", "masks"):
            (root / folder / f"{copy}.png").write_bytes((root / folder / f"{original}.png").read_bytes())
    store = read(root, tmp_path / "stores")
    split_of = {name: split for split in store.splits for name in store.names(split)}
    assert len({split_of[f"images/{number}.png"] for number in ("001", "100", "101")}) == 1
    assert store.manifest["kept_together"]["groups"] == 1
    assert sum(store.manifest["counts"].values()) == 14


def test_a_store_does_not_depend_on_the_size_of_the_network_but_on_the_labels(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "data", values=(0, 1, 2))
    paths = {read(root, tmp_path / "stores", image_size=side).path for side in (32, 64)}
    assert len(paths) == 1
    assert read(root, tmp_path / "stores", ignore=[2]).path not in paths


def test_masks_are_read_once_for_a_plan_and_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_pairs(tmp_path / "data")
    survey(request_of(root))
    kept = list((tmp_path / "cache" / "masks").glob("*.json"))
    assert len(kept) == 1
    changed = kept[0].stat().st_mtime_ns
    monkeypatch.setattr("orchestrator.ingest.mask_survey.decode_all", lambda *_, **__: pytest.fail("read again"))
    source, assignment = survey(request_of(root))
    assert kept[0].stat().st_mtime_ns == changed
    assert source.survey is not None
    assert source.survey.pixels.sum(axis=0).tolist() == [7040, 1152, 0]
    assert assignment.classes == ["0", "1"]


def test_a_changed_mask_is_read_again(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "data")
    assert survey(request_of(root))[1].classes == ["0", "1"]
    path = root / "masks" / "000.png"
    save(boxes(32, 32, (0, 0, 8, 8, 7)), path)
    os.utime(path, ns=(1, 1))
    assert survey(request_of(root))[1].classes == ["0", "1", "7"]


def test_a_value_of_ood_pictures_alone_is_no_class(tmp_path: Path) -> None:
    root = write_domains(tmp_path / "data")
    save(boxes(33, 47, (5, 6, 15, 16, 4)), root / "sketch" / "masks" / "000.png")
    with pytest.raises(DataError, match=re.escape("the value 4 occurs only in OOD domains (100 pixels)")):
        survey(request_of(root, ood=("sketch",)))
    labels = {"background": 0, "object": 1, "other": 4}
    _, assignment = survey(request_of(root, labels=labels, ood=("sketch",)))
    assert assignment.classes == ["background", "object", "other"]


def test_domains_that_are_not_used_make_no_class_and_no_problem(tmp_path: Path) -> None:
    root = write_domains(tmp_path / "data", ("photo", "sketch", "fog"))
    save(boxes(33, 47, (5, 6, 15, 16, 4)), root / "fog" / "masks" / "000.png")
    save(boxes(10, 10), root / "fog" / "masks" / "001.png")
    source, assignment = survey(request_of(root, id=("photo",), ood=("sketch",)))
    assert assignment.classes == ["0", "1"]
    assert assignment.unused_domains == ["fog"]
    assert source.remarks == []
    with pytest.raises(DataError, match="1 of 18 masks"):
        survey(request_of(root))


@pytest.mark.parametrize("kind", ["one bit", "two bits", "four bits", "16 bits", "palette", "grey of three channels"])
def test_values_are_those_of_the_file_whatever_its_type_of_pixel(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "data"
    for number in range(4):
        mask = boxes(32, 32, (10, 10, 22, 22, 1))
        save(photo(mask, number), root / "images" / f"{number}.png")
        path = root / "masks" / f"{number}.png"
        match kind:
            case "one bit":
                save(Image.fromarray(mask * 255).convert("1"), path)
            case "two bits" | "four bits":
                # Pillow writes few bits for small palettes; the file is the same but for its type of colour.
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(few_bits(mask, 2 if kind == "two bits" else 4))
            case "16 bits":
                save(mask.astype(np.uint16), path)
            case "palette":
                save(palette_image(mask), path)
            case _:
                save(np.repeat(mask[..., None], 3, axis=2), path)
    store = read(root, tmp_path / "stores")
    assert store.classes == ["0", "1"]
    assert (store.masks("train")[0] == 1).sum() == 144


def few_bits(mask: np.ndarray[Any, Any], bits: int) -> bytes:
    """A greyscale PNG of 2 or 4 bits per pixel, which Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = mask.shape
    per_byte = 8 // bits
    packed = np.zeros((height, width // per_byte), np.uint8)
    for i in range(per_byte):
        packed |= mask[:, i::per_byte] << np.uint8(8 - bits * (i + 1))
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )  # fmt: skip


def test_void_training_is_refused(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "data")
    for path in (root / "masks").iterdir():
        save(np.full((32, 32), VOID, np.uint8), path)
    with pytest.raises(DataError, match="their values are 255, and 255 is the ignored value"):
        survey(request_of(root))
    with pytest.raises(DataError, match="all pixels of the training masks are ignored"):
        survey(request_of(root, labels={"a": 0, "b": 1}, ignore=[255]))
