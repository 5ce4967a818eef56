"""`luthier export --refit`: trained once, on training and validation pictures, and what its card says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import luthier
from orchestrator.cli import app
from orchestrator.record.journal import Journal
from orchestrator.record.kept_files import refit_folders
from orchestrator.record.kept_paths import weights_folder
from orchestrator.record.records import fold
from orchestrator.study import Study, read_journal
from tests.support.exports import confirmed_study
from trainables.engine.trial import Trial
from trainables.storage.kept_weights import load_weights

pytestmark = [pytest.mark.usefixtures("cpu_only"), pytest.mark.thorough]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Study:
    return confirmed_study(tmp_path_factory.mktemp("study"), "test_vit", count=12, epochs=2)


@pytest.fixture(autouse=True)
def without_refits(study: Study) -> None:
    for folder in refit_folders(study.folder):
        shutil.rmtree(folder)


def command(*arguments: object) -> tuple[int, str, str]:
    ended = CliRunner().invoke(app, list(map(str, arguments)))
    return ended.exit_code, ended.stdout, ended.stderr


def refit(study: Study, to: Path, *arguments: object) -> tuple[int, str, str]:
    return refit_in(study.folder, to, *arguments)


def refit_in(folder: Path, to: Path, *arguments: object) -> tuple[int, str, str]:
    code, out, err = command("export", folder, "--to", to, "--refit", *arguments)
    return code, out, " ".join(err.split())


@contextmanager
def settings(study: Study, old: str, new: str) -> Iterator[None]:
    """The study with other settings on the disk."""
    path = study.folder / "study.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    try:
        yield
    finally:
        path.write_text(text)


def edited(study: Study, change: Callable[[dict[str, Any]], None]) -> Path:
    """A study with the same data and a changed journal, without kept weights."""
    folder = study.folder.with_name("edited")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(study.folder / "study.yaml", folder)
    with Journal(folder / "journal.jsonl") as journal:
        for event in read_journal(study.spec, study.folder):
            fields = {name: value for name, value in event.items() if name not in ("seq", "time")}
            change(fields)
            journal.append(fields.pop("kind"), **fields)
    return folder


def test_it_is_trained_on_train_and_val_and_its_card_says_so(study: Study, tmp_path: Path) -> None:
    code, out, err = refit(study, tmp_path / "model", "--entry", "full", "--json")
    assert code == 0, err
    assert "Refit: unit 1 of 2 Refit: unit 2 of 2" in err
    values = json.loads(out)
    assert (values["refit"], values["trial"]) == (True, 1)
    (folder,) = refit_folders(study.folder)
    kept = load_weights(folder)
    store = study.prepare()
    images = len(store.labels("train")) + len(store.labels("val"))
    assert kept.meta["result"]["cost/training_images"] == images
    assert (kept.meta["role"], kept.meta["seed"]) == ("refit", 2)
    own = load_weights(weights_folder(study.folder, 1))
    assert not torch.equal(kept.tensors["head.weight"], own.tensors["head.weight"])
    # The exported model is the refit, and the test accuracy on its card is measured on it.
    model = luthier.load(tmp_path / "model")
    right = float((model.logits(np.asarray(store.images("test"))).argmax(1) == store.labels("test")).mean())
    assert right == kept.meta["result"]["test/acc"]
    card = (tmp_path / "model/README.md").read_text()
    assert f"Trained once more on training and validation pictures together ({images}); no validation number" in card
    assert "the validation pictures were trained on, so no validation number stands behind these weights." in card
    assert "## Numbers of the refit" in card
    assert "`test/acc`" in card
    assert "`val/acc`" not in card
    temperature = fold(read_journal(study.spec, study.folder))[1].metrics["calib/temperature"]
    assert f"taken over: `calib/temperature` = {temperature:.6g}" in card
    assert json.loads((tmp_path / "model/luthier.json").read_text())["card"]["taken_over"] == {
        "calib/temperature": temperature
    }


def test_equal_seeds_give_equal_tensors_and_a_second_export_trains_nothing(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refit(study, tmp_path / "first", "--trial", 1)[0] == 0
    (folder,) = refit_folders(study.folder)
    first = load_weights(folder)
    shutil.rmtree(folder)
    assert refit(study, tmp_path / "second", "--trial", 1)[0] == 0
    second = load_weights(folder)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())
    monkeypatch.setattr(Trial, "step", lambda _: pytest.fail("the refit trains again"))
    code, _, err = refit(study, tmp_path / "third", "--trial", 1)
    assert code == 0, err
    assert "Refit: unit" not in err


def test_a_refit_of_other_settings_is_trained_again(study: Study, tmp_path: Path) -> None:
    assert refit(study, tmp_path / "first", "--trial", 1)[0] == 0
    (folder,) = refit_folders(study.folder)
    before = load_weights(folder)
    with settings(study, '"batch_size": 16', '"batch_size": 8'):
        code, _, err = refit(study, tmp_path / "second", "--trial", 1)
    assert code == 0, err
    assert "is of other settings or data. The configuration is trained again." in err
    after = load_weights(folder)
    assert not torch.equal(before.tensors["head.weight"], after.tensors["head.weight"])


def test_a_damaged_refit_is_trained_again(study: Study, tmp_path: Path) -> None:
    assert refit(study, tmp_path / "first", "--trial", 1)[0] == 0
    (folder,) = refit_folders(study.folder)
    tensors = folder / "tensors.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-8] + b"\0" * 8)
    code, _, err = refit(study, tmp_path / "second", "--trial", 1)
    assert code == 0, err
    assert "the file is damaged" in err
    assert tensors.read_bytes() == content


def test_a_killed_refit_leaves_nothing_half_written(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trial.step

    def killed(trial: Trial) -> dict[str, Any]:
        if trial.unit == 1:
            raise KeyboardInterrupt
        return step(trial)

    monkeypatch.setattr(Trial, "step", killed)
    code, _, _ = refit(study, tmp_path / "model", "--trial", 1)
    assert code == 130
    assert refit_folders(study.folder) == []
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    assert refit(study, tmp_path / "model", "--trial", 1)[0] == 0


def test_it_needs_no_kept_weights_of_the_trial(study: Study, tmp_path: Path) -> None:
    """The data are then those of the journal; this study's names none."""
    pruned = edited(study, lambda event: None)
    code, _, err = refit_in(pruned, tmp_path / "model", "--trial", 1)
    assert code == 4
    assert "A refit needs the data of trial 1, but neither kept weights nor the journal" in err
    digest = study.prepare().digest

    def with_digest(event: dict[str, Any]) -> None:
        if event["kind"] == "study_started":
            event["dataset_digest"] = digest

    code, _, err = refit_in(edited(study, with_digest), tmp_path / "model", "--trial", 1)
    assert code == 0, err


