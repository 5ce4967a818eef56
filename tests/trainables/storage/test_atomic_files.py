"""Atomic, durable writes of files and folders."""

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
    """System calls in order: (call, name of the file or folder)."""
    recorded: Record = []
    opened: dict[int, str] = {}
    real_open = os.open
    real_fsync = os.fsync
    real_replace = os.replace

    def recording_open(path: str | Path, flags: int) -> int:
        descriptor = real_open(path, flags)
        opened[descriptor] = Path(path).name
        return descriptor

    def recording_fsync(descriptor: int) -> None:
        recorded.append(("fsync", opened[descriptor]))
        real_fsync(descriptor)

    def recording_replace(source: Path, target: Path) -> None:
        recorded.append(("replace", target.name))
        real_replace(source, target)

    monkeypatch.setattr(os, "open", recording_open)
    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    return recorded


def test_a_file_is_synced_then_renamed_then_its_folder_synced(tmp_path: Path, calls: Record) -> None:
    with atomic_files.atomic_file(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"new")
        hidden = temporary.name
    assert calls == [("fsync", hidden), ("replace", "a.bin"), ("fsync", tmp_path.name)]
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_the_files_of_a_folder_are_synced_before_it_is_renamed(tmp_path: Path, calls: Record) -> None:
    with atomic_files.atomic_folder(tmp_path / "made") as temporary:
        (temporary / "one").write_text("1")
        (temporary / "two").write_text("2")
        hidden = temporary.name
    assert sorted(calls[:2]) == [("fsync", "one"), ("fsync", "two")]
    assert calls[2:] == [("fsync", hidden), ("replace", "made"), ("fsync", tmp_path.name)]


def test_a_block_that_raises_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with contextlib.suppress(RuntimeError), atomic_files.atomic_file(tmp_path / "a.json") as file:
        file.write_text("half")
        raise RuntimeError
    with contextlib.suppress(RuntimeError), atomic_files.atomic_folder(tmp_path / "folder") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old"}


def test_a_refused_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_folder_replaces_an_empty_one_only(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for text in ("first", "second"):
        try:
            with atomic_files.atomic_folder(target) as temporary:
                (temporary / "file").write_text(text)
        except OSError:
            assert text == "second"
    assert (target / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_files.write_text(tmp_path / "file", "text")
        with atomic_files.atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"file": 0o640, "folder": 0o750}
