"""Format of kept weights: whole or an error, whatever happens to its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from trainables.specs import fault_injection
from trainables.specs.fault_injection import ENV_FAULTS
from trainables.storage import checkpoint_format
from trainables.storage.kept_weights import KeptWeights, WeightsError, discard_weights, load_weights, save_weights

ROOT = str(Path(__file__).parents[3])
META: dict[str, Any] = {"number": 7, "classes": ["cat", "dog"], "result": {"test/acc": 0.9}}


def weights(value: float = 1.0) -> KeptWeights:
    return KeptWeights(
        tensors={"head.weight": torch.full((2, 3), value), "backbone.norm.num_batches_tracked": torch.tensor(5)},
        meta=META,
        adapter={"backbone.qkv.lora_A": torch.tensor([[0.0, -0.0, float("nan")]])},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights" / "trial-0007"


def test_what_was_saved_is_loaded_bit_for_bit(folder: Path) -> None:
    saved = weights()
    file = save_weights(folder, saved)
    loaded = load_weights(folder)
    assert loaded.meta == META
    for kept, original in ((loaded.tensors, saved.tensors), (loaded.adapter, saved.adapter)):
        assert kept.keys() == original.keys()
        for name, tensor in kept.items():
            assert tensor.dtype == original[name].dtype
            assert tensor.numpy().tobytes() == original[name].numpy().tobytes()
    assert file.bytes == (folder / "tensors.safetensors").stat().st_size
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "tensors.safetensors"]


def test_a_later_attempt_takes_the_place_of_an_earlier_one(folder: Path) -> None:
    first = save_weights(folder, weights(1.0))
    leftover = folder.with_name(".trial-0007-0123456789ab")
    leftover.mkdir()
    second = save_weights(folder, weights(2.0))
    assert first.sha256 != second.sha256
    assert load_weights(folder).tensors["head.weight"].unique().tolist() == [2.0]
    assert [path.name for path in folder.parent.iterdir()] == ["trial-0007"]


@pytest.mark.parametrize("file", ["tensors.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_s12_any_damage_is_detected(folder: Path, file: str, damage: str) -> None:
    save_weights(folder, weights())
    content = bytearray((folder / file).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        (folder / file).write_bytes(content)
    elif damage == "cut":
        (folder / file).write_bytes(content[:-20])
    else:
        (folder / file).unlink()
    with pytest.raises(WeightsError) as error:
        load_weights(folder)
    assert str(folder) in str(error.value)


def test_the_message_of_damaged_tensors(folder: Path) -> None:
    file = save_weights(folder, weights())
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(WeightsError) as error:
        load_weights(folder)
    message = str(error.value)
    assert message.startswith(f"Kept weights must match their SHA-256 {file.sha256[:12]}… and size {file.bytes}, but")
    assert message.endswith("Restore it from a copy, or train the configuration again.")


def test_another_format_is_refused_with_its_number(folder: Path) -> None:
    save_weights(folder, weights())
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(WeightsError, match=r"Kept weights of format 1 can be read, but .* has format 99"):
        load_weights(folder)


def test_discarding_leaves_nothing_and_needs_nothing(folder: Path) -> None:
    save_weights(folder, weights())
    discard_weights(folder)
    assert list(folder.parent.iterdir()) == []
    discard_weights(folder)


def test_s12_a_full_disk_is_an_error_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_FAULTS, "phase=in_weights,action=full")
    fault_injection.reset_faults()
    try:
        with pytest.raises(OSError, match="No space left on device"):
            save_weights(folder, weights())
    finally:
        monkeypatch.undo()
        fault_injection.reset_faults()
    assert list(folder.parent.iterdir()) == []


CHILD = """
import sys, torch
from trainables.storage import kept_weights
from trainables.storage.kept_weights import KeptWeights, save_weights
save_weights(sys.argv[1], KeptWeights({"head.weight": torch.ones(1000)}, {}, {"number": 7}))
"""


def test_s12_a_process_killed_while_it_writes_leaves_nothing_that_counts(folder: Path) -> None:
    environment = {**os.environ, ENV_FAULTS: "phase=in_weights,action=kill"}
    command = [sys.executable, "-c", CHILD, str(folder)]
    code = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True).returncode
    assert code == -signal.SIGKILL
    assert not folder.exists()
    with pytest.raises(WeightsError, match="Kept weights are a folder with"):
        load_weights(folder)
    assert len(list(folder.parent.iterdir())) == 1, "the temporary folder of the killed process"
    save_weights(folder, weights())
    assert [path.name for path in folder.parent.iterdir()] == ["trial-0007"]


def test_s12_an_error_of_safetensors_itself_is_one_of_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library has a type of its own for a full disk, which no other code takes for one."""

    def refuse(*arguments: Any, **_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_format, "save_file", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        save_weights(folder, weights())
    assert list(folder.parent.iterdir()) == []
