"""S7, D23, C3: whatever Luthier reads may come from a stranger, and none of it may run code.

Every file that is read gets a canary once: a pickle, or a YAML tag, that makes a folder when it is executed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import sqlite3
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.support.synthetic import shapes, write_images, write_shapes
from orchestrator import Study
from orchestrator.errors import StudyError
from orchestrator.ingest.errors import DataError
from orchestrator.ingest.request import IngestRequest, scan
from orchestrator.record.journal import Journal, JournalError
from orchestrator.study_file.load import resolved_study
from orchestrator.tracking.delivery_state import Position, PositionFile
from tests.support.canary import Canary
from tests.support.driving import drive, searcher
from trainables.data.corruption_files import CorruptedFiles, corruptions_in
from trainables.data.feature_cache import FeatureCache
from trainables.data.store import Store, StoreError
from trainables.models.backbone import load_pretrained
from trainables.specs.trial_spec import ModelSpec
from trainables.storage.checkpoint_format import CheckpointError, RunState, load_newest, load_state, save_state
from trainables.storage.checkpoint_store import CheckpointStore
from trainables.storage.kept_weights import KeptWeights, WeightsError, load_weights, save_weights

ROOT = Path(__file__).resolve().parent.parent
RAY_OBJECTS = "ray.data.arrow_pickled_object"


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The machine is shared."""


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What the canary would make; the test fails if it is there at the end."""
    executed = tmp_path / "executed"
    yield executed
    assert not executed.exists(), "code from a file was executed"


@pytest.fixture
def evil(marker: Path) -> bytes:
    """A pickle that executes something."""
    return pickle.dumps({"state_dict": Canary(marker)})


def test_the_canary_sings(tmp_path: Path) -> None:
    """Otherwise all other tests here would prove nothing."""
    pickle.loads(pickle.dumps(Canary(tmp_path / "executed")))  # noqa: S301
    assert (tmp_path / "executed").is_dir()


def digested(folder: Path, **changes: Any) -> None:
    """Make the manifest of a checkpoint or store agree with its data: a stranger can do so, too."""
    name = "tensors.safetensors" if (folder / "tensors.safetensors").exists() else "data.arrow"
    content = (folder / name).read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), **changes}
    if manifest.pop("digest", None) is not None:
        manifest["digest"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


class TestCheckpoints:
    @pytest.mark.parametrize("file", ["tensors.safetensors", "manifest.json"])
    def test_s7_a_pickle_in_place_of_a_checkpoints_file(self, evil: bytes, file: str, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoint_000001"
        save_state(tmp_path / "checkpoint_000000", RunState({}, {"unit": 1, "step": 0}))
        save_state(folder, RunState({"model/a": torch.ones(2)}, {"unit": 2, "step": 0}))
        (folder / file).write_bytes(evil)
        if file == "tensors.safetensors":
            digested(folder)
        with pytest.raises(CheckpointError, match=re.escape(str(folder))):
            load_state(folder)
        state = load_newest(folder)
        assert state is not None
        assert state.meta["unit"] == 1

    def test_s7_a_torch_archive_under_the_name_of_the_tensors(self, marker: Path, tmp_path: Path) -> None:
        store = CheckpointStore(tmp_path / "checkpoints" / "trial-0000")
        store.acquire()
        save_state(store.folder / "unit-000001", RunState({}, {"unit": 1, "step": 0}))
        torch.save({"model/a": Canary(marker)}, store.folder / "unit-000001" / "tensors.safetensors")
        digested(store.folder / "unit-000001")
        (store.folder / "optimizer.pkl").write_bytes(pickle.dumps(Canary(marker)))
        assert list(store.valid_states()) == []
        assert [p.name for p in (tmp_path / "checkpoints" / "quarantine").iterdir()] == ["trial-0000-unit-000001"]
        assert "unit-000001 cannot be read" in store.problems[0]


def write_weights(path: Path, marker: Path, evil: bytes, how: str) -> None:
    if how == "zip":
        torch.save({"state_dict": Canary(marker)}, path)
    elif how == "legacy":
        torch.save({"state_dict": Canary(marker)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(evil)


class TestWeights:
    @pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
    @pytest.mark.parametrize("ending", [".pth", ".bin", ".pt", ".safetensors"])
    def test_s7_a_weight_file(self, marker: Path, evil: bytes, ending: str, how: str, tmp_path: Path) -> None:
        path = tmp_path / f"weights{ending}"
        write_weights(path, marker, evil, how)
        with pytest.raises(ValueError) as error:
            load_pretrained(ModelSpec(name="test_resnet", weights=str(path)))
        message = str(error.value)
        assert message.startswith(f"The weight file {path} cannot be read (")
        assert message.endswith("Give an undamaged .safetensors or .pth file of this architecture.")
        assert "weights_only" not in message  # torch's and timm's own advice is to switch the protection off
        if ending != ".safetensors" and how == "zip":
            assert "(it asks for Python objects: os.makedirs; Luthier reads nothing but tensors)" in message

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "weights.pth"])
    def test_s7_a_folder_of_weights(
        self, marker: Path, name: str, network: Callable[[str], str], tmp_path: Path
    ) -> None:
        source = Path(network("cnn").removeprefix("local-dir:"))
        folder = tmp_path / "model"
        folder.mkdir()
        config = json.loads((source / "config.json").read_text())
        torch.save({"state_dict": Canary(marker)}, tmp_path / "beside.pth")
        # A config may try to lead elsewhere.
        config["pretrained_cfg"] |= {"file": str(tmp_path / "beside.pth"), "custom_load": True, "source": "file"}
        (folder / "config.json").write_text(json.dumps(config))
        torch.save({"state_dict": Canary(marker)}, folder / name)
        for spec in (ModelSpec(name=f"local-dir:{folder}"), ModelSpec(name="test_resnet", weights=str(folder))):
            with pytest.raises(ValueError, match=f"^The model local-dir:{folder} could not be loaded"):
                load_pretrained(spec)

    def test_s7_weights_that_are_no_dense_tensors(self, tmp_path: Path) -> None:
        """Indices of a sparse tensor may point outside of it."""
        torch.save({"conv1.0.weight": torch.eye(3).to_sparse()}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"conv1\.0\.weight is no dense tensor"):
            load_pretrained(ModelSpec(name="test_resnet", weights=str(tmp_path / "w.pth")))
        torch.save([1, 2], tmp_path / "list.pth")
        with pytest.raises(ValueError, match="cannot be read"):
            load_pretrained(ModelSpec(name="test_resnet", weights=str(tmp_path / "list.pth")))


class TestKeptWeights:
    @pytest.mark.parametrize("file", ["tensors.safetensors", "manifest.json"])
    def test_s7_a_pickle_in_place_of_a_file_of_kept_weights(self, evil: bytes, file: str, tmp_path: Path) -> None:
        folder = tmp_path / "weights" / "trial-0000"
        save_weights(folder, KeptWeights({"head.bias": torch.ones(2)}, {}, {"number": 0}))
        (folder / file).write_bytes(evil)
        if file == "tensors.safetensors":
            digested(folder)
        with pytest.raises(WeightsError, match=re.escape(str(folder))):
            load_weights(folder)

    def test_s7_a_torch_archive_under_the_name_of_kept_tensors(self, marker: Path, tmp_path: Path) -> None:
        folder = tmp_path / "weights" / "trial-0000"
        save_weights(folder, KeptWeights({"head.bias": torch.ones(2)}, {}, {"number": 0}))
        torch.save({"head.bias": Canary(marker)}, folder / "tensors.safetensors")
        digested(folder)
        with pytest.raises(WeightsError, match="Kept weights have a readable tensors"):
            load_weights(folder)


def objects(values: list[bytes]) -> tuple[pa.Field, Any]:
    """A column that Ray would unpickle, as its own schema describes it."""
    metadata = {"ARROW:extension:name": RAY_OBJECTS, "ARROW:extension:metadata": ""}
    return pa.field("name", pa.large_binary(), metadata=metadata), pa.array(values, pa.large_binary())


class TestStores:
    def test_d23_names_that_ray_would_unpickle(self, marker: Path, tmp_path: Path) -> None:
        """Tune imports ray.data, which registers a type whose values are pickles, in every trial."""
        import ray.tune  # noqa: F401

        folder = write_shapes(tmp_path / "store")
        rows = pa.ipc.open_file(folder / "data.arrow").read_all()
        field, column = objects([pickle.dumps(Canary(marker))] * rows.num_rows)
        table = rows.drop_columns("name").append_column(field, column)
        with pa.OSFile(str(folder / "data.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            for batch in table.to_batches():
                writer.write_batch(batch)
        digested(folder)
        with pytest.raises(StoreError) as error:
            Store(folder).names("train")
        assert str(error.value) == (
            f"{folder / 'data.arrow'} must be an Arrow file of plain columns, but it has an extension type, which "
            f"could run code when it is read. Delete {folder}: the next run reads the data again."
        )

    @pytest.mark.parametrize("file", ["data.arrow", "manifest.json"])
    def test_s7_a_pickle_in_place_of_a_stores_file(self, evil: bytes, file: str, tmp_path: Path) -> None:
        folder = write_shapes(tmp_path / "store")
        (folder / file).write_bytes(evil)
        if file == "data.arrow":
            digested(folder)
        with pytest.raises(StoreError) as error:
            Store(folder).images("train")
        assert str(error.value).startswith(f"{folder / file} must be ")
        assert str(error.value).endswith(f"Delete {folder}: the next run reads the data again.")


class TestSources:
    def test_d23_a_parquet_column_of_rays_pickled_objects(self, marker: Path, tmp_path: Path) -> None:
        import ray.tune  # noqa: F401

        field, column = objects([pickle.dumps(Canary(marker))] * 4)
        schema = pa.schema([field.with_name("image"), pa.field("label", pa.int64())])
        pq.write_table(pa.table([column, [0, 1, 0, 1]], schema=schema), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=r"x\.parquet has an extension type, which could run code"):
            scan(IngestRequest(source="parquet", root=str(tmp_path / "x.parquet")))

    @pytest.mark.parametrize("source", ["parquet", "npz"])
    def test_s7_a_pickle_in_place_of_a_source(self, evil: bytes, source: str, tmp_path: Path) -> None:
        (tmp_path / f"x.{source}").write_bytes(evil)
        with pytest.raises(DataError, match=rf"x\.{source} must be an? "):
            scan(IngestRequest(source=source, root=str(tmp_path)))

    def test_s7_arrays_of_objects(self, marker: Path, tmp_path: Path) -> None:
        images = np.array([Canary(marker)] * 4, dtype=object)
        np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.arange(4) % 2)
        with pytest.raises(DataError, match=r"x\.npz must be an \.npz file of plain arrays|train_images must be uint8"):
            scan(IngestRequest(source="npz", root=str(tmp_path)))

    def test_s7_pictures_are_decoded_by_their_content(self, evil: bytes, tmp_path: Path) -> None:
        from orchestrator.ingest.check import check

        root = write_images(tmp_path / "images")
        (root / "bright" / "disc" / "evil.png").write_bytes(evil)
        (root / "bright" / "disc" / "evil.pkl").write_bytes(evil)
        report = check(root)
        assert [entry["name"] for entry in report.unreadable] == ["bright/disc/evil.png"]
        assert report.unreadable[0]["reason"].startswith("not a picture (JPEG, PNG,")
        assert ("bright/disc/evil.pkl", "no image file by its extension") in [
            (left["name"], left["reason"]) for left in report.ignored
        ]


TAGS = (
    "!!python/object/apply:os.makedirs ['{marker}']",
    "!!python/object/new:os.makedirs ['{marker}']",
    "!!python/name:os.makedirs",
    "!!python/module:os",
    "!<tag:yaml.org,2002:python/object/apply:os.makedirs> ['{marker}']",
)


class TestStudyFiles:
    @pytest.mark.parametrize("tag", TAGS)
    def test_c3_a_tag_names_no_python_object(self, marker: Path, tag: str, tmp_path: Path) -> None:
        file = tmp_path / "study.yaml"
        file.write_text(f"name: s\ndata:\n  source: {tag.format(marker=marker)}\n")
        with pytest.raises(StudyError) as error:
            Study.from_yaml(file)
        with pytest.raises(StudyError, match="tags are not allowed"):
            resolved_study(file)  # what is sent to a cluster
        assert re.search(rf"^{file} .*line 3: tags are not allowed in a study, but got '", str(error.value))
        assert str(error.value).endswith("Remove it.")

    @pytest.mark.parametrize("key", ["_target_", "class_path", "__reduce__"])
    def test_c3_a_key_names_no_class(self, marker: Path, key: str) -> None:
        """What other tools import and call is an unknown key here, at any depth."""
        fields: dict[str, Any] = {
            "name": "s", "data": {"source": "digits"}, "model": {"name": "digits_cnn", key: "os.makedirs"},
            "strategies": ["os.makedirs", {"name": "full", "fixed": {key: [str(marker)]}}],
        }  # fmt: skip
        with pytest.raises(StudyError) as error:
            Study(**fields)
        assert f"model.{key}" in str(error.value)
        assert "a strategy is one of" in str(error.value)
        assert f"full has no hyperparameter '{key}'" in str(error.value)


class TestRecords:
    def test_s7_a_journal(self, evil: bytes, tmp_path: Path) -> None:
        (tmp_path / "journal.jsonl").write_bytes(evil + b"\n" + b"{}\n")
        with pytest.raises(JournalError, match=re.escape(str(tmp_path / "journal.jsonl"))):
            Journal.read(tmp_path / "journal.jsonl")

    def test_s7_a_position(self, evil: bytes, tmp_path: Path) -> None:
        (tmp_path / "position.json").write_bytes(evil)
        assert PositionFile(tmp_path / "position.json", "here").load(tmp_path / "journal.jsonl") == Position()

    def test_s7_optunas_database(self, evil: bytes, marker: Path, tmp_path: Path) -> None:
        """A pickle in its place is replaced; a state that Optuna's CMA-ES would unpickle is never asked for."""
        from orchestrator.record.journal import Journal as Written

        with Written(tmp_path / "journal.jsonl") as journal:
            (tmp_path / "optuna.db").write_bytes(evil)
            first = searcher(tmp_path, ("full",), journal=journal, trials=4)
            assert len(drive(first, stop_after=2)) == 2
            first.close()
            with sqlite3.connect(tmp_path / "optuna.db") as database:
                for (trial,) in database.execute("SELECT trial_id FROM trials").fetchall():
                    database.execute(
                        "INSERT INTO trial_system_attributes (trial_id, key, value_json) VALUES (?, ?, ?)",
                        (trial, "cma:optimizer", json.dumps(pickle.dumps(Canary(marker)).hex())),
                    )
            database.close()
            second = searcher(tmp_path, ("full",), journal=journal, trials=4)
            assert drive(second)
            second.close()

    def test_s7_the_sampler_that_unpickles_is_not_offered(self) -> None:
        from orchestrator.search.sampling import SAMPLERS, make_sampler

        made = {type(make_sampler(name, 0)).__name__ for name in SAMPLERS}
        assert made <= {"TPESampler", "GPSampler", "RandomSampler"}


