"""S2: the disk of the tracking store is full, the journal's is not."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.record.journal import Journal
from orchestrator.tracking.writer import MlflowWriter
from tests.support.tracking import contents, follower, tracking_process, write_study


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB with an empty tracking database."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    MlflowWriter(f"sqlite:///{folder}/mlflow.db", "template", "none")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_s2_a_full_disk_of_the_tracking_store_costs_nothing_and_is_caught_up_with(
    small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "whole"
    other.mkdir()
    filler = small_disk / "filler"
    assert subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True).returncode == 1
    with Journal(tmp_path / "journal.jsonl") as journal:
        with caplog.at_level(logging.WARNING), tracking_process(journal.path, small_disk / "mlflow.db") as full:
            write_study(journal)
            assert full.close(20) > 0
            assert "disk is full" in str(full.problem) or "No space left" in str(full.problem)
        assert caplog.text.count("MLflow does not take the record") == 1
        filler.unlink()
        assert follower(journal.path, small_disk / "mlflow.db").finish(60) == 0
        MlflowWriter(f"sqlite:///{other}/mlflow.db", "template", "none")
        assert follower(journal.path, other / "mlflow.db").finish(60) == 0
    after = contents(small_disk / "mlflow.db", "pets")
    expected = contents(other / "mlflow.db", "pets")
    for part in ("runs", "metrics", "params", "tags"):
        assert after[part] == expected[part], part
