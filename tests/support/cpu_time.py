"""CPU seconds of work in this process and in those that it starts: unlike a clock, they leave waiting out."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def cpu_seconds(work: Callable[[], object], times: int = 3) -> float:
    """The least of several runs of `work` in this process."""
    measured = []
    for _ in range(times):
        before = time.process_time()
        work()
        measured.append(time.process_time() - before)
    return min(measured)


def cpu_seconds_of_python(*arguments: str, times: int = 3) -> float:
    """The least of several runs of this interpreter with `arguments`, in the checkout's root; a failure raises."""
    measured = []
    for _ in range(times):
        before = _of_children()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        measured.append(_of_children() - before)
    return min(measured)


def _of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
