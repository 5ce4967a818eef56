"""Checkpoints: what is stored, what is verified, what happens to damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trainables.storage.checkpoint_format import (
    CheckpointError,
    RunState,
    changed_tensors,
    load_newest,
    load_state,
    save_state,
)

STATE = RunState(
    {"model/a": torch.arange(6.0).view(2, 3).t(), "optimizer/a/step": torch.tensor(3.0), "best/n": torch.tensor(7)},
    {"unit": 2, "best": {"unit": 1, "accuracy": 0.1 + 0.2}},
)


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_state(tmp_path / "checkpoint", STATE)
    loaded = load_state(tmp_path / "checkpoint")
    assert loaded.meta == STATE.meta
    assert loaded.tensors.keys() == STATE.tensors.keys()
    for name, tensor in STATE.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def test_an_empty_folder_is_filled_and_no_temporary_file_remains(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    save_state(tmp_path / "checkpoint", STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == ["manifest.json", "tensors.safetensors"]


def test_an_existing_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    save_state(tmp_path / "checkpoint", STATE)
    with pytest.raises(FileExistsError, match="written to a new or empty folder"):
        save_state(tmp_path / "checkpoint", STATE)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_state(tmp_path / "checkpoint", RunState({}, {"unit": object()}))
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_is_detected(tmp_path: Path) -> None:
    save_state(tmp_path / "checkpoint", STATE)
    file = tmp_path / "checkpoint" / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"must match their SHA-256 .* the file is damaged. Use an earlier"):
        load_state(tmp_path / "checkpoint")


def test_s6_every_flipped_bit_of_the_manifest_is_detected(tmp_path: Path) -> None:
    """A changed digit of a unit or an accuracy is still valid JSON."""
    save_state(tmp_path / "checkpoint", STATE)
    file = tmp_path / "checkpoint" / "manifest.json"
    content = file.read_bytes()
    undetected = []
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            loaded = load_state(tmp_path / "checkpoint")
        except CheckpointError:
            continue
        if loaded.meta != STATE.meta:
            undetected.append((bit, loaded.meta))
    assert undetected == []


def test_a_missing_or_foreign_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"A checkpoint has a readable manifest\.json"):
        load_state(tmp_path / "none")
    save_state(tmp_path / "new", STATE)
    file = tmp_path / "new" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 9}))
    with pytest.raises(CheckpointError) as error:
        load_state(tmp_path / "new")
    assert str(error.value) == f"Checkpoints of format 2 can be read, but {tmp_path / 'new'} has format 9."


def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, unit in ((0, 1), (1, 2), (2, 3)):
        save_state(tmp_path / f"checkpoint_{number:06d}", RunState({}, {"unit": unit}))
    (tmp_path / "checkpoint_000002" / "manifest.json").write_text("{")
    loaded = load_newest(tmp_path / "checkpoint_000002")
    assert loaded is not None
    assert loaded.meta == {"unit": 2}
    assert [r.getMessage()[:21] for r in caplog.records] == ["Skipped a checkpoint."]


def test_without_an_intact_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "checkpoint_000000") is None


def test_changed_tensors() -> None:
    reference = {"same": torch.ones(2), "zero": torch.zeros(2), "moved": torch.ones(2), "nan": torch.tensor(torch.nan)}
    current = {
        "same": torch.ones(2),
        "zero": -torch.zeros(2),
        "moved": torch.ones(2) + 1e-7,
        "nan": torch.tensor(torch.nan),
        "new": torch.ones(1, dtype=torch.int64),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    assert sorted(changed_tensors(current, reference)) == ["half", "moved", "new", "zero"]
