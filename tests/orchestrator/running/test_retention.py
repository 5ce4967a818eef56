"""The driver discards superseded weights once the journal has the better trial, and never before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.record.journal import Journal
from orchestrator.record.kept_files import Retention, numbers_on_disk
from orchestrator.record.kept_paths import predictions_file, weights_folder
from orchestrator.record.records import fold
from orchestrator.running.journal_callback import RecordCallback
from trainables.specs.metrics import CLASSIFICATION
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec
from trainables.storage.kept_weights import KeptWeights, save_weights

RETENTION = Retention("best", "val/acc", CLASSIFICATION)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.jsonl") as opened:
        yield opened


def tune_trial(number: int, **fields: Any) -> Any:
    shared = SharedTrialSettings(store="/data/store", model=ModelSpec(name="resnet18"))
    spec = TrialSpec(shared=shared, strategy="full", hparams={"lr_backbone": 0.1 / (number + 1)}, **fields)
    return SimpleNamespace(trial_id=f"t{number}", config=spec.to_dict() | {"_number": number}, last_result={})


def finish(callback: RecordCallback, folder: Path, number: int, accuracy: float, **fields: Any) -> None:
    """A trial of one unit that keeps weights and predictions, from its start to its end."""
    trial = tune_trial(number, **fields)
    callback.on_trial_start(0, [], trial)
    file = save_weights(
        weights_folder(folder, number), KeptWeights({"head.bias": torch.ones(3)}, {}, {"number": number})
    )
    predictions_file(folder, number).parent.mkdir(exist_ok=True)
    predictions_file(folder, number).write_bytes(b"arrow")
    result = {
        "unit": 1,
        "training_iteration": 1,
        "finished": True,
        "best/val/acc": accuracy,
        "weights": {"sha256": file.sha256, "bytes": file.bytes},
        "predictions": {"sha256": "0", "bytes": 5},
    }
    callback.on_trial_result(0, [], trial, result)
    callback.on_trial_complete(0, [], trial)


def test_a_better_trial_supersedes_and_a_worse_one_is_not_kept(journal: Journal, tmp_path: Path) -> None:
    callback = RecordCallback(journal, folder=tmp_path, retention=RETENTION)
    finish(callback, tmp_path, 0, 0.8)
    assert numbers_on_disk(tmp_path) == [0]
    finish(callback, tmp_path, 1, 0.9)
    assert numbers_on_disk(tmp_path) == [1]
    finish(callback, tmp_path, 2, 0.7)
    assert numbers_on_disk(tmp_path) == [1]
    finish(callback, tmp_path, 3, 0.6, role="confirm", seed=9)
    assert numbers_on_disk(tmp_path) == [1, 3]
    events = [(e["kind"], e["trial_id"], e.get("why")) for e in journal.events() if e["kind"] != "trial_suggested"]
    assert [e for e in events if e[0] in ("trial_finished", "weights_discarded")] == [
        ("trial_finished", "t0", None),
        ("trial_finished", "t1", None),
        ("weights_discarded", "t0", "superseded"),
        ("trial_finished", "t2", None),
        ("weights_discarded", "t2", "superseded"),
        ("trial_finished", "t3", None),
    ]
    assert [record.weights is not None for record in fold(journal.events())] == [False, True, False, True]
    assert callback.problems == []


def test_a_driver_that_knows_earlier_trials_compares_with_them(journal: Journal, tmp_path: Path) -> None:
    finish(RecordCallback(journal, folder=tmp_path, retention=RETENTION), tmp_path, 0, 0.9)
    finish(RecordCallback(journal, folder=tmp_path, retention=RETENTION), tmp_path, 1, 0.8)
    assert numbers_on_disk(tmp_path) == [0]


def test_the_journal_has_what_is_kept_with_the_last_result(journal: Journal, tmp_path: Path) -> None:
    finish(RecordCallback(journal, folder=tmp_path, retention=RETENTION), tmp_path, 0, 0.9)
    (event,) = [e for e in journal.events() if e["kind"] == "result"]
    assert event["predictions"] == {"sha256": "0", "bytes": 5}
    assert set(event["weights"]) == {"sha256", "bytes"}
    assert "weights" not in event["metrics"]
