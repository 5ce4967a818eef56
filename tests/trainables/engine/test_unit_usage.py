"""Use of the machine that a trial records with every unit."""

from __future__ import annotations

import time

import pytest
import torch

from tests.support.trials import MakeTrial
from trainables.engine.unit_usage import UnitUsage


def test_every_unit_records_cores_and_memory(make_trial: MakeTrial) -> None:
    trial = make_trial("full", "cnn")
    results = [trial.step()]
    while not trial.finished:
        results.append(trial.step())
    for result in results:
        assert 0 < result["cost/cpu_use"] < 64
        # Not exactly below the peak: the kernel adds up the pages of a process's threads now and then only.
        assert 10e6 < result["cost/host_bytes"] <= 1.01 * results[-1]["cost/peak_host_bytes"]
        assert ("cost/gpu_bytes" in result) == (trial.device.type == "cuda")


def test_a_busy_core_is_1_and_a_pause_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = iter([100.0, 104.0, 104.0, 106.0])
    cpu = iter([10.0, 18.0, 18.0, 18.0])
    usage = UnitUsage(torch.device("cpu"))
    monkeypatch.setattr(time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(time, "process_time", lambda: next(cpu))
    usage.start()
    busy = usage.metrics()
    usage.start()
    idle = usage.metrics()
    assert (busy["cost/cpu_use"], idle["cost/cpu_use"]) == (2.0, 0.0)


class TestGpu:
    """With PyTorch's functions replaced: what is read, how often, and what a failure costs."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 50.0
        self.readings = iter([20, 80, 50])
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3_000_000)
        monkeypatch.setattr(torch.cuda, "utilization", lambda device: next(self.readings))

    def test_one_reading_per_second_of_training(self) -> None:
        usage = UnitUsage(torch.device("cuda"))
        for _ in range(15):
            usage.sample()
            self.now += 0.1
        metrics = usage.metrics()
        assert metrics["cost/gpu_use"] == pytest.approx(0.5)
        assert metrics["cost/gpu_bytes"] == 3e6
        usage.start()
        self.now += 1.0
        assert "cost/gpu_use" not in usage.metrics(), "readings of the unit before"

    def test_without_nvml_the_rest_is_recorded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def refuse(device: torch.device) -> int:
            calls.append(device)
            raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.")

        monkeypatch.setattr(torch.cuda, "utilization", refuse)
        usage = UnitUsage(torch.device("cuda"))
        for _ in range(3):
            usage.sample()
            self.now += 2.0
        assert usage.metrics().keys() >= {"cost/cpu_use", "cost/gpu_bytes"}
        assert "cost/gpu_use" not in usage.metrics()
        assert len(calls) == 1
