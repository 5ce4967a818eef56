"""Verification of a store before a run: small stores always, large ones once per machine."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from orchestrator.ingest import pipeline
from orchestrator.ingest.pipeline import IngestRequest, ingest
from tests.orchestrator.ingest.pictures import domains
from trainables.data.store import DATA, MANIFEST, Store, StoreError


@pytest.fixture
def request_(tmp_path: Path) -> IngestRequest:
    root = domains(tmp_path / "data")
    return IngestRequest(source="folder", root=str(root), image_size=16, interpolation="bilinear")


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The stores whose whole file was hashed, in order."""
    paths: list[Path] = []
    real_verify = Store.verify

    def verify(store: Store) -> None:
        paths.append(store.path)
        real_verify(store)

    monkeypatch.setattr(Store, "verify", verify)
    return paths


def flip_a_bit(store: Store, keep_time: bool = False) -> None:
    """Damage a pixel; `keep_time` = without a new modification time, as a failing disk does."""
    file = store.path / DATA
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    times = (before.st_atime_ns, before.st_mtime_ns if keep_time else before.st_mtime_ns + 1_000_000_000)
    os.utime(file, ns=times)


def test_a_damaged_store_is_an_error_with_the_way_out(tmp_path: Path, request_: IngestRequest) -> None:
    store = ingest(request_, tmp_path / "stores", workers=1)
    flip_a_bit(store, keep_time=True)
    actual = hashlib.sha256((store.path / DATA).read_bytes()).hexdigest()
    with pytest.raises(StoreError) as error:
        ingest(request_, tmp_path / "stores", workers=1)
    assert str(error.value) == (
        f"{store.path / DATA} must have the SHA-256 {store.digest}, but it has {actual}: the file is damaged. "
        f"Delete {store.path}: the next run reads the data again."
    )


def test_s6_a_changed_name_in_the_manifest_is_detected(tmp_path: Path, request_: IngestRequest) -> None:
    store = ingest(request_, tmp_path / "stores", workers=1)
    manifest = store.path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"bee"', '"bed"'))
    with pytest.raises(StoreError) as error:
        ingest(request_, tmp_path / "stores", workers=1)
    assert str(error.value) == (
        f"{manifest} must agree with data.arrow, but they differ in classes: the manifest is damaged. Delete "
        f"{store.path}: the next run reads the data again."
    )


def test_a_small_store_is_verified_before_every_run(
    tmp_path: Path, request_: IngestRequest, verified: list[Path]
) -> None:
    store = ingest(request_, tmp_path / "stores", workers=1)
    assert verified == [], "hashed when it was written"
    for _ in range(2):
        ingest(request_, tmp_path / "stores", workers=1)
    assert verified == [store.path] * 2


def test_a_large_store_is_verified_once_for_each_state_of_its_file(
    tmp_path: Path, request_: IngestRequest, verified: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "ALWAYS_VERIFIED_BYTES", 1000)
    store = ingest(request_, tmp_path / "stores", workers=1)
    ingest(request_, tmp_path / "stores", workers=1)
    assert verified == []
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "another machine"))
    for _ in range(2):
        ingest(request_, tmp_path / "stores", workers=1)
    assert verified == [store.path]
    flip_a_bit(store)
    for _ in range(2):
        with pytest.raises(StoreError, match="the file is damaged"):
            ingest(request_, tmp_path / "stores", workers=1)
    assert verified == [store.path] * 3
