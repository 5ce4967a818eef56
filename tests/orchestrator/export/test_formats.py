"""ONNX and torch.export: any batch size, the same logits row by row, and class names in the file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.export import formats
from orchestrator.export.errors import ExportError
from orchestrator.export.export import export_model
from tests.orchestrator.ingest.pictures import picture
from tests.support.exports import fresh, tuned
from trainables.data.transforms import BatchTransform

pytestmark = pytest.mark.usefixtures("cpu_only")

NAMES = ["1", "2", "10", 'say "x", ü']
BATCHES = (1, 2, 7, 16, 33)

FRESH = """
import json
import numpy as np, torch

torch.set_num_threads(1)
images = np.load("images.npy")
result = {}
for name in networks:
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(f"{name}-onnx/model.onnx", providers=["CPUExecutionProvider"])
        run = lambda batch: session.run(None, {session.get_inputs()[0].name: batch})[0]
        names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
        shape = session.get_inputs()[0].shape
    else:
        files = {"class_names.json": ""}
        module = torch.export.load(f"{name}-torch_export/model.pt2", extra_files=files).module()
        run = lambda batch: module(torch.from_numpy(batch)).detach().numpy()
        names = json.loads(files["class_names.json"])
        shape = None
    logits = {size: run(images[:size]).tolist() for size in batches}
    result[name] = {"names": names, "shape": shape, "logits": logits}
"""


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_batches_of_any_size_in_a_fresh_process(kind: str, tmp_path: Path) -> None:
    """X03."""
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    networks = ("test_resnet", "test_vit")
    models = {name: tuned(name, classes=NAMES) for name in networks}
    for name, model in models.items():
        export_model(model, tmp_path / f"{name}-{kind}", kind)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(max(BATCHES), 3, 32, 32, generator=generator)
    np.save(tmp_path / "images.npy", images.numpy())
    result = fresh(FRESH, tmp_path, networks=networks, kind=kind, batches=BATCHES)
    tolerance = 1e-4 if kind == "onnx" else 1e-5
    for name, model in models.items():
        with torch.no_grad():
            single = torch.cat([model.network(image[None]) for image in images]).numpy()
        assert result[name]["names"] == NAMES
        if kind == "onnx":
            assert isinstance(result[name]["shape"][0], str)
            assert result[name]["shape"][1:] == [3, 32, 32]
        for size in BATCHES:
            logits = np.array(result[name]["logits"][str(size)])
            assert np.abs(logits - single[:size]).max() <= tolerance * np.abs(single).max(), (name, size)


MLFLOW = """
import os

os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
import mlflow
import numpy as np

model = mlflow.pyfunc.load_model("model")
images = np.load("images.npy")
result = {
    "logits": {size: model.predict(images[:size]).tolist() for size in batches},
    "inputs": model.metadata.signature.inputs.to_dict(),
    "example": list(np.asarray(model.input_example).shape),
}
"""


@pytest.mark.thorough
def test_a_model_of_mlflow_without_pickle(tmp_path: Path) -> None:
    model = tuned("test_resnet", classes=NAMES)
    export_model(model, tmp_path / "model", "mlflow")
    images = torch.randn(max(BATCHES), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "images.npy", images.numpy())
    result = fresh(MLFLOW, tmp_path, batches=BATCHES)
    with torch.no_grad():
        expected = model.network(images).numpy()
    for size in BATCHES:
        difference = np.abs(np.array(result["logits"][str(size)]) - expected[:size]).max()
        assert difference <= 1e-5 * np.abs(expected).max()
    assert result["inputs"][0]["tensor-spec"] == {"dtype": "float32", "shape": [-1, 3, 32, 32]}
    assert result["example"] == [2, 3, 32, 32]
    suffixes = {path.suffix for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert suffixes == {"", ".md", ".json", ".py", ".safetensors", ".yaml", ".txt"}


@pytest.mark.thorough
def test_an_onnx_folder_predicts_like_one_of_timm(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = tuned("test_resnet", classes=NAMES)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        picture(number, 50, 40).save(tmp_path / f"pictures/{number}.png")
    for kind in ("timm", "onnx"):
        export_model(model, tmp_path / kind, kind)
        output = str(tmp_path / f"{kind}.csv")
        ended = CliRunner().invoke(app, ["predict", str(tmp_path / kind), str(tmp_path / "pictures"), "-o", output])
        assert ended.exit_code == 0, ended.stderr
    tables = [pd.read_csv(tmp_path / f"{kind}.csv")[NAMES].to_numpy() for kind in ("timm", "onnx")]
    assert np.allclose(tables[0], tables[1], atol=1e-5)


@pytest.mark.thorough
def test_a_folder_that_cannot_be_computed_with_names_its_format(tmp_path: Path) -> None:
    export_model(tuned("test_resnet"), tmp_path / "model", "torch_export")
    picture(1, 40, 40).save(tmp_path / "1.png")
    arguments = ["predict", str(tmp_path / "model"), str(tmp_path / "1.png"), "-o", str(tmp_path / "out.csv")]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 4
    assert "timm and onnx, but" in ended.stderr
    assert "holds torch_export" in ended.stderr


def test_a_batch_that_got_fixed_ends_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(folder: Path, material: formats.Material) -> formats.Written:
        def run(images: torch.Tensor) -> torch.Tensor:
            if len(images) != formats.EXAMPLE:
                raise RuntimeError("expected a batch of 2")
            return torch.as_tensor(material.classifier.module(images))

        return formats.Written((), run, "")

    monkeypatch.setitem(formats.FORMATS, "torch_export", formats.Format(fixed, 1e-5))
    with pytest.raises(ExportError, match=r"must take batches of any size, but one of \d+ fails"):
        export_model(tuned("test_resnet"), tmp_path / "model", "torch_export")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'needs onnx, onnxruntime, onnxscript.*pip install "luthier\[onnx\]"'):
        export_model(tuned("test_resnet"), tmp_path / "model", "onnx")


def test_transform_and_pixels_agree() -> None:
    """The proof's images are those of training."""
    model = tuned("test_vit")
    view = model.preprocessing
    images = BatchTransform(view.mean, view.std, view.image_size, ())(torch.tensor(model.pictures))
    assert images.shape == (9, 3, 32, 32)
