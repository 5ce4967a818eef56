"""S3: a place that takes no files is found before anything is spent."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator import Study
from orchestrator.cli import app
from orchestrator.commands.exit_status import PREFLIGHT
from orchestrator.errors import PreflightError
from orchestrator.planning.preflight import preflight
from orchestrator.study_file.yaml_text import write_yaml

FIELDS: dict[str, Any] = {
    "name": "s", "data": {"source": "digits"}, "model": {"name": "digits_cnn"}, "strategies": ["linear_probe"],
    "search": {"trials": 1},
}  # fmt: skip


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that was mounted to be read."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_s3_a_disk_that_is_read_only(read_only: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(write_yaml({**FIELDS, "storage": str(read_only / "studies")}))
    for command in ("plan", "run"):
        done = CliRunner().invoke(app, [command, str(file)])
        assert done.exit_code == PREFLIGHT
        assert f"storage: nothing can be written to {read_only} by this user. Choose another path." in done.stderr, (
            done.stderr
        )


def test_s3_a_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root nothing is forbidden, so the answer is given here."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **o: Path(path) != tmp_path and real(path, mode, **o))
    with pytest.raises(PreflightError) as error:
        preflight(Study(**FIELDS, storage=str(tmp_path / "a" / "b")).spec)
    assert str(error.value) == (
        f"The study 's' cannot run here: storage: nothing can be written to {tmp_path} by this user. Choose another "
        "path."
    )


def test_s3_a_journal_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "s" / "journal.jsonl"
    journal.parent.mkdir()
    journal.touch()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **o: Path(path) != journal and real(path, mode, **o))
    with pytest.raises(PreflightError) as error:
        preflight(Study(**FIELDS, storage=str(tmp_path)).spec)
    assert str(error.value) == (
        f"The study 's' cannot run here: storage: the study goes on in {journal}, which this user cannot read and "
        "write. Mend its permissions, or choose another name."
    )
