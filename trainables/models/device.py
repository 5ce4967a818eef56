"""Device that trials train on."""

from __future__ import annotations

import functools
import logging

import torch

log = logging.getLogger("luthier")


def training_device() -> torch.device:
    """The GPU if there is one that can be used, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        _explain_mps()
    return torch.device("cpu")


def uses_channels_last(device: torch.device, setting: bool | None) -> bool:
    """Whether networks and images are channels last on a device.

    Args:
        device: where a trial trains.
        setting: `SharedTrialSettings.channels_last`; None = on a GPU, where convolutions need no transposition then.
    """
    return device.type == "cuda" if setting is None else setting


@functools.cache
def _explain_mps() -> None:
    """Log, once per process, why an Apple GPU is idle."""
    log.warning(
        "Trials need a CUDA GPU or a CPU, and this machine has an Apple GPU (mps), which lacks float64, the type "
        "in which losses, metrics and diagnostics are summed. Trials run on the CPU."
    )
