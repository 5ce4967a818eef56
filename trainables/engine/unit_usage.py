"""What a unit takes of its machine: cores, memory, GPU; of the trial's own process where the system separates them."""

from __future__ import annotations

import math
import time

import torch

from trainables.engine.peak_memory import host_memory
from trainables.specs.metrics import CPU_USE, GPU_BYTES, GPU_USE, HOST_BYTES

READING_INTERVAL_S = 1.0
"""Time between two readings of the GPU's utilisation, which NVML averages over up to a second."""


class UnitUsage:
    """Usage of one unit at a time, without a thread: the GPU is read between optimiser steps.

    Args:
        device: on which the trial trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Reading needs nvidia-ml-py, which a machine for training may lack; one failure is enough to know that.
        self._is_readable = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """Begin a unit."""
        self._began = time.perf_counter()
        self._cpu_began = time.process_time()
        self._last_reading = -math.inf
        self._readings: list[float] = []

    def sample(self) -> None:
        """Read the GPU's utilisation, once per `READING_INTERVAL_S` at most."""
        if not self._is_readable:
            return
        now = time.perf_counter()
        if now - self._last_reading < READING_INTERVAL_S:
            return
        self._last_reading = now
        try:
            self._readings.append(torch.cuda.utilization(self._device) / 100)
        except Exception:  # nvidia-ml-py is missing, or NVML has errors of its own: a cost is not worth a trial
            self._is_readable = False

    def metrics(self) -> dict[str, float]:
        """Usage since `start` by recorded name; what the system does not report is left out."""
        seconds = time.perf_counter() - self._began
        values = {CPU_USE.name: (time.process_time() - self._cpu_began) / seconds}
        resident = host_memory("VmRSS")
        if resident is not None:
            values[HOST_BYTES.name] = resident
        if self._device.type == "cuda":
            values[GPU_BYTES.name] = float(torch.cuda.memory_reserved(self._device))
        if self._readings:
            values[GPU_USE.name] = sum(self._readings) / len(self._readings)
        return values
