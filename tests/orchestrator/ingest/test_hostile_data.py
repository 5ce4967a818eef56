"""Malicious and damaged data: an unreadable file costs a sample or the run, never the driver."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.ingest.decoding import DecodeJob, decode_all
from orchestrator.ingest.errors import DataError
from orchestrator.ingest.folder import scan_folder
from orchestrator.ingest.images import FORMATS
from orchestrator.ingest.npz import scan_npz
from orchestrator.ingest.parquet import Table, encoded_images, scan_parquet
from orchestrator.ingest.worker import MEMORY_LIMIT
from tests.orchestrator.ingest.pictures import domains, encoded, picture
from trainables.data.store import Store

GREEDY = f"""
from orchestrator.ingest import images, worker
images._convert = lambda *arguments: bytearray({MEMORY_LIMIT})
worker.main()
"""


def reasons(root: Path) -> dict[str, str | None]:
    """Name → reason for quarantine, for every image of a folder."""
    source = scan_folder(root)
    outcomes = decode_all(source, range(len(source.samples)), DecodeJob(16, "nearest"), workers=1)
    return {source.samples[i].name: outcome.reason for i, outcome in outcomes.items()}


CURIOUS = """
import os
from orchestrator.ingest import images, worker
def report(*arguments):
    names = ("HF_TOKEN", "DB_PASSWORD", "LANG")
    raise images.BadImageError(" ".join(f"{name}={os.environ.get(name)}" for name in names))
images._convert = report
worker.main()
"""


def replace_decoder(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make decoder processes run this script."""
    real = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return real([command[0], "-c", script], **options)

    monkeypatch.setattr(subprocess, "Popen", start)


def test_c9_a_compromised_decoder_has_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "DB_PASSWORD", "LANG"):
        monkeypatch.setenv(name, "planted-7f3a")
    replace_decoder(monkeypatch, CURIOUS)
    texts = reasons(domains(tmp_path, ("photo",), 1))
    assert set(texts.values()) == {"HF_TOKEN=None DB_PASSWORD=None LANG=planted-7f3a"}


def test_d9_the_memory_of_a_decoder_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_decoder(monkeypatch, GREEDY)
    assert set(reasons(domains(tmp_path, ("photo",), 1)).values()) == {"needs more memory than a decoder may take"}


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX", "SGI", "IM", "SPIDER", "MSP"])
def test_d10_a_format_that_is_not_on_the_list_is_not_opened_under_another_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow calls Ghostscript for EPS, which executes the file as a program."""
    trap = tmp_path / "gs"
    trap.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\n")
    trap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    root = domains(tmp_path / "data", ("photo",), 1)
    image = picture(7, 32, 32)
    content = encoded(image.convert({"MSP": "1", "SPIDER": "F"}.get(kind, "RGB")), kind)
    (root / "photo" / "ant" / "evil.jpg").write_bytes(content)
    (root / "photo" / "ant" / "evil.eps").write_bytes(content)
    texts = reasons(root)
    for name in ("photo/ant/evil.jpg", "photo/ant/evil.eps"):
        assert str(texts.pop(name)).startswith(f"not a picture ({', '.join(FORMATS)}): it begins with ")
    assert set(texts.values()) == {None}
    assert not (tmp_path / "started").exists()


def test_d10_a_format_is_recognised_by_content_and_not_by_extension(tmp_path: Path) -> None:
    root = domains(tmp_path, ("photo",), 1)
    (root / "photo" / "ant" / "png.jpg").write_bytes(encoded(picture(8)))
    (root / "photo" / "ant" / "svg.png").write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    texts = reasons(root)
    assert texts["photo/ant/png.jpg"] is None
    assert str(texts["photo/ant/svg.png"]).startswith("not a picture")


def test_d7_a_multi_picture_jpeg_counts_once(tmp_path: Path) -> None:
    root = domains(tmp_path, ("photo",), 1)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    (root / "photo" / "ant" / "two.mpo").write_bytes(encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    source = scan_folder(root)
    outcomes = decode_all(source, range(4), DecodeJob(16, "nearest"), workers=1)
    (notes,) = [o.notes for i, o in outcomes.items() if source.samples[i].name.endswith(".mpo")]
    assert notes == ("animated",)


@pytest.mark.parametrize("path", ["../../secret.png", "/etc/passwd", "http://127.0.0.1:9/x.png", "file:///etc/passwd"])
def test_d29_a_path_in_a_table_is_not_followed(path: str, tmp_path: Path) -> None:
    """Hugging Face's tables may name a file in place of its bytes; here a row without bytes has no image."""
    (tmp_path / "secret.png").write_bytes(encoded(picture(1)))
    rows = [{"bytes": encoded(picture(n)), "path": f"{n}.png"} for n in range(3)] + [{"bytes": None, "path": path}]
    (tmp_path / "a" / "b").mkdir(parents=True)
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 0, 1]}), tmp_path / "a" / "b" / "x.parquet")
    source = scan_parquet(tmp_path / "a" / "b" / "x.parquet")
    outcomes = decode_all(source, range(4), DecodeJob(16, "nearest"), workers=1)
    assert [outcome.reason for outcome in outcomes.values()] == [
        *[None] * 3,
        "the row has no image bytes (paths are not followed)",
    ]


