"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import pytest

from trainables.storage import atomic_files

Record = list[tuple[str, str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Record:
    """What reaches the disk, in order: (call, name of the file or folder)."""
    made: Record = []
    opened: dict[int, str] = {}
    really_open, really_sync, really_replace = os.open, os.fsync, os.replace

    def noted_open(path: str | Path, flags: int) -> int:
        descriptor = really_open(path, flags)
        opened[descriptor] = Path(path).name
        return descriptor

    def noted_sync(descriptor: int) -> None:
        made.append(("fsync", opened[descriptor]))
        really_sync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        made.append(("replace", target.name))
        really_replace(source, target)

    monkeypatch.setattr(os, "open", noted_open)
    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return made


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_block_is_over(
    tmp_path: Path, calls: Record
) -> None:
    with atomic_files.atomic_file(tmp_path / "a.bin") as written:
        written.write_bytes(b"new")
        hidden = written.name
    assert calls == [("fsync", hidden), ("replace", "a.bin"), ("fsync", tmp_path.name)]
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_every_file_of_a_folder_is_on_the_disk_before_the_folder_has_its_name(tmp_path: Path, calls: Record) -> None:
    with atomic_files.atomic_folder(tmp_path / "made") as written:
        (written / "one").write_text("1")
        (written / "two").write_text("2")
        hidden = written.name
    assert sorted(calls[:2]) == [("fsync", "one"), ("fsync", "two")]
    assert calls[2:] == [("fsync", hidden), ("replace", "made"), ("fsync", tmp_path.name)]


def test_a_block_that_raises_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with contextlib.suppress(RuntimeError), atomic_files.atomic_file(tmp_path / "a.json") as file:
        file.write_text("half")
        raise RuntimeError
    with contextlib.suppress(RuntimeError), atomic_files.atomic_folder(tmp_path / "folder") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old"}


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_files.write_text(tmp_path / "a.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old"}


def test_text_replaces_text(tmp_path: Path) -> None:
    for text in ("one", "zwei – 2"):
        atomic_files.write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_bytes() == "zwei – 2".encode()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_takes_the_place_of_an_empty_one_and_of_no_other(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for text in ("first", "second"):
        try:
            with atomic_files.atomic_folder(place) as written:
                (written / "file").write_text(text)
        except OSError:
            assert text == "second"
    assert (place / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [place]


def test_what_is_published_may_be_read_by_whom_the_user_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_files.write_text(tmp_path / "file", "text")
        with atomic_files.atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"file": 0o640, "folder": 0o750}
