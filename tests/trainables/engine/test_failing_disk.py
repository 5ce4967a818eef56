"""S4: a disk that refuses once (EIO on write, fsync or rename) costs a checkpoint at most, and none that is damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables.storage.checkpoint_format import RunState
from trainables.storage.checkpoint_store import CheckpointStore, list_checkpoints

Refusing = Callable[[int], None]


def state(unit: int) -> RunState:
    return RunState({"model/weight": torch.full((1000,), float(unit))}, {"unit": unit, "step": 0})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """The trial's own, after one unit; checkpoints cost nothing, so that each unit gets one."""
    store = CheckpointStore(tmp_path / "checkpoints" / "trial-0003", clock=lambda: 0.0)
    store.acquire()
    store.save_after_unit(lambda: state(1))
    return store


@pytest.fixture(params=["fsync", "replace"])
def refusing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Refusing:
    """`refusing(n)`: the n-th call from now on fails."""
    real = getattr(os, request.param)
    name = request.param
    left = [0]

    def call(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, os.strerror(5))
        return real(*arguments)

    def arm(count: int) -> None:
        left[0] = count

    monkeypatch.setattr(os, name, call)
    return arm


@pytest.mark.parametrize("count", [1, 2, 3])
def test_s4_a_checkpoint_that_the_disk_refused_is_not_announced_and_the_next_one_is(
    store: CheckpointStore, refusing: Refusing, count: int
) -> None:
    refusing(count)
    store.save_after_unit(lambda: state(2))
    visible = [stored.meta["unit"] for _, stored in store.valid_states()]
    assert visible in ([1], [2, 1])  # a late failure, of the folder's own sync, leaves a whole checkpoint
    assert all("could not be written" not in path.name for path in list_checkpoints(store.folder))
    if visible == [1]:
        expected = [f"No checkpoint could be written to {store.folder / 'unit-000002'}: [Errno 5] Input/output error"]
        assert store.problems == expected
    refusing(0)
    store.save_after_unit(lambda: state(3))
    assert [stored.meta["unit"] for _, stored in store.valid_states()] == [3, visible[0]]
    assert [path.name for path in store.folder.glob(".*")] == []


def test_s4_the_fault_of_the_soak_does_the_same(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainables.specs import fault_injection

    monkeypatch.setenv(fault_injection.ENV_FAULTS, "phase=in_checkpoint,action=io_error")
    fault_injection.reset_faults()
    try:
        store.save_after_unit(lambda: state(2))
        assert [state.meta["unit"] for _, state in store.valid_states()] == [1]
        store.save_after_unit(lambda: state(3))
    finally:
        fault_injection.reset_faults()
    assert [state.meta["unit"] for _, state in store.valid_states()] == [3, 1]
    assert len(store.problems) == 1
