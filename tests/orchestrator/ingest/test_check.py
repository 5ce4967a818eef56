"""`luthier data check`: contents and problems of a source."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from orchestrator.ingest.check import DataReport, check, detect
from orchestrator.ingest.errors import DataError
from tests.orchestrator.ingest.pictures import domains, fill, picture


def rendered(report: DataReport) -> str:
    console = Console(file=io.StringIO(), width=160)
    report.render(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> DataReport:
    """Two domains with one of each kind of problem."""
    root = domains(tmp_path_factory.mktemp("messy"), count=4)
    picture(100, 64, 48).save(root / "photo" / "ant" / "large.jpg")
    picture(101).convert("RGBA").save(root / "photo" / "ant" / "clear.png")
    (root / "photo" / "bee" / "zero.jpg").touch()
    (root / "sketch" / "cat" / "copy.png").write_bytes((root / "photo" / "ant" / "0000.png").read_bytes())
    (root / "photo" / "notes.txt").touch()
    os.mkfifo(root / "photo" / "ant" / "pipe.png")
    fill(root, {"sketch/dog": 0})
    return check(root, workers=1)


def test_contents(messy: DataReport) -> None:
    assert (messy.source, messy.layout, messy.images) == ("folder", "<domain>/<class>/*", 27)
    assert messy.domains == {"photo": {"ant": 6, "bee": 4, "cat": 4}, "sketch": {"ant": 4, "bee": 4, "cat": 5}}
    assert messy.classes == ["ant", "bee", "cat"]
    assert messy.formats == {"PNG": 26, "JPEG": 1}
    assert messy.notes == {"transparent": 1}
    assert messy.splits == {}


def test_sizes(messy: DataReport) -> None:
    sizes = messy.sizes
    assert sizes is not None
    assert (sizes.smallest, sizes.median, sizes.largest) == ((20, 16), (20, 16), (64, 48))
    assert sizes.most_common == {"20x16": 26, "64x48": 1}


def test_unreadable_ignored_and_duplicate_files_are_named(messy: DataReport) -> None:
    assert messy.unreadable == [{"name": "photo/bee/zero.jpg", "reason": "the file is empty"}]
    assert {entry["name"] for entry in messy.ignored} == {"photo/ant/pipe.png", "photo/notes.txt", "sketch/dog"}
    group = ["photo/ant/0000.png", "sketch/cat/copy.png"]
    assert [g["names"] for g in messy.duplicates["across"]] == [group]
    assert [g["names"] for g in messy.duplicates["contradictory"]] == [group]
    assert messy.problems == []


def test_it_is_json(messy: DataReport) -> None:
    again = json.loads(json.dumps(messy.to_dict()))
    assert again["classes"] == ["ant", "bee", "cat"]
    assert again["sizes"]["largest"] == [64, 48]


def test_the_printed_report(messy: DataReport) -> None:
    text = rendered(messy)
    for line in (
        "27 readable images, 2 domains, 3 classes",
        "Unreadable, will be left out: 1",
        "  photo/bee/zero.jpg: the file is empty",
        "The same image in several classes: 1 group",
        "  photo/ant/0000.png (train) = sketch/cat/copy.png (train)",
        "1 with transparency; put on white",
        "A study can use this.",
    ):
        assert line in text


def test_c8_names_are_not_taken_for_markup(tmp_path: Path) -> None:
    fill(tmp_path, {"[bold]cat": 3, "<img onerror>": 3})
    (tmp_path / "[bold]cat" / "[red]x.png").touch()
    assert "[bold]cat/[red]x.png: the file is empty" in rendered(check(tmp_path, workers=1))


def test_problems_say_why_a_study_would_refuse(tmp_path: Path) -> None:
    fill(tmp_path, {"train/cat": 3, "train/dog": 1, "ood/art/fox": 1})
    report = check(tmp_path, workers=1)
    assert report.ood_domains == ["art"]
    assert report.splits == {"train": 4}
    assert report.problems[0].startswith("Every class must have ID images to learn from, but 'fox' occurs only in OOD")
    assert "Problem: Every class must have" in rendered(report)


def test_d25_duplicates_across_given_splits(tmp_path: Path) -> None:
    fill(tmp_path, {f"{split}/{name}": 2 for split in ("train", "val", "test") for name in ("cat", "dog")})
    (tmp_path / "test/cat/leak.png").write_bytes((tmp_path / "train/cat/0000.png").read_bytes())
    (tmp_path / "train/cat/again.png").write_bytes((tmp_path / "train/cat/0000.png").read_bytes())
    duplicates = check(tmp_path, workers=1).duplicates
    (group,) = duplicates["across"]
    assert group["names"] == ["test/cat/leak.png", "train/cat/0000.png", "train/cat/again.png"]
    assert group["places"] == ["test", "train", "train"]
    assert (duplicates["contradictory"], duplicates["repeats"]) == ([], 1)


def test_d25_a_picture_saved_again_is_the_same_image(tmp_path: Path) -> None:
    fill(tmp_path, {f"{split}/{name}": 3 for split in ("train", "test") for name in ("cat", "dog")})
    picture(0).save(tmp_path / "test/cat/saved.bmp")
    picture(0).convert("RGBA").save(tmp_path / "test/cat/thumb.tif", compression="tiff_lzw")
    picture(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "test/cat/mirrored.png")
    report = check(tmp_path, workers=1)
    (group,) = report.duplicates["across"]
    assert group["names"] == ["test/cat/saved.bmp", "test/cat/thumb.tif", "train/cat/0000.png"]
    assert (group["same"], report.duplicates["leaks_groups"], report.problems) == ("pixels", 1, [])
    assert (
        "test/cat/saved.bmp (test) = test/cat/thumb.tif (test) = train/cat/0000.png (train) (equal pixels, other bytes)"
        in rendered(report)
    )


def test_d25_fail_on_leak_makes_a_problem_of_it(tmp_path: Path) -> None:
    fill(tmp_path, {f"{split}/{name}": 3 for split in ("train", "test") for name in ("cat", "dog")})
    assert check(tmp_path, workers=1, fail_on_leak=True).problems == []
    (tmp_path / "test/cat/leak.png").write_bytes((tmp_path / "train/cat/0000.png").read_bytes())
    assert check(tmp_path, workers=1).problems == []
    assert check(tmp_path, workers=1, fail_on_leak=True).problems == [
        "No image may lie in more than one split or domain (--fail-on-leak), but 1 image does: test/cat/leak.png (test)"
        " = train/cat/0000.png (train). Remove the copies; --json lists them all."
    ]


class TestDetect:
    def test_by_what_a_path_holds(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=1)
        (tmp_path / "p" / "deep").mkdir(parents=True)
        (tmp_path / "p" / "deep" / "b.parquet").touch()
        assert detect(tmp_path / "a.npz") == "npz"
        assert detect(tmp_path) == "npz"
        assert detect(tmp_path / "p") == "parquet"
        assert detect(tmp_path / "p" / "deep" / "b.parquet") == "parquet"
        assert detect(domains(tmp_path / "images", count=1)) == "folder"
        assert detect(Path("digits")) == "digits"

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "x.tsv").touch()
        with pytest.raises(DataError) as error:
            detect(tmp_path / "x.tsv")
        assert str(error.value) == (
            "Data must be a folder, a .parquet file, a manifest (.csv, .jsonl) or an .npz file, but "
            f"{tmp_path}/x.tsv is none "
            "of these. Unpack archives into <class>/<image>."
        )
