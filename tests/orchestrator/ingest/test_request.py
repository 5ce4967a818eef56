"""Refusals before anything is read."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from orchestrator.ingest.errors import DataError
from orchestrator.ingest.pipeline import IngestRequest, ingest
from tests.orchestrator.ingest.pictures import domains


def refusal(request: IngestRequest, into: Path) -> str:
    with pytest.raises(DataError) as error:
        ingest(request, into)
    return str(error.value)


def test_a_missing_folder_suggests_similar_names(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    request = IngestRequest(source="folder", root=str(tmp_path / "pest" / "photos"))
    assert refusal(request, tmp_path) == (
        f"Data must exist, but there is nothing at {tmp_path}/pest/photos. Did you mean 'pets'?"
    )
    far = dataclasses.replace(request, root=str(tmp_path / "xyz"))
    assert refusal(far, tmp_path) == (
        f"Data must exist, but there is nothing at {tmp_path}/xyz. The folder {tmp_path} holds: pets."
    )


def test_s3_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    request = IngestRequest(source="folder", root=str(tmp_path / "x.txt"))
    assert refusal(request, tmp_path) == (
        f"The source 'folder' needs a folder, but {tmp_path}/x.txt is a file. Set data.source to what it is: "
        "parquet or npz."
    )


def test_s3_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    request = IngestRequest(source="folder", root=str(domains(tmp_path / "data")), image_size=16)
    (tmp_path / "file").touch()
    assert refusal(request, tmp_path / "file" / "stores") == (
        f"The data store needs a folder that can be written, but {tmp_path}/file/stores cannot: Not a directory. "
        "Set storage to another path."
    )
    assert refusal(request, Path("/proc/stores")).startswith(
        "The data store needs a folder that can be written, but /proc/stores cannot: "
    )


def test_s1_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Usage:
        free: int = 2**28

    request = IngestRequest(source="folder", root=str(domains(tmp_path / "data")), image_size=2048)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage())
    assert refusal(request, tmp_path / "stores") == (
        f"The data store needs 0.56 GiB, but {tmp_path}/stores has 0.25 GiB free. Free some space, set storage to "
        "another disk, or use a smaller image_size."
    )


def test_a_root_is_needed(tmp_path: Path) -> None:
    assert refusal(IngestRequest(source="npz"), tmp_path) == (
        "The source 'npz' needs data.root, the path of the images, but got none."
    )


def test_unknown_names() -> None:
    with pytest.raises(DataError) as error:
        IngestRequest(source="folders")
    assert str(error.value) == (
        "source must be one of folder, parquet, manifest, npz, digits, digits_scenes, but got 'folders'. Did you mean "
        "'folder'?"
    )
    with pytest.raises(DataError) as error:
        IngestRequest(source="digits", interpolation="cubic")
    assert str(error.value) == (
        "interpolation must be one of nearest, box, bilinear, hamming, bicubic, lanczos, but got 'cubic'. "
        "Did you mean 'bicubic'?"
    )
    with pytest.raises(DataError) as error:
        IngestRequest(source="digits", image_size=0)
    assert str(error.value) == "image_size must be at least 1 pixel, but got 0."
