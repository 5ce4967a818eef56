"""Folder sources: layouts, and entries that are not images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.ingest.errors import DataError
from orchestrator.ingest.folder import LAYOUTS, FolderSource, scan_folder
from tests.orchestrator.ingest.pictures import domains, fill


def roles(source: FolderSource) -> set[tuple[str, str, str | None]]:
    """(domain, class, split) of the samples."""
    return {(s.domain, s.label, s.split) for s in source.samples}


def ignored(source: FolderSource) -> dict[str, str]:
    return {entry.name: entry.reason for entry in source.ignored}


class TestLayouts:
    def test_domains(self, tmp_path: Path) -> None:
        fill(tmp_path, {"photo/cat": 2, "photo/dog": 1, "sketch/cat": 1})
        source = scan_folder(tmp_path)
        assert roles(source) == {("photo", "cat", None), ("photo", "dog", None), ("sketch", "cat", None)}
        assert (len(source.samples), source.layout) == (4, "<domain>/<class>/*")
        assert source.evaluation_domains == set()

    def test_classes_alone(self, tmp_path: Path) -> None:
        fill(tmp_path, {"cat": 1, "dog": 1})
        source = scan_folder(tmp_path)
        assert roles(source) == {("id", "cat", None), ("id", "dog", None)}
        assert source.layout == "<class>/*"

    @pytest.mark.parametrize("validation", ["val", "valid", "Validation"])
    def test_splits(self, tmp_path: Path, validation: str) -> None:
        fill(tmp_path, {"train/cat": 1, f"{validation}/cat": 1, "test/dog": 1})
        source = scan_folder(tmp_path)
        assert roles(source) == {("id", "cat", "train"), ("id", "cat", "val"), ("id", "dog", "test")}
        assert source.layout == "train|val|test/<class>/*"

    @pytest.mark.parametrize("inside", ["", "train/", "photo/"])
    def test_ood_beside_any_of_them(self, tmp_path: Path, inside: str) -> None:
        fill(tmp_path, {f"{inside}cat": 1, "ood/sketch/cat": 1, "ood/art/cat": 1})
        source = scan_folder(tmp_path)
        assert source.evaluation_domains == {"sketch", "art"}
        assert {s.domain for s in source.samples} == {"photo" if inside == "photo/" else "id", "sketch", "art"}
        assert source.layout.endswith(" and ood/<domain>/<class>/*")

    def test_splits_of_domains(self, tmp_path: Path) -> None:
        fill(tmp_path, {"train/photo/cat": 1, "test/photo/cat": 1})
        assert roles(scan_folder(tmp_path)) == {("photo", "cat", "train"), ("photo", "cat", "test")}

    def test_without_train_folders_named_like_splits_are_domains(self, tmp_path: Path) -> None:
        fill(tmp_path, {"test/cat": 1, "photo/cat": 1})
        assert roles(scan_folder(tmp_path)) == {("test", "cat", None), ("photo", "cat", None)}

    def test_d15_equal_leaf_names_are_not_merged_across_depths(self, tmp_path: Path) -> None:
        fill(tmp_path, {"cats/young": 1, "dogs/young": 1, "birds": 1})
        with pytest.raises(DataError) as error:
            scan_folder(tmp_path)
        assert str(error.value) == (
            f"All images must lie equally deep, as {LAYOUTS}, but in {tmp_path} there are birds/0002.png, "
            "dogs/young/0001.png."
        )

    def test_something_beside_splits(self, tmp_path: Path) -> None:
        fill(tmp_path, {"train/cat": 1, "extra/cat": 1})
        with pytest.raises(DataError) as error:
            scan_folder(tmp_path)
        assert str(error.value) == (
            f"Beside train, val and test there may only be ood/<domain>/<class>, but {tmp_path} also has images in "
            "extra. Move them away, or into ood/."
        )

    def test_a_domain_in_both_roles(self, tmp_path: Path) -> None:
        fill(tmp_path, {"photo/cat": 1, "ood/photo/cat": 1})
        with pytest.raises(DataError) as error:
            scan_folder(tmp_path)
        assert str(error.value) == "A domain lies either in ood/ or beside it, but photo lies in both places."

    def test_no_class_folders(self, tmp_path: Path) -> None:
        fill(tmp_path, {"": 2})
        with pytest.raises(DataError) as error:
            scan_folder(tmp_path)
        assert str(error.value) == (
            f"Images must lie in folders named after their classes, but in {tmp_path} they lie directly in the root. "
            f"The layouts understood are {LAYOUTS}."
        )

    def test_files_that_are_no_images(self, tmp_path: Path) -> None:
        for name in ("a.tar", "b.tar", "labels.csv"):
            (tmp_path / name).touch()
        with pytest.raises(DataError) as error:
            scan_folder(tmp_path)
        assert str(error.value).startswith(
            f"Images must lie in folders named after their classes, but in {tmp_path} there is none, only a.tar, "
            "b.tar, labels.csv. The layouts understood are "
        )

    def test_no_images(self, tmp_path: Path) -> None:
        (tmp_path / "cat").mkdir()
        with pytest.raises(DataError, match=r"but in .* there is none"):
            scan_folder(tmp_path)


class TestEverythingElse:
    def test_d14_links_back_loops_and_special_files(self, tmp_path: Path) -> None:
        domains(tmp_path, ("photo",), 2)
        inside = tmp_path / "photo" / "ant"
        (tmp_path / "photo" / "self").symlink_to(".")
        (inside / "up").symlink_to(tmp_path)
        (inside / "again.png").symlink_to(inside / "0000.png")
        (inside / "broken.png").symlink_to("nowhere.png")
        (inside / "ring.png").symlink_to("ring.png")
        (inside / "folder.jpg").mkdir()
        os.mkfifo(inside / "pipe.jpg")
        source = scan_folder(tmp_path)
        assert len(source.samples) == 6
        assert ignored(source) == {
            "photo/ant/again.png": "a link to photo/ant/0000.png, which is read there",
            "photo/ant/broken.png": "a broken link",
            "photo/ant/folder.jpg": "a folder without images",
            "photo/ant/pipe.jpg": "a special file (pipe, socket or device)",
            "photo/ant/ring.png": "a broken link",
            "photo/ant/up": "a link to ., which is read there",
            "photo/self": "a link to photo, which is read there",
        }

    def test_links_to_the_outside_are_followed_each_folder_once(self, tmp_path: Path) -> None:
        fill(tmp_path / "elsewhere", {"cat": 2})
        root = tmp_path / "root"
        fill(root, {"dog": 1})
        (root / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
        (root / "kitten").symlink_to(tmp_path / "elsewhere" / "cat")
        source = scan_folder(root)
        assert [s.name for s in source.samples] == ["cat/0000.png", "cat/0001.png", "dog/0000.png"]
        assert ignored(source) == {"kitten": "a folder that was already read"}

    def test_d16_hidden_files_and_other_files_and_empty_classes_are_listed(self, tmp_path: Path) -> None:
        domains(tmp_path, ("photo",), 1)
        (tmp_path / ".DS_Store").touch()
        (tmp_path / "photo" / ".hidden").mkdir()
        (tmp_path / "photo" / "ant" / "Thumbs.db").touch()
        (tmp_path / "photo" / "dodo").mkdir()
        fill(tmp_path, {"": 1}, first=99)
        source = scan_folder(tmp_path)
        assert len(source.samples) == 3
        assert ignored(source) == {
            ".DS_Store": "hidden",
            "0099.png": "directly in the root, so it has no class",
            "photo/.hidden": "hidden",
            "photo/ant/Thumbs.db": "no image file by its extension",
            "photo/dodo": "a folder without images",
        }

    def test_an_empty_domain_is_reported_and_not_forgotten(self, tmp_path: Path) -> None:
        domains(tmp_path, ("photo",), 1)
        (tmp_path / "sketch" / "ant").mkdir(parents=True)
        source = scan_folder(tmp_path)
        assert source.empty_domains == ("sketch",)
        assert ignored(source) == {}

    def test_d13_odd_names_are_kept_and_shown_escaped(self, tmp_path: Path) -> None:
        folder = os.fsencode(tmp_path) + b"/photo/na\xefve \n cat"
        os.makedirs(folder)
        fill(tmp_path, {"photo/dog": 2})
        os.rename(os.fsencode(tmp_path / "photo/dog/0000.png"), folder + b"/-\xff.png")
        source = scan_folder(tmp_path)
        plain, odd = source.samples
        assert (odd.name, odd.label) == ("photo/na\\udcefve \\n cat/-\\udcff.png", "na\\udcefve \\n cat")
        assert plain.name == "photo/dog/0001.png"
        assert os.path.exists(os.path.join(tmp_path, odd.location))

    def test_the_digest_changes_with_names_sizes_and_times_only(self, tmp_path: Path) -> None:
        domains(tmp_path, ("photo",), 1)
        first = scan_folder(tmp_path).digest
        (tmp_path / "notes.txt").touch()
        assert scan_folder(tmp_path).digest == first
        os.utime(tmp_path / "photo" / "ant" / "0000.png", (1, 1))
        second = scan_folder(tmp_path).digest
        assert second != first
        (tmp_path / "photo" / "ant" / "0000.png").rename(tmp_path / "photo" / "ant" / "x.png")
        assert scan_folder(tmp_path).digest not in (first, second)
