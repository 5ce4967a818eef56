"""Parquet sources: choice of columns, refusals, and that no code of a file is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.ingest.errors import DataError
from orchestrator.ingest.parquet import scan_parquet
from tests.orchestrator.ingest.pictures import encoded, picture, read

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(count: int, first: int = 0, side: int = 16) -> list[bytes]:
    return [encoded(picture(first + i, side, side)) for i in range(count)]


def hf(data: list[bytes]) -> pa.Array:
    """Images as Hugging Face's `datasets` writes them."""
    return pa.array([{"bytes": d, "path": f"{i}.png"} for i, d in enumerate(data)], HF_IMAGE)


def write(path: Path, metadata: dict[str, str] | None = None, **columns: Any) -> Path:
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=10, write_page_checksum=True)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        scan_parquet(path)
    return str(error.value)


class TestReading:
    @pytest.mark.parametrize("kind", ["struct", "bytes", "large"])
    def test_pixels_and_labels_arrive_across_row_groups(self, tmp_path: Path, kind: str) -> None:
        data = images(24)
        column = {"struct": hf(data), "bytes": pa.array(data), "large": pa.array(data, pa.large_binary())}[kind]
        names = [f"class {i % 3}" for i in range(24)]
        store = read(write(tmp_path / "x.parquet", image=column, label=names), tmp_path / "stores", "parquet")
        assert store.classes == ["class 0", "class 1", "class 2"]
        rows = []
        for split in store.splits:
            for name, label, pixels in zip(store.names(split), store.labels(split), store.images(split), strict=True):
                row = int(name.removeprefix("x.parquet#"))
                rows.append(row)
                assert label == row % 3
                assert np.array_equal(pixels, np.asarray(picture(row, 16, 16)))
        assert sorted(rows) == list(range(24))

    def test_domains_and_splits_from_columns(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "x.parquet",
            img=images(16),
            label=[0, 1] * 8,
            domain=["photo"] * 12 + ["art"] * 4,
            split=(["train"] * 6 + ["validation"] * 2 + ["test"] * 4 + ["test"] * 4),
        )
        store = read(path, tmp_path / "stores", "parquet", ood=("art",))
        assert store.manifest["counts"] == {"train": 6, "val": 2, "test": 4, "ood/art": 4}
        assert store.domains == ["photo", "art"]

    def test_splits_from_the_names_of_shards_and_class_names_from_hugging_face(self, tmp_path: Path) -> None:
        feature = {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": feature}})}
        folder = tmp_path / "data"
        folder.mkdir()
        for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
            write(folder / f"{name}.parquet", metadata, image=hf(images(10, 10 * number)), label=[0, 1] * 5)
        store = read(folder, tmp_path / "stores", "parquet")
        assert store.classes == ["zebra", "ant"]
        assert store.manifest["counts"]["test"] == 10
        assert store.manifest["counts"]["train"] + store.manifest["counts"]["val"] == 20

    def test_d30_the_label_column_that_the_study_names(self, tmp_path: Path) -> None:
        clean = [0, 1] * 12
        noisy = [1, *clean[1:]]
        path = write(tmp_path / "x.parquet", image=images(24), label=noisy, label_clean=clean)
        for column, expected in ((None, noisy), ("label", noisy), ("label_clean", clean)):
            store = read(path, tmp_path / "stores", "parquet", label=column)
            labels = {
                int(name.partition("#")[2]): int(label)
                for split in store.splits
                for name, label in zip(store.names(split), store.labels(split), strict=True)
            }
            assert [labels[row] for row in range(24)] == expected
            assert store.manifest["layout"].endswith(f"label column {column or 'label'}")

    def test_numbers_are_sorted_as_numbers(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", image=images(33), label=[i % 11 for i in range(33)])
        assert read(path, tmp_path / "stores", "parquet").classes == [str(i) for i in range(11)]

    def test_rows_without_image_and_damaged_ones_are_quarantined(self, tmp_path: Path) -> None:
        data: list[Any] = images(24)
        data[3] = None
        data[5] = b""
        data[7] = data[7][:60]
        store = read(write(tmp_path / "x.parquet", image=data, label=["a", "b"] * 12), tmp_path / "stores", "parquet")
        reasons = {entry["name"]: entry["reason"] for entry in store.manifest["quarantine"]}
        assert set(reasons) == {"x.parquet#3", "x.parquet#5", "x.parquet#7"}
        assert reasons["x.parquet#3"] == "the row has no image bytes (paths are not followed)"
        assert reasons["x.parquet#7"].startswith("truncated or damaged")

    def test_d22_a_flipped_bit_in_a_page_is_detected(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", image=images(30), label=["a", "b", "c"] * 10)
        content = bytearray(path.read_bytes())
        offset = content.index(encoded(picture(25, 16, 16))[40:60])
        content[offset] ^= 1
        path.write_bytes(bytes(content))
        reasons = {e["reason"] for e in read(path, tmp_path / "stores", "parquet").manifest["quarantine"]}
        assert len(reasons) == 1
        assert "row group 2 is damaged" in reasons.pop()


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "text"),
        [
            (
                pa.array([0.5] * 4),
                "The column 'label' must hold names or integers from 0, but in x.parquet it holds double. Name "
                "another column in data.label, or save names.",
            ),
            (
                pa.array([True] * 4),
                "The column 'label' must hold names or integers from 0, but in x.parquet it holds bool. Name "
                "another column in data.label, or save names.",
            ),
            (
                pa.array([0, 1, None, None]),
                "The column 'label' must have a value in every row, an integer from 0 or a name, but in "
                "x.parquet row 2 has None, 3 has None.",
            ),
            (
                pa.array([0, -1, 1, 0]),
                "The column 'label' must have a value in every row, an integer from 0 or a name, but in "
                "x.parquet row 1 has -1.",
            ),
            (
                pa.array(["a", "", "b", "a"]),
                "The column 'label' must have a value in every row, an integer from 0 or a name, but in "
                "x.parquet row 1 has ''.",
            ),
        ],
    )
    def test_d20_labels_that_are_no_classes(self, tmp_path: Path, values: pa.Array, text: str) -> None:
        assert refusal(write(tmp_path / "x.parquet", image=images(4), label=values)) == text

    def test_d20_huge_integers_are_class_names(self, tmp_path: Path) -> None:
        source = scan_parquet(write(tmp_path / "x.parquet", image=images(2), label=[2**62, 5]))
        assert [s.label for s in source.samples] == [str(2**62), "5"]

    def test_d21_missing_columns_list_the_schema(self, tmp_path: Path) -> None:
        assert refusal(write(tmp_path / "x.parquet", text=["a"], label=[0])) == (
            "A Parquet file needs an image column (binary, or a struct with a binary field 'bytes'), called image or "
            "img or images or picture or image_bytes or bytes if there are several; but x.parquet has text (string), "
            "label (int64). Paths are not followed: save the encoded images."
        )
        assert refusal(write(tmp_path / "y.parquet", image=images(1), lable=[0])) == (
            "A Parquet file needs a label column, called label or labels or class or target or category or fine_label "
            "or coarse_label, but y.parquet has image (binary), lable (int64). Name yours in data.label (in commands: "
            "--label)."
        )

    def test_d30_a_label_column_that_is_not_there(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", image=images(1), label=[0], label_clean=[0])
        for column in ("label_claen", "image"):
            with pytest.raises(DataError) as error:
                scan_parquet(path, column)
            assert str(error.value).startswith(
                f"The label column is {column!r} (data.label), but x.parquet has image (binary), label (int64), "
                "label_clean (int64)."
            )
        with pytest.raises(DataError, match="Did you mean 'label_clean'"):
            scan_parquet(path, "label_claen")

    @pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"PAR1 and then nothing PAR1"])
    def test_d21_no_parquet_file(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.parquet").write_bytes(content)
        text = refusal(tmp_path / "x.parquet")
        assert text.startswith("x.parquet must be a Parquet file, but it cannot be read as one: ")
        assert text.endswith(". Give an undamaged Parquet file.")

    def test_d21_a_truncated_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", image=images(4), label=[0, 1, 0, 1])
        path.write_bytes(path.read_bytes()[:-20])
        assert refusal(path).startswith("x.parquet must be a Parquet file, but it cannot be read as one: ")

    def test_d23_extension_types_are_refused_before_their_schema_is_parsed(self, tmp_path: Path) -> None:
        """A registered type runs its own code when a schema is parsed (Ray Data unpickled: CVE-2026-41486)."""
        executed = []

        class Canary(pa.ExtensionType):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__(pa.binary(), "tests.canary")

            def __arrow_ext_serialize__(self) -> bytes:
                return b"payload"

            @classmethod
            def __arrow_ext_deserialize__(cls, storage: Any, payload: bytes) -> Canary:
                executed.append(payload)
                return cls()

        pa.register_extension_type(Canary())
        try:
            column = pa.ExtensionArray.from_storage(Canary(), pa.array(images(4)))
            texts = set()
            for shift in range(1, 4):  # moves the type's name within the base64 of the schema
                path = write(tmp_path / "x.parquet", None, **{"a" * shift: [0] * 4}, image=column, label=[0, 1, 0, 1])
                executed.clear()
                texts.add(refusal(path))
                assert executed == []
        finally:
            pa.unregister_extension_type("tests.canary")
        assert texts == {
            "Parquet columns must be plain Arrow types, but x.parquet has an extension type, which could run code when "
            "it is read. Save images as encoded bytes."
        }

    def test_unknown_splits(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", image=images(2), label=[0, 1], split=["train", "dev"])
        assert refusal(path) == (
            "The column 'split' must hold train, training, val, valid, validation, test, testing, but in x.parquet it "
            "also holds dev."
        )

    def test_labels_beyond_the_named_classes(self, tmp_path: Path) -> None:
        feature = {"label": {"names": ["a", "b"]}}
        path = write(
            tmp_path / "x.parquet",
            {"huggingface": json.dumps({"info": {"features": feature}})},
            image=images(3),
            label=[0, 1, 2],
        )
        assert refusal(path) == (
            "The column 'label' of x.parquet names 2 classes, so labels must be below 2, but row 2 has 2."
        )

    def test_a_folder_without_parquet_files(self, tmp_path: Path) -> None:
        assert refusal(tmp_path) == (
            f"A Parquet source needs files that end in .parquet, but {tmp_path} holds none. Set data.source to what is "
            "there."
        )
