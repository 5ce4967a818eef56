"""Niceness of the process that trains a trial."""

from __future__ import annotations

import os


def raise_niceness(nice: int) -> None:
    """Raise the niceness of the calling thread, and of threads that it starts, to `nice`.

    A process that is nicer already stays so: only root may lower a niceness, and one that was chosen where the cluster
    was started is not undone.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) < nice:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
