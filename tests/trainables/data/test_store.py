"""Reading a store: memory-mapped views, pickled as a path, damage detected."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.support.synthetic import shapes, write_shapes
from trainables.data.store import Store, StoreError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "store")


def test_contents_equal_what_was_written(folder: Path) -> None:
    store = Store(folder)
    memory = shapes()
    assert (store.classes, store.domains, store.splits) == (memory.classes, memory.domains, memory.splits)
    assert store.image_size == memory.image_size
    for split in memory.splits:
        assert np.array_equal(store.images(split), memory.images(split))
        assert np.array_equal(store.labels(split), memory.labels(split))
        assert np.array_equal(store.domain_ids(split), memory.domain_ids(split))
    assert store.names("val")[:2] == ["val/0", "val/1"]
    assert store.labels("train").dtype == store.domain_ids("train").dtype == np.int64


def test_pixels_are_a_read_only_view_and_the_same_one_every_time(folder: Path) -> None:
    store = Store(folder)
    images = store.images("train")
    assert images is store.images("train")
    assert not images.flags.owndata
    assert not images.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        store.labels("train")[0] = 1


def test_it_pickles_as_its_path_even_when_it_is_open(folder: Path) -> None:
    store = Store(folder)
    store.images("train")
    data = pickle.dumps(store)
    assert len(data) < 300
    again = pickle.loads(data)  # noqa: S301 - our own
    assert again.path == store.path
    assert np.array_equal(again.images("val"), store.images("val"))


def test_files_are_opened_at_first_use(tmp_path: Path) -> None:
    store = Store(tmp_path / "later")
    write_shapes(tmp_path / "later")
    assert store.splits[0] == "train"


def test_pages_are_shared_and_not_copied_into_a_process(tmp_path: Path) -> None:
    """Reading 60 MB of pixels grows the process by file-backed pages only."""
    folder = tmp_path / "big"
    script = f"""
import json, re
from pathlib import Path
import numpy as np, pyarrow as pa
from trainables.data.store import Store
folder = Path({str(folder)!r}); folder.mkdir()
side, count = 100, 2000
pixels = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(count * side * side * 3, np.uint8)), side * side * 3)
zeros = np.zeros(count, np.int64)
batch = pa.record_batch([pixels, zeros, zeros, [""] * count], names=["image", "label", "domain", "name"])
with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
    writer.write_batch(batch)
size = (folder / "data.arrow").stat().st_size
(folder / "manifest.json").write_text(json.dumps(dict(
    format=1, sha256="", bytes=size, image_size=side, classes=["a"], domains=["id"], splits=["train"])))
del pixels, batch
private = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
shared = lambda: int(re.search(r"RssFile:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
store = Store(folder); store.splits
before = private(), shared()
total = int(sum(chunk.sum() for chunk in np.array_split(store.images("train"), 50)))
print(total, private() - before[0], shared() - before[1])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    total, private, shared = map(int, run.stdout.split())
    assert total == 2000 * 100 * 100 * 3
    assert private < 15_000  # KiB
    assert shared > 55_000


def test_fraction_counts_a_prefix(folder: Path) -> None:
    store = Store(folder)
    assert store.fraction("train", 1.0) == 64
    assert store.fraction("train", 0.25) == 16
    assert store.fraction("train", 0.001) == len(store.classes)


def test_unknown_split(folder: Path) -> None:
    with pytest.raises(ValueError) as error:
        Store(folder).images("trian")
    assert str(error.value) == "A split is one of train, val, test, ood/inverted, ood/noisy, but got 'trian'."


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as error:
        _ = Store(tmp_path).classes
    assert str(error.value) == (
        f"A data store is a folder with data.arrow and manifest.json, but {tmp_path} is none. Run the study again."
    )


def test_another_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(StoreError) as error:
        _ = Store(folder).classes
    assert str(error.value) == (
        f"A data store of format 1 is needed, but {folder} has format 99. "
        f"Delete {folder}: the next run reads the data again."
    )


def test_a_truncated_file_is_detected_when_it_is_opened(folder: Path) -> None:
    data = folder / "data.arrow"
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    with pytest.raises(StoreError) as error:
        _ = Store(folder).classes
    assert str(error.value) == (
        f"{data} must have {len(content)} bytes, but it has {len(content) - 100}. "
        f"Delete {folder}: the next run reads the data again."
    )


def test_verify_detects_a_flipped_bit(folder: Path) -> None:
    Store(folder).verify()
    data = bytearray((folder / "data.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "data.arrow").write_bytes(bytes(data))
    with pytest.raises(StoreError, match="the file is damaged"):
        Store(folder).verify()