def read_all(path: Path) -> list[tuple[str, bytes | None]] | None:
    """Label and image of each row (None = damaged); None = the table is refused."""
    try:
        source = scan_parquet(path)
    except DataError:
        return None
    images: list[bytes | None] = []
    with contextlib.suppress(pa.ArrowException, OSError, ValueError):  # as the decoder process does
        images += encoded_images(str(path), source.columns[0], 0, range(len(source.samples)))
    images += [None] * (len(source.samples) - len(images))
    return [(sample.label, image) for sample, image in zip(source.samples, images, strict=True)]


def mutants(content: bytes, count: int, first: int, end: int) -> Iterator[bytes]:
    """The content with one bit flipped at one of the bytes from `first` to `end`, `count` times."""
    generator = random.Random(0)
    for _ in range(count):
        changed = bytearray(content)
        changed[generator.randrange(first, end)] ^= 1 << generator.randrange(8)
        yield bytes(changed)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A Parquet file of six images of two classes, with checksums."""
    path = tmp_path / "x.parquet"
    content = pa.table(
        {"image": [encoded(picture(n)) for n in range(6)], "label": [f"class {n % 2}" for n in range(6)]}
    )
    pq.write_table(content, path, write_page_checksum=True)
    return path


def test_d22_a_flipped_bit_in_a_table_with_checksums_is_always_detected(table: Path) -> None:
    content = table.read_bytes()
    intact = read_all(table)
    assert intact is not None
    footer = int.from_bytes(content[-8:-4], "little")
    wrong = 0
    for mutant in mutants(content, 200, 4, len(content) - 8 - footer):
        table.write_bytes(mutant)
        rows = read_all(table) or [(label, None) for label, _ in intact]
        assert [label for label, _ in rows] == [label for label, _ in intact]
        wrong += sum(image not in (None, original) for (_, image), (_, original) in zip(rows, intact, strict=True))
    assert wrong == 0


def test_d22_a_damaged_footer_raises_nothing_but_data_errors(table: Path) -> None:
    """A footer has no checksum: damage can change names, types and row counts."""
    content = table.read_bytes()
    refused = 0
    footer = int.from_bytes(content[-8:-4], "little")
    for mutant in mutants(content, 600, len(content) - 8 - footer, len(content)):
        table.write_bytes(mutant)
        refused += read_all(table) is None
    assert 0 < refused < 600, "some bits of a footer make a table unreadable, some do not"


def test_d22_a_wrong_row_count_in_the_footer_is_an_error(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Table, "group_sizes", [7])
    with pytest.raises(DataError) as error:
        scan_parquet(table)
    assert str(error.value) == "The column 'label' of x.parquet is damaged: 6 values for 7 rows."


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_d22_a_damaged_npz_file_raises_nothing_but_data_errors(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    generator = random.Random(0)
    outcomes = Counter[str]()
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    save(path, train_images=pixels, train_labels=np.arange(12) % 2)
    content = path.read_bytes()
    for _ in range(150):
        changed = bytearray(content)
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        try:
            decoded = np.concatenate([block for _, block in scan_npz(path).arrays()])
        except DataError as error:
            outcomes["refused" if "x.npz" in str(error) else "refused without a name"] += 1
        else:
            outcomes["same" if np.array_equal(decoded, pixels) else "wrong"] += 1
    assert outcomes["refused"] > 100
    assert set(outcomes) <= {"refused", "same"}


def test_d28_a_tar_archive_is_no_source(tmp_path: Path) -> None:
    """WebDataset shards may contain pickles; there is no reader for them."""
    from orchestrator.ingest.check import check

    (tmp_path / "x.tar").write_bytes(b"x")
    with pytest.raises(DataError) as error:
        check(tmp_path / "x.tar")
    assert str(error.value) == (
        "Data must be a folder, a .parquet file, a manifest (.csv, .jsonl) or an .npz file, but "
        f"{tmp_path}/x.tar is none "
        "of these. Unpack archives into <class>/<image>."
    )


def test_d27_a_store_does_not_need_its_source(tmp_path: Path) -> None:
    """Trials read the store; the source may be removed once it is written."""
    from tests.orchestrator.ingest.pictures import read

    root = domains(tmp_path / "data", count=6)
    store = read(root, tmp_path / "stores")
    before = store.images("train").copy()
    shutil.rmtree(root)
    assert (Store(store.path).images("train") == before).all()
