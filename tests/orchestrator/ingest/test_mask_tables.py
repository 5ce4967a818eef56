"""Pictures with masks from Parquet files and manifests; a table that a study of another task reads."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from orchestrator.ingest.check import check, detect, detect_task
from orchestrator.ingest.errors import DataError
from orchestrator.ingest.label_map import mask_request
from orchestrator.ingest.pipeline import IngestRequest, ingest
from orchestrator.ingest.request import scan
from tests.support.masked import boxes, photo, save, write_pairs
from trainables.data.store import Store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(file: Path, count: int = 8, mask: str = "mask", struct: bool = False, **columns: Any) -> Path:
    """Pictures of 32 x 32 with a square of class 1 of 144 pixels, in row groups of 3."""
    labels = boxes(32, 32, (10, 10, 22, 22, 1))
    images = [encoded(photo(labels, number)) for number in range(count)]
    masks = [encoded(Image.fromarray(labels))] * count
    table: dict[str, Any] = {"image": images, mask: masks, **columns}
    if struct:
        table |= {name: [{"bytes": data, "path": None} for data in table[name]] for name in ("image", mask)}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), file, row_group_size=3)
    return file


def write_manifest(root: Path, name: str, rows: Sequence[dict[str, str]]) -> Path:
    """A manifest beside the pictures."""
    file = root / name
    if name.endswith(".csv"):
        columns = list(rows[0])
        lines = [",".join(columns), *(",".join(row[column] for column in columns) for row in rows)]
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def read(root: Path, into: Path, source: str, column: str | None = None) -> Store:
    request = IngestRequest(source=source, root=str(root), masks=mask_request(None, None, column))
    return ingest(request, into, workers=1)


class TestParquet:
    @pytest.mark.parametrize("struct", [False, True])
    def test_rows_become_pairs(self, tmp_path: Path, struct: bool) -> None:
        file = write_parquet(tmp_path / "data" / "a.parquet", struct=struct, split=["train"] * 5 + ["val"] * 3)
        made = check(file, workers=1)
        assert made.problems == []
        assert (made.task, made.images, made.splits) == ("segmentation", 8, {"train": 5, "val": 3})
        assert made.masks is not None
        assert made.masks.total == {"0": 7040, "1": 1152}
        store = read(file, tmp_path / "stores", "parquet")
        labels = boxes(32, 32, (10, 10, 22, 22, 1))
        for split in store.splits:
            for name, picture, mask in zip(store.names(split), store.pictures(split), store.masks(split), strict=True):
                number = int(name.rpartition("#")[2])
                assert np.array_equal(picture, np.asarray(photo(labels, number)))
                assert np.array_equal(mask, labels)

    def test_the_mask_column(self, tmp_path: Path) -> None:
        file = write_parquet(tmp_path / "a.parquet", mask="trimap")
        with pytest.raises(DataError, match="needs a mask column"):
            check(file, workers=1, task="segmentation")
        made = check(file, workers=1, masks=mask_request(None, None, "trimap"))
        assert made.layout == "1 Parquet file, image column image, mask column trimap"
        with pytest.raises(DataError, match=r"The mask column is 'trimp' \(data.mask\).* Did you mean 'trimap'\?"):
            check(file, workers=1, masks=mask_request(None, None, "trimp"))
        labelled = write_parquet(tmp_path / "b.parquet", mask="label")
        assert check(labelled, workers=1).task == "segmentation"

    def test_a_classification_of_pictures_with_masks_is_refused(self, tmp_path: Path) -> None:
        file = write_parquet(tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"\(columns image and mask\). Set task: segmentation"):
            scan(IngestRequest(source="parquet", root=str(file)))

    def test_a_file_with_classes_and_masks_serves_both(self, tmp_path: Path) -> None:
        file = write_parquet(tmp_path / "a.parquet", label=["cat", "dog"] * 4)
        assert detect_task(file, "parquet") == "classification"
        assert {sample.label for sample in scan(IngestRequest(source="parquet", root=str(file))).samples} == {
            "cat", "dog",
        }  # fmt: skip
        assert check(file, workers=1, task="segmentation").classes == ["0", "1"]

    def test_a_row_without_a_mask_is_left_out(self, tmp_path: Path) -> None:
        labels = boxes(32, 32, (10, 10, 22, 22, 1))
        masks: list[bytes | None] = [encoded(Image.fromarray(labels))] * 8
        masks[4] = None
        images = [encoded(photo(labels, number)) for number in range(8)]
        pq.write_table(pa.table({"image": images, "mask": masks}), tmp_path / "a.parquet", row_group_size=3)
        store = read(tmp_path / "a.parquet", tmp_path / "stores", "parquet")
        (entry,) = store.manifest["quarantine"]
        assert entry["name"] == "a.parquet#4"
        assert entry["reason"].startswith("mask 1: the row has no image bytes")
        assert sum(store.manifest["counts"].values()) == 7


class TestManifest:
    @pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl"])
    def test_rows_become_pairs(self, tmp_path: Path, name: str) -> None:
        root = write_pairs(tmp_path / "data", values=(0, 1, 2))
        rows = [
            {"image": f"images/{n:03d}.png", "mask": f"masks/{n:03d}.png", "split": "val" if n > 4 else "train"}
            for n in range(8)
        ]
        file = write_manifest(root, name, rows)
        assert detect(file) == "manifest"
        made = check(file, workers=1)
        assert (made.task, made.source, made.splits) == ("segmentation", "manifest", {"train": 5, "val": 3})
        assert made.masks is not None
        assert made.masks.total == {"0": 7040, "1": 576, "2": 576}
        store = read(file, tmp_path / "stores", "manifest")
        assert store.manifest["counts"] == {"train": 4, "val": 3, "test": 1}
        with Image.open(root / store.names("val")[0]) as image:
            assert np.array_equal(store.pictures("val")[0], np.asarray(image))

    def test_pairs_need_no_common_name_and_a_mask_may_serve_twice(self, tmp_path: Path) -> None:
        labels = boxes(32, 32, (10, 10, 22, 22, 1))
        rows = []
        for number, domain in enumerate("aaaabbbb"):
            save(photo(labels, number), tmp_path / f"{number}.jpg")
            rows.append({"picture": f"{number}.jpg", "mask": "one.png", "domain": domain})
        save(labels, tmp_path / "one.png")
        made = check(write_manifest(tmp_path, "pairs.csv", rows), workers=1)
        assert made.problems == []
        assert {domain: sum(counts.values()) for domain, counts in made.domains.items()} == {"a": 4, "b": 4}

    def test_a_label_file_beside_it(self, tmp_path: Path) -> None:
        root = write_pairs(tmp_path, values=(0, 1))
        (root / "_classes.csv").write_text("Pixel Value, Class\n1, vessel\n0, background\n")
        rows = [{"image": f"images/{n:03d}.png", "mask": f"masks/{n:03d}.png"} for n in range(8)]
        assert check(write_manifest(root, "p.csv", rows), workers=1).classes == ["background", "vessel"]

    def test_rows_with_problems(self, tmp_path: Path) -> None:
        root = write_pairs(tmp_path, count=4)
        good = {"image": "images/000.png", "mask": "masks/000.png"}
        with pytest.raises(DataError, match=r"1 path of p.csv does not: masks/009.png"):
            check(write_manifest(root, "p.csv", [good, {"image": "images/001.png", "mask": "masks/009.png"}]))
        with pytest.raises(DataError, match=r"images/000.png stands in rows 1 and 2"):
            check(write_manifest(root, "p.csv", [good, good]))
        with pytest.raises(DataError, match=r"the column 'mask', but in p.csv 1 row has none: row 2"):
            check(write_manifest(root, "p.csv", [good, {"image": "images/001.png", "mask": ""}]))
        with pytest.raises(DataError, match=r"The column 'split' must hold .* also holds fold1"):
            check(write_manifest(root, "p.csv", [{**good, "split": "fold1"}]))
        with pytest.raises(DataError, match=r"needs a picture column, called image or picture"):
            check(write_manifest(root, "p.csv", [{"a": "b", "mask": "masks/000.png"}]))

    def test_classes_instead_of_masks(self, tmp_path: Path) -> None:
        root = write_pairs(tmp_path, count=8)
        rows = [{"image": f"images/{n:03d}.png", "label": "ab"[n % 2]} for n in range(8)]
        made = check(write_manifest(root, "p.csv", rows), workers=1)
        assert (made.task, made.classes, made.problems) == ("classification", ["a", "b"], [])
        pairs = [{"image": f"images/{n:03d}.png", "mask": f"masks/{n:03d}.png"} for n in range(8)]
        with pytest.raises(DataError, match="Set task: segmentation"):
            scan(IngestRequest(source="manifest", root=str(write_manifest(root, "q.csv", pairs))))
