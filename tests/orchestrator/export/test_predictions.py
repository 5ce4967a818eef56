"""A prediction belongs to a path and a name: order, neighbours, batches and other files change nothing else."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

import luthier
from orchestrator.cli import app
from orchestrator.export.domain_report import DomainReport
from orchestrator.export.export import export_model
from orchestrator.export.predictions import Predictions
from orchestrator.ingest.errors import DataError
from tests.orchestrator.ingest.pictures import picture, read
from tests.support.exports import pictures, tuned

pytestmark = pytest.mark.usefixtures("cpu_only")

NUMBERS = ["1", "2", "10", "11"]
NAMES = ["Übung", "a, b", 'say "x"', "10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    export_model(tuned("test_resnet", classes=NUMBERS), folder / "numbers")
    return folder / "numbers"


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Path:
    """Pictures with numbers as names, equal names in subfolders, unreadable ones, and other files."""
    root = folder / "mixed"
    for number, name in enumerate(("1.png", "2.png", "10.png", "a/1.png", "b/1.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number, 40, 36).save(root / name)
    (root / "5.png").write_bytes((root / "1.png").read_bytes()[:200])
    (root / "6.jpg").write_bytes(b"")
    (root / "notes.txt").write_text("x")
    (root / ".DS_Store").write_text("x")
    return root


def command(*arguments: object) -> tuple[int, str, str]:
    ended = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    return ended.exit_code, ended.stdout, ended.stderr


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class TestFolders:
    ORDER = ("1.png", "10.png", "2.png", "a/1.png", "b/1.png")

    @pytest.mark.parametrize("batch_size", [1, 2, 32])
    def test_a_row_for_every_picture_whatever_the_batch(
        self, model: Path, mixed: Path, tmp_path: Path, batch_size: int
    ) -> None:
        code, out, _ = command(model, mixed, "-o", tmp_path / "out.csv", "--batch-size", batch_size)
        assert code == 3
        table = rows(tmp_path / "out.csv")
        assert [row["path"] for row in table] == list(self.ORDER)
        lines = out.replace("\n", " ")
        assert "Unreadable: 5.png: truncated or damaged" in lines
        assert "Unreadable: 6.jpg: the file is empty" in lines
        assert out.splitlines()[-1].endswith("5 pictures predicted, 2 unreadable, 2 ignored")
        alone = luthier.load(model)
        for row in table:
            single = alone.predict(mixed / row["path"]).iloc[0]
            assert [float(row[name]) for name in NUMBERS] == pytest.approx([single[name] for name in NUMBERS], abs=1e-6)

    def test_files_in_the_order_given(self, model: Path, mixed: Path, tmp_path: Path) -> None:
        names = ["b/1.png", "a/1.png", "6.jpg", "10.png", "5.png", "2.png", "1.png"]
        code, out, _ = command(model, *(mixed / name for name in names), "-o", tmp_path / "out.csv")
        assert code == 3
        readable = [str(mixed / name) for name in names if name not in ("5.png", "6.jpg")]
        assert [row["path"] for row in rows(tmp_path / "out.csv")] == readable
        assert "2 unreadable, 0 ignored" in out.replace("\n", " ")

    def test_a_picture_that_is_named_twice_has_one_row(self, model: Path, mixed: Path, tmp_path: Path) -> None:
        code, _, _ = command(model, mixed / "1.png", mixed / "a/../1.png", "-o", tmp_path / "out.csv")
        assert code == 0
        assert len(rows(tmp_path / "out.csv")) == 1

    def test_several_folders_keep_their_names(self, model: Path, mixed: Path, tmp_path: Path) -> None:
        command(model, mixed / "a", mixed / "b", "-o", tmp_path / "out.csv")
        assert [row["path"] for row in rows(tmp_path / "out.csv")] == [f"{mixed}/a/1.png", f"{mixed}/b/1.png"]

    def test_an_empty_folder_writes_nothing(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        code, _, err = command(model, tmp_path / "empty", "-o", tmp_path / "out.csv")
        assert code == 4
        assert "A folder to predict must hold pictures, but" in err
        assert not (tmp_path / "out.csv").exists()

    def test_nothing_at_a_path(self, model: Path, tmp_path: Path) -> None:
        code, _, err = command(model, tmp_path / "nothing", "-o", tmp_path / "out.csv")
        assert code == 4
        assert "there is nothing at" in err

    def test_no_readable_picture(self, model: Path, mixed: Path, tmp_path: Path) -> None:
        code, _, err = command(model, mixed / "5.png", mixed / "6.jpg", "-o", tmp_path / "out.csv")
        assert code == 4
        assert "none of 2 is" in err
        assert not (tmp_path / "out.csv").exists()

    def test_a_failed_write_leaves_the_earlier_file(
        self, model: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(self: Predictions, path: Path) -> None:
            path.write_text("half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Predictions, "_write_csv", full)
        (tmp_path / "out.csv").write_text("earlier")
        code, _, err = command(model, mixed, "-o", tmp_path / "out.csv")
        assert code == 1
        assert "No space left" in err
        assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
        assert (tmp_path / "out.csv").read_text() == "earlier"


class TestOutput:
    @pytest.mark.parametrize("name", ["out.txt", "nowhere/out.csv"])
    def test_an_output_that_cannot_be_written_is_refused_first(self, model: Path, tmp_path: Path, name: str) -> None:
        code, _, err = command(model, tmp_path, "-o", tmp_path / name)
        assert code == 2
        assert "cannot write its predictions" in err

    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    def test_classes_by_name(self, folder: Path, mixed: Path, tmp_path: Path, suffix: str) -> None:
        """X02: names with commas, quotes and umlauts, and a number."""
        if not (folder / "names").exists():
            export_model(tuned("test_resnet", classes=NAMES), folder / "names")
        output = tmp_path / f"out.{suffix}"
        command(folder / "names", mixed / "a", "-o", output)
        table = pd.read_parquet(output) if suffix == "parquet" else pd.read_csv(output, dtype={"class": str})
        assert list(table.columns) == ["path", "class", "confidence", *NAMES]
        assert table[NAMES].sum(axis=1).to_list() == pytest.approx([1.0])
        assert table["class"][0] == table[NAMES].iloc[0].idxmax()
        assert table["confidence"][0] == table[NAMES].iloc[0].max()

    def test_a_class_of_the_name_of_a_column(self) -> None:
        values = np.array([[0.25, 0.75]])
        frame = Predictions(["x.png"], values, ("path", "class")).to_frame()
        assert list(frame.columns) == ["path_", "class_", "confidence", "path", "class"]

    def test_as_json(self, model: Path, mixed: Path, tmp_path: Path) -> None:
        _, out, _ = command(model, mixed, "-o", tmp_path / "out.csv", "--json")
        values = json.loads(out)
        assert values["predicted"] == 5
        assert {entry["name"] for entry in values["unreadable"]} == {"5.png", "6.jpg"}
        assert {entry["name"] for entry in values["ignored"]} == {"notes.txt", ".DS_Store"}


class TestDomainReport:
    def test_pairs_by_name_and_absent_classes(self, model: Path, tmp_path: Path) -> None:
        """X02: a folder of classes 1 and 11 alone."""
        root = pictures(tmp_path / "some", ["1", "11"], suffix=".png")
        code, out, _ = command(model, root, "-o", tmp_path / "out.csv", "--domain-report")
        assert code == 0
        table = rows(tmp_path / "out.csv")
        right = sum(row["class"] == row["path"].split("/")[0] for row in table)
        assert f"Accuracy {right / 24:.2%} on 24 pictures of known class ({right} right)" in out
        assert "No picture of 2, 10: nothing is said about these classes" in out

    def test_a_folder_that_is_no_class(self, model: Path, tmp_path: Path) -> None:
        root = pictures(tmp_path / "more", ["1", "12"], count=2, suffix=".png")
        code, _, err = command(model, root, "-o", tmp_path / "out.csv", "--domain-report")
        assert code == 4
        assert "12 (2 pictures)" in err
        assert not (tmp_path / "out.csv").exists()

    def test_domains_apart(self) -> None:
        pairs = [("photo", "cat", "cat"), ("photo", "dog", "cat"), ("sketch", "cat", "cat")]
        report = DomainReport(("cat", "dog", "fox"), pairs)
        values = report.to_dict()
        assert values["accuracy"] == pytest.approx(2 / 3)
        assert values["domains"]["photo"] == {"pictures": 2, "accuracy": 0.5}
        assert values["domains"]["sketch"] == {"pictures": 1, "accuracy": 1.0}
        assert values["classes"]["dog"] == {"pictures": 1, "right": 0, "recall": 0.0}
        assert values["confusions"] == [["dog", "cat", 1]]
        assert values["absent_classes"] == ["fox"]


class TestStores:
    def test_a_split_of_a_data_store(self, model: Path, tmp_path: Path) -> None:
        root = pictures(tmp_path / "pictures", NUMBERS, suffix=".png")
        side = luthier.load(model).preprocessing.stored_size
        store = read(root, tmp_path / "data", image_size=side, interpolation="bilinear", crop_size=32)
        code, out, _ = command(model, store.path, "-o", tmp_path / "store.csv", "--split", "val", "--domain-report")
        assert code == 0
        names = store.names("val")
        assert [row["path"] for row in rows(tmp_path / "store.csv")] == names
        assert f"on {len(names)} pictures of known class" in out
        command(model, *(root / name for name in names), "-o", tmp_path / "files.csv")
        from_store = [[float(row[name]) for name in NUMBERS] for row in rows(tmp_path / "store.csv")]
        from_files = [[float(row[name]) for name in NUMBERS] for row in rows(tmp_path / "files.csv")]
        assert np.allclose(from_store, from_files, atol=1e-6)

    def test_a_store_of_another_size(self, model: Path, tmp_path: Path) -> None:
        store = read(pictures(tmp_path / "pictures", NUMBERS, suffix=".png"), tmp_path / "data", image_size=40)
        code, _, err = command(model, store.path, "-o", tmp_path / "out.csv")
        assert code == 4
        assert "has 40" in err

    def test_a_store_that_was_resized_in_another_way(self, model: Path, tmp_path: Path) -> None:
        root = pictures(tmp_path / "pictures", NUMBERS, suffix=".png")
        side = luthier.load(model).preprocessing.stored_size
        store = read(root, tmp_path / "data", image_size=side, interpolation="bicubic")
        code, _, err = command(model, store.path, "-o", tmp_path / "out.csv")
        assert code == 4
        assert "with bicubic" in err


class TestPython:
    def test_images_in_memory_are_treated_as_files(self, model: Path, mixed: Path) -> None:
        loaded = luthier.load(model)
        with Image.open(mixed / "a/1.png") as image:
            from_memory = loaded.predict([image])
        from_file = loaded.predict(mixed / "a/1.png")
        assert from_memory[NUMBERS].to_numpy().tolist() == from_file[NUMBERS].to_numpy().tolist()

    def test_an_unreadable_picture_is_an_error(self, model: Path, mixed: Path) -> None:
        with pytest.raises(DataError, match=r"but 2 cannot be used: 5\.png"):
            luthier.load(model).predict(mixed)

    def test_files_and_images_do_not_mix(self, model: Path, mixed: Path) -> None:
        images: list[Any] = [picture(1), mixed / "1.png"]
        with pytest.raises(ValueError, match="all files or folders, or all Pillow images"):
            luthier.load(model).predict(images)
