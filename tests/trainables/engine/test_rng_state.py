"""Global generators inside and after the block."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from trainables.engine.rng_state import isolated_randomness

CPU = torch.device("cpu")


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_seed_alone_decides_and_nothing_is_left_behind() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    undisturbed = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with isolated_randomness(2**62 + 5, CPU):
        first = draws()
    assert draws() == undisturbed
    with isolated_randomness(2**62 + 5, CPU):
        assert draws() == first
    with isolated_randomness(2**62 + 6, CPU):
        assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_generators_come_back_after_an_error() -> None:
    torch.manual_seed(3)
    expected = float(torch.rand(()))
    torch.manual_seed(3)
    with pytest.raises(KeyError), isolated_randomness(0, CPU):
        raise KeyError(float(torch.rand(())))
    assert float(torch.rand(())) == expected
