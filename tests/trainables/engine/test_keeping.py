"""A Tune trial keeps weights and predictions before its last result is reported; faults cost files, never the trial."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.support.synthetic import CLASSES, SIZES, write_shapes
from trainables.engine.tune_trainable import TuneTrainable
from trainables.specs import fault_injection
from trainables.specs.errors import FencedError
from trainables.specs.fault_injection import ENV_FAULTS
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec
from trainables.storage import checkpoint_store
from trainables.storage.checkpoint_store import CheckpointStore
from trainables.storage.kept_weights import load_weights

pytestmark = pytest.mark.usefixtures("cpu_only")

ROOT = str(Path(__file__).parents[3])


@pytest.fixture(scope="module")
def task(
    tmp_path_factory: pytest.TempPathFactory, network: Callable[[str], str], one_thread: None
) -> SharedTrialSettings:
    root = tmp_path_factory.mktemp("keeping")
    write_shapes(root / "store")
    model = ModelSpec(name=network("cnn"))
    return SharedTrialSettings(
        store=str(root / "store"), model=model, epochs=2, batch_size=16, cache=str(root / "cache")
    )


@pytest.fixture
def config(task: SharedTrialSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(checkpoint_store, "MIN_INTERVAL_FACTOR", 0)
    spec = TrialSpec(shared=task, strategy="daft", hparams={"lr_head": 0.1}, seed=5)
    return spec.to_dict() | {
        "_number": 7,
        "_checkpoints": str(tmp_path / "checkpoints" / "trial-0007"),
        "_weights": str(tmp_path / "weights" / "trial-0007"),
        "_predictions": str(tmp_path / "predictions" / "trial-0007.arrow"),
    }


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`faulty(text)`: these faults from now on."""

    def inject(text: str) -> None:
        monkeypatch.setenv(ENV_FAULTS, text)
        fault_injection.reset_faults()

    yield inject
    monkeypatch.delenv(ENV_FAULTS, raising=False)
    fault_injection.reset_faults()


def last_result(config: dict[str, Any]) -> dict[str, Any]:
    trial = TuneTrainable(config)
    result = trial.train()
    while not result["done"]:
        result = trial.train()
    return dict(result)


def predictions_of(config: dict[str, Any]) -> pa.Table:
    with pa.memory_map(config["_predictions"]) as file:
        return pa.ipc.open_file(file).read_all()


def test_the_last_result_names_what_is_kept(config: dict[str, Any]) -> None:
    result = last_result(config)
    weights = load_weights(config["_weights"])
    file = Path(config["_weights"]) / "tensors.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert result["weights"] == {"sha256": digest, "bytes": file.stat().st_size}
    content = Path(config["_predictions"]).read_bytes()
    assert result["predictions"] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert (weights.meta["number"], weights.meta["strategy"], weights.meta["classes"]) == (7, "daft", list(CLASSES))
    assert weights.meta["result"]["test/acc"] == result["test/acc"]


def test_predictions_give_the_recorded_numbers(config: dict[str, Any]) -> None:
    result = last_result(config)
    table = predictions_of(config)
    splits = table["split"].to_pylist()
    order = ["val", "test", "ood/inverted", "ood/noisy"]
    assert splits == [split for split in order for _ in range(SIZES[split])]
    assert table.schema.names == ["split", "name", "target", "output", "stat/correct", "stat/nll"]
    assert str(table.schema.field("output").type) == "fixed_size_list<item: float>[4]"
    outputs = np.array(table["output"].to_pylist(), dtype=np.float32)
    correct = outputs.argmax(1) == table["target"].to_numpy()
    assert correct.tolist() == table["stat/correct"].to_pylist()
    for split, name in (("val", "best/val/acc"), ("test", "test/acc"), ("ood/noisy", "ood/noisy/acc")):
        rows = [index for index, value in enumerate(splits) if value == split]
        assert correct[rows].mean() == result[name]
        assert table["name"].to_pylist()[rows[0]] == f"{split}/0"
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert (metadata["number"], metadata["seed"], metadata["task"]) == ("7", "5", "classification")


