"""Random numbers of a trial: every stretch of work gets its own seeded streams and leaves none of them behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators inside the block and restore them afterwards.

    What a unit draws (dropout, stochastic depth) then depends on `seed` alone: not on earlier units, so that resuming
    is exact, and not on other trials of the process.

    Args:
        seed: from `trainables.core.task.stream_seed`.
        device: the device whose generator is seeded beside the CPU's.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
