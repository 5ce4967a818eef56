"""Cost that a trial records beside its time."""

from __future__ import annotations

import pytest
import torch

from tests.support.trials import MakeTrial
from trainables.engine.peak_memory import PeakMemory


def test_a_trial_records_parameters_and_peak_memory(make_trial: MakeTrial) -> None:
    trial = make_trial("linear_probe", "cnn")
    result = trial.step()
    assert result["cost/parameters"] == sum(parameter.numel() for parameter in trial.model.parameters())
    assert result["cost/trainable_parameters"] < result["cost/parameters"]
    assert result["cost/peak_host_bytes"] > result["cost/parameters"] * 4


def test_a_peak_is_that_of_the_trial_and_not_of_an_earlier_one() -> None:
    before = PeakMemory(torch.device("cpu"))
    memory = torch.ones(100_000_000)
    high = before.metrics()["cost/peak_host_bytes"]
    del memory
    after = PeakMemory(torch.device("cpu")).metrics()["cost/peak_host_bytes"]
    if after == high:
        pytest.skip("this system does not reset the peak (/proc/self/clear_refs)")
    assert after < high - 200e6
