"""A study on two machines, one of which dies.

    python -m tests.support.machines study.yaml

A process of its own: Ray ends a process that was connected to a cluster a minute after the cluster's head is gone.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from benchmarks.support.killed_study import count_events, start
from benchmarks.support.soak_machines import machines

BOTH_TRAIN = 7
"""Events in the journal when each of the two machines has a trial."""


def lose_a_machine(file: Path) -> int:
    """Run a study, kill one of its machines while both train; returns the driver's exit code."""
    pause = threading.Event()
    with machines({}) as cluster:
        driver = start(file, **cluster.settings)
        while driver.poll() is None and count_events(file) < BOTH_TRAIN:
            pause.wait(0.02)
        cluster.kill_node(0)
        return driver.wait()


if __name__ == "__main__":
    sys.exit(lose_a_machine(Path(sys.argv[1])))
