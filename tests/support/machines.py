"""A study on two machines, one of which dies.

    python -m tests.support.machines study.yaml            while both train
    python -m tests.support.machines study.yaml in_weights while a trial of it writes its kept weights

A process of its own: Ray ends a process that was connected to a cluster a minute after the cluster's head is gone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from benchmarks.support.killed_study import count_events, start
from benchmarks.support.soak_machines import Machines, machines
from trainables.specs.fault_injection import ENV_FAULT_LOG, ENV_FAULTS

BOTH_TRAIN = 7
"""Events in the journal when each of the two machines has a trial."""


def lose_a_machine(file: Path, phase: str | None = None) -> int:
    """Run a study and kill one of its machines; returns the driver's exit code.

    Args:
        phase: kill the machine of the first trial that reaches this fault point, where it is held; None = any machine,
            while both train.
    """
    pause = threading.Event()
    log = file.parent / "faults"
    faults: Mapping[str, str] = {}
    if phase is not None:
        faults = {ENV_FAULTS: f"phase={phase},action=hang", ENV_FAULT_LOG: str(log)}
    with machines(faults) as cluster:
        driver = start(file, **cluster.settings)
        while driver.poll() is None and not (count_events(file) >= BOTH_TRAIN if phase is None else log.exists()):
            pause.wait(0.02)
        cluster.kill_node(0 if phase is None else _machine_of(cluster, log))
        return driver.wait()


def _machine_of(cluster: Machines, log: Path) -> int:
    """The machine of the process that the log of faults names."""
    pause = threading.Event()
    while "pid=" not in log.read_text():
        pause.wait(0.02)
    pid = int(log.read_text().rpartition("pid=")[2])
    ancestors = set[int]()
    while pid > 1:
        ancestors.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return next(
        index
        for index, node in enumerate(cluster.nodes)
        if ancestors & {process.process.pid for process in node.all_processes["raylet"]}
    )


if __name__ == "__main__":
    sys.exit(lose_a_machine(Path(sys.argv[1]), *sys.argv[2:]))
