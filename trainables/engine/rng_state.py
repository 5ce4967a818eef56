"""Random numbers of a trial: separate seeded streams, global generators restored."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def isolated_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators inside the block and restore them afterwards.

    What a unit draws (dropout, stochastic depth) then depends on `seed` alone: not on earlier units, so that resuming
    is exact, and not on other trials of the process.

    Args:
        seed: from `trainables.specs.seeds.stream_seed`.
        device: the device whose generator is seeded beside the CPU's.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            # NumPy's legacy generator accepts 32 bits only.
            np.random.seed(seed % 2**32)
            # Not `torch.manual_seed`: that seeds every GPU, also those that `fork_rng` does not restore.
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of Python's, NumPy's and torch's global generators, as tensors."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    # `set_generator_states` writes this layout back; another one must fail here, not at a resume.
    assert (version, kind) == (3, "MT19937")
    # All as tensors: a checkpoint holds tensors and JSON, no pickle. NaN = no second Gaussian number is waiting.
    states = {
        "torch": torch.random.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generator_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `generator_states` returned; a state of another kind of device is left out."""
    torch.random.set_rng_state(states["torch"].cpu())
    gauss = float(states["python_gauss"])
    random.setstate((3, tuple(states["python"].tolist()), None if math.isnan(gauss) else gauss))
    position, has_gauss, cached = states["numpy_rest"].tolist()
    np.random.set_state(("MT19937", states["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