def test_keeping_changes_no_number(config: dict[str, Any]) -> None:
    kept = last_result(config)
    plain = last_result({k: v for k, v in config.items() if not k.startswith("_")})
    names = [name for name in plain if "/" in name and not name.startswith("cost/")]
    assert {name: kept[name] for name in names} == {name: plain[name] for name in names}


def test_a_trial_that_keeps_nothing_writes_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    result = last_result({k: v for k, v in config.items() if k not in ("_weights", "_predictions")})
    assert not {"weights", "predictions"} & result.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("kind", ["weights", "predictions"])
@pytest.mark.parametrize(("action", "text"), [("full", "No space left"), ("io_error", "Input/output error")])
def test_s12_a_disk_that_refuses_costs_the_files_and_not_the_trial(
    config: dict[str, Any], faulty: Callable[[str], None], kind: str, action: str, text: str
) -> None:
    faulty(f"phase=in_{kind},action={action}")
    result = last_result(config)
    assert result["finished"] is True
    (problem,) = result["checkpoint_problems"]
    assert problem.startswith(f"No {kind} could be kept in {config[f'_{kind}']}: ")
    assert text in problem
    assert kind not in result
    other = {"weights": "predictions", "predictions": "weights"}[kind]
    assert other in result
    assert list(Path(config[f"_{kind}"]).parent.iterdir()) == []


def test_without_pyarrow_no_predictions_are_kept_and_that_is_said(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainables.engine import tune_trainable

    def missing(*arguments: Any) -> None:
        raise ModuleNotFoundError("No module named 'pyarrow'")

    monkeypatch.setattr(tune_trainable, "save_predictions", missing)
    result = last_result(config)
    assert "weights" in result
    assert result["checkpoint_problems"] == [
        f"No predictions could be kept in {config['_predictions']}: No module named 'pyarrow'"
    ]


CHILD = """
import json, sys, torch
torch.set_num_threads(1)
from trainables.storage import checkpoint_store
from trainables.engine.tune_trainable import TuneTrainable
checkpoint_store.MIN_INTERVAL_FACTOR = 0
trial = TuneTrainable(json.load(open(sys.argv[1])))
while not trial.train()["done"]:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["in_weights", "in_predictions", "after_kept", "after_checkpoint"])
def test_s12_a_process_killed_around_its_last_checkpoint_leaves_whole_files_that_are_reported(
    config: dict[str, Any], tmp_path: Path, phase: str
) -> None:
    """Between writing and record: whoever continues the trial reports what is there, or writes it again."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    environment = {**os.environ, ENV_FAULTS: f"trial=7,unit=2,phase={phase},action=kill"}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "config.json")]
    assert subprocess.run(command, env=environment, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert Path(config["_weights"]).exists() is (phase != "in_weights")
    assert Path(config["_predictions"]).exists() is (phase in ("after_kept", "after_checkpoint"))
    result = last_result(config)
    file = Path(config["_weights"]) / "tensors.safetensors"
    assert result["weights"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert result["predictions"]["sha256"] == hashlib.sha256(Path(config["_predictions"]).read_bytes()).hexdigest()
    load_weights(config["_weights"])
    assert predictions_of(config).num_rows == sum(SIZES.values()) - SIZES["train"]
    for folder in ("weights", "predictions"):
        assert [path.name for path in (tmp_path / folder).glob(".*")] == []


def test_p9_a_fenced_process_keeps_nothing(config: dict[str, Any]) -> None:
    """It was stopped before its last unit, and another process has taken the trial since."""
    trial = TuneTrainable(config)
    trial.train()
    CheckpointStore(config["_checkpoints"]).acquire()
    with pytest.raises(FencedError):
        trial.train()
    assert not Path(config["_weights"]).exists()
    assert not Path(config["_predictions"]).exists()
