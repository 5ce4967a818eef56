"""`luthier export`: which trial, compared with the record, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.commands.export import check_adapter, select_trial
from orchestrator.errors import StudyError
from orchestrator.export.errors import RefusedExportError
from orchestrator.record.kept_paths import weights_folder
from orchestrator.record.records import TrialRecord, fold
from orchestrator.results.kept_model import preprocessing_of
from orchestrator.study import Study, read_journal
from tests.support.exports import confirmed_study, finished_study, fresh, pictures
from trainables.engine.tuned_network import tuned_network
from trainables.models.backbone import load_pretrained
from trainables.specs.trial_spec import ModelSpec
from trainables.storage.kept_weights import KeptWeights, load_weights, save_weights

pytestmark = [pytest.mark.usefixtures("cpu_only"), pytest.mark.thorough]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return confirmed_study(tmp_path_factory.mktemp("study"))


def command(*arguments: object) -> tuple[int, str, str]:
    ended = CliRunner().invoke(app, list(map(str, arguments)))
    return ended.exit_code, ended.stdout, ended.stderr


def test_export_and_predict_give_the_recorded_accuracy(study: Study, tmp_path: Path) -> None:
    """Round trip: the test split's accuracy by `predict` equals the record's, exactly."""
    code, out, err = command("export", study.folder, "--to", tmp_path / "model", "--trial", 1)
    assert code == 0, err
    assert "Trial 1 (full, confirm): asked for by its number." in out
    store = study.prepare()
    arguments = ["predict", tmp_path / "model", store.path, "-o", tmp_path / "out.csv", "--domain-report", "--json"]
    code, out, err = command(*arguments)
    assert code == 0, err
    record = fold(read_journal(study.spec, study.folder))[1]
    assert json.loads(out)["domain_report"]["accuracy"] == record.metrics["test/acc"]
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["label_names"] == ["1", "2", "10", "11"]
    card = (tmp_path / "model/README.md").read_text()
    assert store.digest in card
    assert "`test/acc`" in card
    assert "95 % interval over pictures" in card


def test_an_entry_s_confirmed_trial_goes_before_its_search_trial(study: Study, tmp_path: Path) -> None:
    code, out, err = command("export", study.folder, "--to", tmp_path / "model", "--entry", "full", "--json")
    assert code == 0, err
    values = json.loads(out)
    assert values["trial"] == 1
    assert "the confirmed seed of the configuration that the rule id_val chooses among entry full," in values["reason"]
    assert values["proof"]["difference"] <= 1e-5


def test_the_median_of_the_seeds() -> None:
    shared: dict[str, Any] = {"strategy": "full", "label": "full", "config_hash": "h", "state": "complete"}
    values = {0: ("search", 0.99), 1: ("confirm", 0.7), 2: ("confirm", 0.9), 3: ("confirm", 0.8), 4: ("confirm", 0.6)}
    records = [
        TrialRecord(trial_id=str(n), number=n, seed=n, role=role, metrics={"best/val/acc": value}, **shared)
        for n, (role, value) in values.items()
    ]
    spec = Study(name="pets", data={"source": "digits"}, model={"name": "digits_vit"}, strategies=["full"]).spec
    assert select_trial(records, spec).record.number == 1
    assert select_trial(records[:-1], spec, entry="full").record.number == 3


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--trial", 9), 2, "the study has no trial 9; they are 0 to 2"),
        (("--entry", "lora"), 2, "an entry of this study is one of full, linear_probe, but got 'lora'"),
        (("--trial", 1, "--entry", "full"), 2, "give either --trial or --entry"),
        (("--format", "tflite"), 2, "A format is one of timm, onnx, torch_export, mlflow, peft"),
    ],
)
def test_usage_errors(study: Study, tmp_path: Path, arguments: tuple[object, ...], code: int, text: str) -> None:
    ended, _, err = command("export", study.folder, "--to", tmp_path / "model", *arguments)
    assert ended == code
    assert text in " ".join(err.split())
    assert not (tmp_path / "model").exists()


def test_weights_of_another_network_are_noticed_by_the_record(study: Study, tmp_path: Path) -> None:
    """Rule 2: what does not give the recorded accuracy is not exported."""
    folder = weights_folder(study.folder, 2)
    kept = load_weights(folder)
    broken = {name: -value if name == "head.weight" else value for name, value in kept.tensors.items()}
    save_weights(folder, KeptWeights(tensors=broken, meta=kept.meta, adapter=kept.adapter))
    try:
        code, _, err = command("export", study.folder, "--to", tmp_path / "model", "--trial", 2)
    finally:
        save_weights(folder, kept)
    assert code == 1
    assert "must give the recorded test/acc" in err
    assert not (tmp_path / "model").exists()


def test_weights_that_are_not_kept(study: Study, tmp_path: Path) -> None:
    folder = weights_folder(study.folder, 0)
    hidden = folder.with_name("hidden")
    folder.rename(hidden)
    try:
        code, _, err = command("export", study.folder, "--to", tmp_path / "model", "--trial", 0)
    finally:
        hidden.rename(folder)
    assert code == 1
    message = "A trial's model is restored from its kept weights, but trial 0 (full, search) has none"
    assert message in " ".join(err.split())


def test_damaged_weights_are_refused(study: Study, tmp_path: Path) -> None:
    path = weights_folder(study.folder, 0) / "tensors.safetensors"
    content = path.read_bytes()
    tensors = load_file(path)
    tensors["tensors/head.bias"] = tensors["tensors/head.bias"] + 1
    save_file(tensors, path)
    try:
        code, _, err = command("export", study.folder, "--to", tmp_path / "model", "--trial", 0)
    finally:
        path.write_bytes(content)
    assert code == 1
    assert "must match their SHA-256" in err


def test_the_crop_is_that_of_the_store() -> None:
    """A store that is smaller than the network's own crop margin: the share follows the pixels."""
    meta = {"image_size": 96, "stored_image_size": 97, "crop_pct": 0.875, "mean": [0.5] * 3, "std": [0.5] * 3}
    view = preprocessing_of(KeptWeights(tensors={}, meta={**meta, "interpolation": "bilinear"}, adapter={}))
    assert view.stored_size == 97
    assert view.image_size == 96