class TestCaches:
    @pytest.mark.parametrize("kind", ["pickle", "objects"])
    def test_s7_corrupted_pictures_are_refused(self, kind: str, evil: bytes, marker: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "labels.npy", np.tile(np.arange(2), 5))
        (tmp_path / "fog.npy").write_bytes(evil)
        if kind == "objects":
            np.save(tmp_path / "fog.npy", np.array([Canary(marker)] * 10, dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match=r"fog.npy must be an array that NumPy saved, but cannot be read as one"):
            CorruptedFiles(tmp_path, corruptions_in(tmp_path), 2)

    @pytest.mark.parametrize("kind", ["pickle", "objects"])
    def test_s7_features_are_computed_again(self, kind: str, evil: bytes, marker: Path, tmp_path: Path) -> None:
        memory = shapes()
        backbone = load_pretrained(ModelSpec(name="test_resnet", pretrained=False), 32)

        def view(images: torch.Tensor) -> torch.Tensor:
            return images.permute(0, 3, 1, 2).float() / 255

        expected = FeatureCache(tmp_path).features(backbone, memory, "val", 8, view)
        (file,) = (tmp_path / "features").glob("*.npy")
        copy = tmp_path / "second" / "features" / file.name
        copy.parent.mkdir(parents=True)
        copy.write_bytes(evil)
        if kind == "objects":
            np.save(copy, np.array([[Canary(marker)]], dtype=object), allow_pickle=True)
        features = FeatureCache(tmp_path / "second").features(backbone, memory, "val", 8, view)
        assert np.array_equal(features, expected)

    def test_s7_solutions_and_measurements_are_made_again(self, evil: bytes, tmp_path: Path) -> None:
        from trainables.diagnostics.plasticity import _load as load_plasticity
        from trainables.tasks.linear_probe_head import _load as load_probe

        (tmp_path / "stored").write_bytes(evil)
        assert load_probe(tmp_path / "stored") is None
        assert load_plasticity(tmp_path / "stored") is None


def test_s7_the_study_folder_of_a_stranger(evil: bytes, marker: Path, tmp_path: Path) -> None:
    """What looks at a study's folder reads the journal and JSON; pickles of Tune, models of MLflow are left alone."""
    from orchestrator.commands.check import check_study
    from orchestrator.commands.status import status

    study = Study(
        name="s", data={"source": "digits"}, model={"name": "digits_cnn"}, strategies=["full"], storage=str(tmp_path)
    )
    with Journal(study.folder / "journal.jsonl") as journal:
        journal.append("study_started", study="s", spec={"name": "s"})
    ray = study.folder / "ray"
    model = tmp_path / "mlartifacts" / "1" / "models" / "m" / "artifacts"
    for folder in (ray, model):
        folder.mkdir(parents=True)
    for name in ("tuner.pkl", "trainable.pkl", "searcher-state.pkl", "experiment_state-1.json"):
        (ray / name).write_bytes(evil)
    (model / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: os\n    python_model: m.pkl\n")
    (model / "m.pkl").write_bytes(evil)
    (study.folder / "optuna.db").write_bytes(evil)
    (study.folder / "study.yaml").write_bytes(evil)
    levels = {finding.what: finding.level for finding in check_study(study).findings}
    assert levels["search"] == "note"
    assert levels["journal"] == "ok"
    with pytest.raises(StudyError, match=re.escape(str(study.folder))):
        status(study.folder)


FLOORS = {
    "mlflow": ("3.17.2", "CVE-2026-116692"),
    "pillow": ("13.0", "the decoders' advisories up to 2026"),
    "pyarrow": ("25", "reads of damaged files outside their bounds"),
    "ray[tune,default]": ("2.60", "CVE-2025-62593, CVE-2026-41486; token authentication by default"),
    "timm": ("1.0.26", "earlier ones unpickle weights of a folder"),
    "torch": ("2.10", "CVE-2025-32434, CVE-2026-24747"),
}
"""Package → lowest version, and what is wrong with those before it."""


def test_packages_that_read_files_have_no_hole_that_is_known() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    asked = dict(re.split(r">=", entry.partition(",<")[0]) for entry in required)
    for name, (lowest, why) in FLOORS.items():
        floor, declared = (tuple(int(p) for p in v.split(".")) for v in (lowest, asked[name]))
        assert declared >= floor, f"{name}: {why}"
