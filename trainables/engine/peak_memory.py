"""Peak memory of a trial.

Of its process on the host and, on a GPU, of PyTorch's allocator.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from trainables.specs.metrics import PEAK_GPU_BYTES, PEAK_HOST_BYTES

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peaks from its construction on; one per trial, because a process trains several."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # 5 resets the peak to the present size (Linux, proc(5)). Elsewhere the peak is that of the whole process.
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def metrics(self) -> dict[str, float]:
        """Peaks in bytes by recorded name.

        That of the host is left out where the system does not report it.
        """
        peaks = {}
        host = host_memory("VmHWM")
        if host is not None:
            peaks[PEAK_HOST_BYTES.name] = host
        if self._device.type == "cuda":
            peaks[PEAK_GPU_BYTES.name] = float(torch.cuda.max_memory_allocated(self._device))
        return peaks


def host_memory(field: str) -> float | None:
    """A size of this process in bytes by its name in `/proc/self/status`; None where there is no such file.

    Args:
        field: `VmHWM`, the peak resident set size, or `VmRSS`, the present one (proc(5)).
    """
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                # The kernel's kB are 1024 bytes.
                return 1024 * float(line.split()[1])
    return None
