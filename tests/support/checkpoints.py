"""Checkpoints of trials that nobody trained, and a process that writes three of them.

python -m tests.support.checkpoints FOLDER
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainables.storage.checkpoint_format import RunState
from trainables.storage.checkpoint_store import Keeper


def state(unit: int, step: int = 0, **meta: Any) -> RunState:
    """A state of one tensor, whose thousand values are the unit's number."""
    return RunState({"model/weight": torch.full((1000,), float(unit))}, {"unit": unit, "step": step, **meta})


def write_three_units(folder: Path) -> None:
    """Claim the folder and keep the states of units 1, 2 and 3, however little time has passed between them."""
    keeper = Keeper(folder)
    keeper.claim()
    for unit in (1, 2, 3):
        keeper._cost = 0.0
        keeper.unit_done(partial(state, unit))


if __name__ == "__main__":
    write_three_units(Path(sys.argv[1]))
