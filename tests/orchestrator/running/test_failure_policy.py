"""S1, S4: a study's error where its disk is full or fails, whichever component noticed it."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from orchestrator.running.failure_policy import DiskError, report_disk_errors


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with 3 MiB left."""

    class Usage:
        free = 3 * 2**20

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage())


def message_of(raised: BaseException, folder: Path) -> str:
    with pytest.raises(DiskError) as error, report_disk_errors(folder):
        raise raised
    assert error.value.__cause__ is raised
    return str(error.value)


def caused(by: BaseException) -> RuntimeError:
    """As optuna does with an error of its database."""
    try:
        raise RuntimeError("An exception is raised during the commit.") from by
    except RuntimeError as error:
        return error


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_s1_a_full_disk_is_one_sentence_and_a_way_out(number: int, tmp_path: Path) -> None:
    expected = (
        f"A study writes its record to {tmp_path}, but that disk is full (3 MiB free). What was recorded is kept. Free "
        "some space and run the same command again."
    )
    assert message_of(OSError(number, os.strerror(number)), tmp_path) == expected
    assert message_of(caused(sqlite3.OperationalError("database or disk is full")), tmp_path) == expected
    assert message_of(caused(caused(OSError(number, "x"))), tmp_path) == expected


@pytest.mark.parametrize("text", ["disk I/O error", "attempt to write a readonly database"])
def test_s4_a_failing_disk_is_one_too(text: str, tmp_path: Path) -> None:
    expected = (
        f"A study writes its record to {tmp_path}, but that disk fails or is read-only. What was recorded is kept. "
        "Look at the disk (its mount, the system's log), then run the same command again."
    )
    assert message_of(caused(sqlite3.OperationalError(text)), tmp_path) == expected
    assert message_of(OSError(errno.EIO, os.strerror(errno.EIO)), tmp_path) == expected


@pytest.mark.parametrize(
    "raised",
    [OSError(errno.ENOSPC, "another disk"), OSError(errno.ENOENT, "x"), ValueError("x"), KeyboardInterrupt()],
    ids=repr,
)
def test_everything_else_passes(raised: Any, tmp_path: Path) -> None:
    with pytest.raises(type(raised)) as error, report_disk_errors(tmp_path):
        raise raised
    assert error.value is raised


def test_a_journal_that_was_removed_under_a_study_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as error, report_disk_errors(tmp_path):
        open(str(tmp_path / "journal.jsonl"), "rb")  # noqa: SIM115  # there is none
    assert str(error.value) == (
        f"A study writes its record to {tmp_path}, but the journal there has gone: it was removed or moved while the "
        "study ran. Put it back and run the same command again; without it the study starts over."
    )