def test_the_data_store_is_gone(study: Study, tmp_path: Path) -> None:
    store = Path(study.prepare().path)
    hidden = store.parent.parent / "hidden"
    store.rename(hidden)
    try:
        code, _, err = refit(study, tmp_path / "model", "--trial", 1)
    finally:
        hidden.rename(store)
    assert code == 4
    assert "A refit trains on its data store, of SHA-256" in err
    assert refit_folders(study.folder) == []


@pytest.mark.parametrize(
    ("trial", "changes", "text"),
    [
        (
            1,
            {"role": "reference"},
            "trial 1 (full) is a reference on others. Choose a search trial or a confirmed one.",
        ),
        (2, {"strategy": "prompt"}, "prompt of trial 2 cannot be trained here: A strategy is one of"),
        (
            2,
            {"strategy": "layernorm", "hparams": {"lam_choice": "learned", "lam_scope": "layer"}},
            "layernorm with lam_choice='learned' chose a λ for each layer on validation. Export the trial's own",
        ),
        (1, {"hparams": {"rate": 1}}, "full of trial 1 cannot be trained here: full has no hyperparameter 'rate'"),
    ],
)
def test_what_cannot_be_trained_again_is_refused(
    study: Study, tmp_path: Path, trial: int, changes: dict[str, Any], text: str
) -> None:
    digest = study.prepare().digest

    def change(event: dict[str, Any]) -> None:
        if event["kind"] == "study_started":
            event["dataset_digest"] = digest
        if event["kind"] == "trial_suggested" and event["number"] == trial:
            event.update(changes)
        if event["kind"] == "result" and event["trial_id"] == "t2" and "hparams" in changes:
            event["unit"] = 2  # the probe that was trained takes one unit, other strategies both

    code, _, err = refit_in(edited(study, change), tmp_path / "model", "--trial", trial)
    assert code == 2
    assert text in err
    assert not (tmp_path / "model").exists()


def test_another_budget_is_refused(study: Study, tmp_path: Path) -> None:
    with settings(study, '"epochs": 2', '"epochs": 3'):
        code, _, err = refit(study, tmp_path / "model", "--trial", 1)
    assert code == 2
    assert "trial 1 took 2 units and the study's settings give 3 today" in err


def test_prune_removes_refits(study: Study, tmp_path: Path) -> None:
    assert refit(study, tmp_path / "model", "--trial", 2)[0] == 0
    (folder,) = refit_folders(study.folder)
    copy = tmp_path / "copy"
    shutil.copytree(study.folder, copy / "pets")
    code, out, err = command("prune", copy / "pets", "--dry-run", "--json")
    assert code == 0, err
    refits = json.loads(out)["refits"]
    assert [entry["name"] for entry in refits] == [folder.name]
    assert refits[0]["bytes"] > 0
    code, out, err = command("prune", copy / "pets")
    assert code == 0, err
    assert "3 trials and 1 refit" in " ".join(out.split())
    assert refit_folders(copy / "pets") == []
