"""Synthetic checkpoints, and a process that writes three of them.

python -m tests.support.checkpoints FOLDER
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainables.storage.checkpoint_format import RunState
from trainables.storage.checkpoint_store import CheckpointStore


def state(unit: int, step: int = 0, **meta: Any) -> RunState:
    """A state with one tensor of a thousand values, each the number of the unit."""
    return RunState({"model/weight": torch.full((1000,), float(unit))}, {"unit": unit, "step": step, **meta})


def write_three_units(folder: Path) -> None:
    """Acquire the folder and save the states of units 1, 2 and 3, without the rate limit."""
    store = CheckpointStore(folder, clock=lambda: 0.0)
    store.acquire()
    for unit in (1, 2, 3):
        store.save_after_unit(partial(state, unit))


if __name__ == "__main__":
    write_three_units(Path(sys.argv[1]))
