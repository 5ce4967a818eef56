"""S2: the disk of the tracking store is full, the journal's is not."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.record.journal import Journal
from orchestrator.tracking.follower import MlflowFollower
from orchestrator.tracking.writer import MlflowWriter
from tests.orchestrator.tracked import contents, write_study


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB with an empty tracking database."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    MlflowWriter(f"sqlite:///{place}/mlflow.db", "template", "none")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def follower(journal: Journal, folder: Path) -> MlflowFollower:
    return MlflowFollower(
        journal.path, f"sqlite:///{folder}/mlflow.db", "pets", "pets", (folder / "artifacts").as_uri(), poll=0.02
    )


def test_s2_a_full_disk_of_the_tracking_store_costs_nothing_and_is_caught_up_with(
    small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "whole"
    other.mkdir()
    filler = small_disk / "filler"
    assert subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], capture_output=True).returncode == 1
    with Journal(tmp_path / "journal.jsonl") as journal:
        with caplog.at_level(logging.WARNING), follower(journal, small_disk) as full:
            write_study(journal)
            assert full.close(3) > 0
            assert "disk is full" in str(full.problem) or "No space left" in str(full.problem)
        assert caplog.text.count("MLflow does not take the record") == 1
        filler.unlink()
        with follower(journal, small_disk) as again:
            assert again.close(60) == 0
        MlflowWriter(f"sqlite:///{other}/mlflow.db", "template", "none")
        with follower(journal, other) as undisturbed:
            assert undisturbed.close(60) == 0
    found, expected = contents(small_disk / "mlflow.db", "pets"), contents(other / "mlflow.db", "pets")
    for part in ("runs", "metrics", "params", "tags"):
        assert found[part] == expected[part], part
