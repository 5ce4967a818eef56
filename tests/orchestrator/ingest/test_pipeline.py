"""From a source to a store: contents, quarantine, leaks, and that it is written once."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from orchestrator.ingest import writer
from orchestrator.ingest.errors import DataError
from orchestrator.ingest.images import decode
from orchestrator.ingest.pipeline import IngestRequest, ingest, survey
from tests.orchestrator.ingest.pictures import CLASSES, domains, encoded, fill, picture, png_claiming, read
from trainables.data.store import Store
from trainables.demo.digits import handwritten_digits, shift


def contents(store: Store) -> dict[str, tuple[str, str, str, bytes]]:
    """Name → (split, domain, class, pixels)."""
    return {
        name: (split, store.domains[domain], store.classes[label], pixels.tobytes())
        for split in store.splits
        for name, domain, label, pixels in zip(
            store.names(split), store.domain_ids(split), store.labels(split), store.images(split), strict=True
        )
    }


def bad_files(folder: Path) -> dict[str, str]:
    """Write seven unreadable pictures; returns the beginning of the reason for each."""
    jpeg = encoded(picture(900, 100, 100), "JPEG")
    files = {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated or damaged"),
        "zero.jpg": (b"", "the file is empty"),
        "page.jpg": (b"<html>404</html>", "not a picture"),
        "bomb.png": (png_claiming(12_000, 10_000), "120 megapixels are over the limit of 50"),
        "vector.eps": (encoded(picture(901), "EPS"), "not a picture"),
        "dot.png": (encoded(Image.new("RGB", (1, 1))), "1 x 1 is too small"),
        "photo.heic": (b"\0\0\0\x18ftypheic", "not a picture"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: reason for name, (_, reason) in files.items()}


class TestStore:
    def test_every_image_is_there_once_decoded_with_its_class_and_domain(self, tmp_path: Path) -> None:
        root = domains(tmp_path / "data")
        store = read(root, tmp_path / "stores", ood=("sketch",))
        stored = contents(store)
        assert len(stored) == 48
        for path in root.rglob("*.png"):
            split, domain, label, pixels = stored[str(path.relative_to(root))]
            assert (domain, label) == path.relative_to(root).parts[:2]
            assert (split == "ood/sketch") == (domain == "sketch")
            assert pixels == decode(path.read_bytes(), 16, "bilinear").pixels.tobytes()

    def test_given_splits(self, tmp_path: Path) -> None:
        fill(tmp_path / "data", {f"{s}/{c}": 3 for s in ("train", "val", "test") for c in CLASSES})
        store = read(tmp_path / "data", tmp_path / "stores")
        assert all(name.startswith(f"{split}/") for name, (split, *_) in contents(store).items())

    def test_the_manifest_states_what_was_done(self, tmp_path: Path) -> None:
        manifest = read(domains(tmp_path / "data"), tmp_path / "stores", ood=("sketch",)).manifest
        assert manifest["counts"] == {"train": 18, "val": 3, "test": 3, "ood/sketch": 24}
        assert manifest["class_counts"]["ood/sketch"] == {"ant": 8, "bee": 8, "cat": 8}
        assert (manifest["id_domains"], manifest["ood_domains"]) == (["photo"], ["sketch"])
        assert (manifest["layout"], manifest["quarantine"]) == ("<domain>/<class>/*", [])

    def test_channel_statistics_are_those_of_the_training_images(self, tmp_path: Path) -> None:
        store = read(domains(tmp_path / "data"), tmp_path / "stores")
        values = store.images("train").reshape(-1, 3) / 255
        assert np.allclose(store.manifest["channel_mean"], values.mean(0), atol=1e-5)
        assert np.allclose(store.manifest["channel_std"], values.std(0), atol=1e-5)

    def test_the_file_is_plain_arrow_one_batch_per_split_and_its_digest_holds(self, tmp_path: Path) -> None:
        store = read(domains(tmp_path / "data"), tmp_path / "stores")
        store.verify()
        with pa.memory_map(str(store.path / "data.arrow")) as mapped:
            reader = pa.ipc.open_file(mapped)
            assert reader.num_record_batches == len(store.splits)
            for number in range(reader.num_record_batches):
                reader.get_batch(number).validate(full=True)
            assert reader.schema.field("image").type == pa.list_(pa.uint8(), 16 * 16 * 3)
            assert json.loads(reader.schema.metadata[b"luthier"])["classes"] == store.classes

    def test_digits(self, tmp_path: Path) -> None:
        request = IngestRequest(source="digits", image_size=32, interpolation="bilinear")
        store = ingest(request, tmp_path, workers=1)
        assert store.domains == ["handwritten", "blurred", "inverted", "noisy", "printed", "rotated"]
        images, labels = handwritten_digits()
        rows = [int(name.split("/")[1]) for name in store.names("test")]
        assert np.array_equal(store.images("test"), images[rows])
        assert np.array_equal(store.labels("test"), labels[rows])
        inverted = [int(name.split("/")[1]) for name in store.names("ood/inverted")]
        assert sorted(inverted) == sorted(rows), "shifted digits are those of the test split"
        assert np.array_equal(store.images("ood/inverted"), shift(images[inverted], "inverted", 0))
        assert ingest(request, tmp_path).path == store.path

    def test_it_does_not_depend_on_the_number_of_workers(self, tmp_path: Path) -> None:
        root = domains(tmp_path / "data", count=100)
        request = IngestRequest(source="folder", root=str(root), image_size=16, interpolation="bilinear")
        assert len({ingest(request, tmp_path / str(count), workers=count).digest for count in (1, 3)}) == 1


class TestQuarantine:
    def test_d1_d2_d3_d9_d10_d12_bad_files_are_listed_and_left_out(self, tmp_path: Path) -> None:
        root = domains(tmp_path / "data", ("photo",), 10)
        clean = read(root, tmp_path / "clean")
        expected = bad_files(root / "photo" / "bee")
        store = read(root, tmp_path / "stores")
        listed = {entry["name"].removeprefix("photo/bee/"): entry["reason"] for entry in store.manifest["quarantine"]}
        assert set(listed) == set(expected)
        assert all(listed[name].startswith(reason) for name, reason in expected.items()), listed
        assert contents(store) == contents(clean), "splits and pixels are those of the good images alone"
        assert store.digest == clean.digest
        store.verify()

    def test_the_same_list_every_time(self, tmp_path: Path) -> None:
        root = domains(tmp_path / "data", ("photo",), 5)
        bad_files(root / "photo" / "bee")
        first, second = (read(root, tmp_path / folder).manifest for folder in ("one", "two"))
        assert first["quarantine"] == second["quarantine"]
        assert first["sha256"] == second["sha256"]

    def test_on_bad_fail_names_them_also_when_the_store_is_already_there(self, tmp_path: Path) -> None:
        root = domains(tmp_path / "data", ("photo",), 5)
        (root / "photo" / "bee" / "zero.png").touch()
        text = (
            "All images must be readable, but 1 image cannot be read: photo/bee/zero.png (the file is empty). "
            f"Replace or remove what `luthier data check {root}` lists."
        )
        for _ in range(2):
            with pytest.raises(DataError) as error:
                read(root, tmp_path / "stores", on_bad="fail")
            assert str(error.value) == text
            read(root, tmp_path / "stores")

    def test_a_class_that_is_too_small_because_of_them(self, tmp_path: Path) -> None:
        root = domains(tmp_path / "data", ("photo",), 3)
        (root / "photo" / "ant" / "0000.png").write_bytes(b"")
        with pytest.raises(DataError) as error:
            read(root, tmp_path / "stores")
        assert str(error.value) == (
            "Every class needs at least 3 ID training images, one for training and one for validation and one for "
            "testing, but ant has 2 (1 unreadable image left out). Add images, or remove the class. "
            "Unreadable: photo/ant/0000.png (the file is empty)."
        )
        assert [p.suffix for p in (tmp_path / "stores").iterdir()] == [".lock"], "no partial store"

    def test_nothing_readable_at_all(self, tmp_path: Path) -> None:
        root = domains(tmp_path / "data", ("photo",), 3)
        for path in root.rglob("*.png"):
            path.write_bytes(b"garbage!")
        with pytest.raises(DataError, match="All images must be readable, but 9 images cannot be read"):
            read(root, tmp_path / "stores")

    def test_d25_equal_bytes_across_splits_are_reported(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        root = domains(tmp_path / "data", count=4)
        copy = (root / "photo" / "ant" / "0000.png").read_bytes()
        (root / "sketch" / "ant" / "copy.png").write_bytes(copy)
        (root / "sketch" / "bee" / "copy.png").write_bytes(copy)
        duplicates = read(root, tmp_path / "stores", ood=("sketch",)).manifest["duplicates"]
        names = ["photo/ant/0000.png", "sketch/ant/copy.png", "sketch/bee/copy.png"]
        assert [group["names"] for group in duplicates["across"]] == [names]
        assert [group["names"] for group in duplicates["contradictory"]] == [names]
        assert duplicates["across"][0]["places"][1:] == ["ood/sketch", "ood/sketch"]
        split = duplicates["leaks"][0]["places"][0]
        assert (
            "1 image in more than one of training, validation and what is measured, which flatters the numbers: "
            f"{names[0]} ({split}) = " in caplog.text
        )


def test_d18_a_domain_that_lacks_a_class_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "data", {"photo/ant": 4, "photo/bee": 4, "ood/art/ant": 2})
    store = read(tmp_path / "data", tmp_path / "stores")
    assert {split: len(classes) for split, classes in store.manifest["class_counts"].items()}["ood/art"] == 1
    assert (
        "Numbers are over the classes that have images, which are not all everywhere: ood/art has 1 of 2" in caplog.text
    )


class TestLeaks:
    def test_d25_on_leak_fail_names_them_also_when_the_store_is_already_there(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = tmp_path / "data"
        fill(root, {f"{split}/{name}": 2 for split in ("train", "val", "test") for name in CLASSES})
        (root / "test" / "ant" / "copy.png").write_bytes((root / "train" / "ant" / "0000.png").read_bytes())
        picture(2).save(root / "val" / "ant" / "copy.bmp")
        for _ in range(2):
            store = read(root, tmp_path / "stores")
            assert caplog.text.count("which flatters the numbers") == 1, "warned before every run"
            caplog.clear()
            with pytest.raises(DataError) as error:
                read(root, tmp_path / "stores", on_leak="fail")
            assert str(error.value) == (
                "No image may be in more than one of training, validation and what is measured (data.on_leak: fail), "
                "but 2 images are: test/ant/copy.png (test) = train/ant/0000.png (train), train/bee/0002.png (train) = "
                f"val/ant/copy.bmp (val) (equal pixels, other bytes). Remove the copies ({store.path}/manifest.json "
                "lists them all), or allow them with data.on_leak: report."
            )

    def test_d25_copies_among_what_is_measured_or_among_training_images_leak_nothing(self, tmp_path: Path) -> None:
        root = tmp_path / "data"
        fill(root, {f"{split}/{name}": 2 for split in ("train", "val", "test") for name in CLASSES})
        fill(root, {"ood/art/ant": 1, "ood/clay/ant": 1}, first=100)
        for copy in ("ood/art/ant/copy.png", "ood/clay/ant/copy.png"):
            (root / copy).write_bytes((root / "test" / "ant" / "0012.png").read_bytes())
        (root / "train" / "ant" / "copy.png").write_bytes((root / "train" / "ant" / "0000.png").read_bytes())
        duplicates = read(root, tmp_path / "stores", on_leak="fail").manifest["duplicates"]
        assert (duplicates["across_groups"], duplicates["leaks_groups"], duplicates["repeats"]) == (1, 0, 1)


class TestOnce:
    def test_the_second_call_returns_the_store_and_decodes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = domains(tmp_path / "data")
        first = read(root, tmp_path / "stores")
        monkeypatch.setattr(writer, "decode_all", None)
        assert read(root, tmp_path / "stores").path == first.path

    def test_a_moved_folder_is_the_same_data(self, tmp_path: Path) -> None:
        root = domains(tmp_path / "data")
        first = read(root, tmp_path / "stores")
        os.rename(root, tmp_path / "moved")
        assert read(tmp_path / "moved", tmp_path / "stores").path == first.path

    @pytest.mark.parametrize("change", [{"seed": 1}, {"image_size": 12}, {"ood": ("sketch",)}, {"val_fraction": 0.3}])
    def test_another_request_is_another_store(self, tmp_path: Path, change: dict[str, Any]) -> None:
        root = domains(tmp_path / "data")
        first, second = read(root, tmp_path / "stores"), read(root, tmp_path / "stores", **change)
        assert first.path != second.path
        assert first.digest != second.digest

    def test_d26_changed_data_are_another_store(self, tmp_path: Path) -> None:
        root = domains(tmp_path / "data")
        first = read(root, tmp_path / "stores")
        fill(root, {"photo/ant": 1}, first=500)
        assert read(root, tmp_path / "stores").path != first.path

    def test_two_processes_make_one_store(self, tmp_path: Path) -> None:
        root = domains(tmp_path / "data")
        request = IngestRequest(source="folder", root=str(root), image_size=16, interpolation="bilinear")
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=ingest, args=(request, tmp_path / "stores", 1)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [p.exitcode for p in processes] == [0, 0]
        assert len([p for p in (tmp_path / "stores").iterdir() if p.is_dir()]) == 1

    def test_leftovers_of_a_killed_ingest_are_removed(self, tmp_path: Path) -> None:
        root = domains(tmp_path / "data")
        store = read(root, tmp_path / "stores")
        leftover = store.path.parent / f".{store.path.name}-abc"
        os.rename(store.path, leftover)
        assert contents(read(root, tmp_path / "stores"))
        assert not leftover.exists()


def test_survey_scans_and_assigns_without_opening_an_image(tmp_path: Path) -> None:
    root = domains(tmp_path / "data", ("photo",), 3)
    bad_files(root / "photo" / "bee")
    source, assignment = survey(IngestRequest(source="folder", root=str(root)))
    assert (len(source.samples), len(assignment.used)) == (16, 16)
    fill(root, {"art/fox": 1})
    with pytest.raises(DataError, match="'fox' occurs only in OOD domains"):
        survey(IngestRequest(source="folder", root=str(root), ood=("art",)))