PEFT = """
import json
import timm, torch
from peft import PeftModel
from safetensors.torch import load_file

torch.set_num_threads(1)
images = load_file("images.safetensors")["images"]
backbone = load_file("backbone.safetensors")
merged = timm.create_model("local-dir:merged", pretrained=True).eval()
result = {"keys": sorted(load_file("adapter/adapter_model.safetensors")), "logits": []}
with torch.no_grad():
    result["logits"].append(merged(images).tolist())
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = timm.create_model("test_vit", num_classes=3, img_size=32)
        base.load_state_dict(backbone, strict=False)
        model = PeftModel.from_pretrained(base, "adapter").eval()
        result["logits"].append(model(images).tolist())
        result["logits"].append(model.merge_and_unload()(images).tolist())
    result["config"] = json.load(open("adapter/adapter_config.json"))
"""


def test_a_lora_trial_as_an_adapter_with_its_head(tmp_path: Path) -> None:
    """X04: whatever head the base network has, the adapter brings the tuned one."""
    root = pictures(tmp_path / "pictures", ["cat", "dog", "fox"])
    model = {"name": "test_vit", "pretrained": False}
    trials = ({"strategy": "lora", "hparams": {"rank": 4}}, {"strategy": "full"})
    study = finished_study(tmp_path / "studies", root, model, trials)
    for kind, folder in (("timm", "merged"), ("peft", "adapter")):
        arguments = ["--to", tmp_path / folder, "--trial", 0, "--format", kind]
        code, _, err = command("export", study.folder, *arguments)
        assert code == 0, err
    kept = load_weights(weights_folder(study.folder, 0))
    backbone = load_pretrained(ModelSpec(**model), 32)
    save_file(dict(backbone.module.state_dict()), tmp_path / "backbone.safetensors")
    save_file({"images": torch.randn(5, 3, 32, 32)}, tmp_path / "images.safetensors")
    result = fresh(PEFT, tmp_path)
    with torch.no_grad():
        logits = tuned_network(kept, backbone)(load_file(tmp_path / "images.safetensors")["images"]).numpy()
    for values in result["logits"]:
        assert np.abs(np.array(values) - logits).max() <= 1e-5 * np.abs(logits).max()
    targets = [target.removeprefix("backbone.") for target in kept.meta["adapter"]["targets"]]
    parts = [f"{target}.lora_{part}.weight" for target in targets for part in "AB"]
    assert result["keys"] == sorted(f"base_model.model.{name}" for name in [*parts, "head.weight", "head.bias"])
    assert (result["config"]["r"], result["config"]["lora_alpha"]) == (4, 8)
    assert result["config"]["modules_to_save"] == ["head"]
    assert sorted(result["config"]["target_modules"]) == sorted(targets)
    digest = json.loads((tmp_path / "adapter/luthier.json").read_text())["base_model"]["sha256"]
    assert digest in (tmp_path / "adapter/README.md").read_text()
    code, _, err = command("export", study.folder, "--to", tmp_path / "full", "--trial", 1, "--format", "peft")
    assert code == 2
    assert "A peft adapter holds low-rank updates and the head, but trial 1 (full) tuned other tensors" in err


def test_an_interpolated_adapter_is_refused() -> None:
    meta = {"number": 3, "strategy": "lora", "interpolated": "alpha"}
    with pytest.raises(RefusedExportError, match=r"those of trial 3 were interpolated after training \(alpha\)"):
        check_adapter(KeptWeights(tensors={}, meta=meta, adapter={"x.lora_A": torch.zeros(1)}), {})


def test_a_trial_that_is_not_complete() -> None:
    records = [TrialRecord(trial_id="a", number=0, strategy="full", label="full", state="failed")]
    spec = Study(name="pets", data={"source": "digits"}, model={"name": "digits_vit"}, strategies=["full"]).spec
    with pytest.raises(StudyError, match="trial 0 must be complete, but it is failed"):
        select_trial(records, spec, trial=0)
