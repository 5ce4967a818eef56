"""Export, then a fresh process without Luthier: the logits are the trial's kept predictions.

Of a ViT, a network with BatchNorm, and a LoRA trial, as timm, ONNX and MLflow folders. `luthier predict` in another
process reproduces the recorded test accuracy exactly.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.commands.export import export_study
from orchestrator.record.kept_paths import predictions_file
from orchestrator.record.records import TrialRecord, fold
from orchestrator.results.kept_model import preprocessing_of, read_kept
from orchestrator.results.predictions import output_matrix, read_predictions
from orchestrator.study import Study, read_journal
from tests.support.exports import finished_study, fresh, pictures
from trainables.data.transforms import BatchTransform

pytestmark = [pytest.mark.usefixtures("cpu_only"), pytest.mark.thorough, pytest.mark.slow]

ROOT = str(Path(__file__).parents[3])
TRIALS = {
    "ViT": ("test_vit", {"strategy": "full", "hparams": {"lr_backbone": 0.01}, "seed": 1}),
    "BatchNorm": ("test_resnet", {"strategy": "full", "hparams": {"lr_backbone": 0.01}, "seed": 2}),
    "LoRA": ("test_vit", {"strategy": "lora", "hparams": {"rank": 4}, "seed": 3}),
}
TOLERANCES = {"timm": 1e-5, "onnx": 1e-4, "mlflow": 1e-5}
"""Largest difference of a logit, relative to the largest."""

FRESH = """
import os

os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
import numpy as np, torch

torch.set_num_threads(1)
images = np.load("images.npy")
if kind == "timm":
    import timm

    model = timm.create_model("local-dir:model", pretrained=True).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(images)).numpy()
elif kind == "onnx":
    import onnxruntime

    session = onnxruntime.InferenceSession("model/model.onnx", providers=["CPUExecutionProvider"])
    logits = session.run(None, {"images": images})[0]
else:
    import mlflow

    logits = np.asarray(mlflow.pyfunc.load_model("model").predict(images))
np.save("logits.npy", logits)
result = list(logits.shape)
"""


@pytest.fixture(scope="module", params=list(TRIALS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, TrialRecord]:
    """A study of one trial whose network has something to tell apart."""
    name, trial = TRIALS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    root = pictures(folder / "pictures", ["cat", "dog", "fox"], count=30)
    study = finished_study(folder / "studies", root, {"name": name, "pretrained": False}, [trial], epochs=2)
    (record,) = fold(read_journal(study.spec, study.folder))
    return study, record


def export(study: Study, record: TrialRecord, kind: str, folder: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    export_study(study.folder, folder, trial=record.number, format_name=kind)


@pytest.mark.parametrize("kind", list(TOLERANCES))
def test_the_logits_are_those_that_the_trial_kept(
    trained: tuple[Study, TrialRecord], kind: str, tmp_path: Path
) -> None:
    study, record = trained
    export(study, record, kind, tmp_path / "model")
    store = study.prepare()
    view = preprocessing_of(read_kept(study.folder, record))
    transform = BatchTransform(view.mean, view.std, view.image_size, ())
    np.save(tmp_path / "images.npy", transform(torch.tensor(store.images("test"))).numpy())
    table = read_predictions(predictions_file(study.folder, record.number))
    rows = np.flatnonzero(np.asarray(table["split"].to_pylist()) == "test")
    kept = output_matrix(table)[rows]
    assert fresh(FRESH, tmp_path, kind=kind) == list(kept.shape)
    logits = np.load(tmp_path / "logits.npy")
    difference = np.abs(logits - kept).max()
    print(f"{record.label} {kind}: max |Δ| {difference:.2g}, largest logit {np.abs(kept).max():.3g}")
    assert difference <= TOLERANCES[kind] * np.abs(kept).max()
    assert (logits.argmax(1) == np.asarray(table["target"])[rows]).mean() == record.metrics["test/acc"]


@pytest.mark.parametrize("kind", ["timm", "onnx"])
def test_predict_in_another_process_reproduces_the_test_accuracy(
    trained: tuple[Study, TrialRecord], kind: str, tmp_path: Path
) -> None:
    study, record = trained
    export(study, record, kind, tmp_path / "model")
    store = study.prepare()
    command = [sys.executable, "-m", "luthier", "predict", str(tmp_path / "model"), str(store.path)]
    command += ["--split", "test", "-o", str(tmp_path / "out.csv"), "--domain-report", "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout)["domain_report"]["accuracy"] == record.metrics["test/acc"]
