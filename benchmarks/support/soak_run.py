"""A study driven to its end through all faults of a schedule, by Luthier or by plain Ray Tune."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.support.soak_driver import STALLS
from benchmarks.support.soak_faults import BEGUN, Schedule
from benchmarks.support.soak_machines import ROOT, Machines, Tracker

LOG = "faults"
FAILURES = 4
"""Drivers that may fail by themselves, while nothing is broken, before the study is aborted."""
AWAY = {"node killed": 8.0, "tracker killed": 10.0, "tracker stopped (SIGSTOP)": 10.0}
"""Duration of an outage, in seconds."""
FROZEN = 60.0
"""Seconds after which a stopped trial is continued, if it is still alive."""
_LINE = re.compile(r"(?P<fault>.*) @ .*trial=(?P<trial>\d+),unit=(?P<unit>\d+).*pid=(?P<pid>\d+)")


@dataclass
class Outcome:
    """Counts and times of one soak."""

    seconds: float = 0.0
    drivers: int = 0
    failures: int = 0
    """Drivers that failed by themselves."""
    finished: bool = False
    faults: Counter[str] = field(default_factory=Counter)
    """Kind → faults that hit."""
    begun: int = 0
    """Units begun, with repetitions."""
    repeated: int = 0
    """Units begun more than once."""
    longest_stall: float = 0.0
    """Longest time for which a callback blocked Tune's loop, in seconds."""


class Soak:
    """Drives one study.

    Args:
        side: `luthier` or `plain`.
        folder: of the study.
        schedule: the faults.
        damage: truncates the newest checkpoint of a trial; False = there is none.
        patience: time limit of the study, in seconds.
    """

    def __init__(
        self,
        side: str,
        folder: Path,
        schedule: Schedule,
        machines: Machines,
        tracker: Tracker,
        damage: Callable[[], bool],
        patience: float = 1200.0,
    ) -> None:
        self.side = side
        self.folder = folder
        self.machines = machines
        self.tracker = tracker
        self.outcome = Outcome()
        self._due = list(schedule.outside)
        self._damage = damage
        self._patience = patience
        self._mending: tuple[float, str, Callable[[], object]] | None = None
        self._woken: set[int] = set()
        self._turn = 0
        self._futile = 0
        self._driver: subprocess.Popen[bytes] | None = None

    def run(self) -> Outcome:
        """Drive the study until it is done or aborted."""
        began = time.monotonic()
        pause = threading.Event()
        try:
            self._start()
            while time.monotonic() - began < self._patience and self._is_running():
                self._wake()
                self._mend()
                if self._due and self.begun >= self._due[0][0] and self._mending is None and self.tracker.answers():
                    self._hit(self._due.pop(0)[1])
                pause.wait(0.1)
            self.outcome.seconds = time.monotonic() - began
        finally:
            self._stop()
        self._count()
        return self.outcome

    @property
    def begun(self) -> int:
        """Different units that were begun."""
        return len({(line["trial"], line["unit"]) for line in self._lines() if line["fault"] == BEGUN})

    def _lines(self) -> Iterator[re.Match[str]]:
        file = self.folder / LOG
        for line in file.read_text().splitlines() if file.exists() else []:
            match = _LINE.fullmatch(line)
            if match is not None:
                yield match

    def _start(self) -> None:
        self.outcome.drivers += 1
        command = [sys.executable, "-m", "benchmarks.support.soak_driver", self.side, str(self.folder)]
        settings = {**os.environ, **self.machines.settings}
        with (self.folder / "driver.log").open("ab") as log:
            self._driver = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env=settings, start_new_session=True
            )

    def _is_running(self) -> bool:
        assert self._driver is not None
        code = self._driver.poll()
        if code is None:
            return True
        if code == 0:
            self.outcome.finished = True
            return False
        self._log(f"the driver ended by itself with {code}")
        self.outcome.failures += 1
        if self._mending is not None or not self.tracker.answers():
            while self._mending is not None or not self.tracker.answers():  # restarted when the outage is over
                self._mend()
                threading.Event().wait(0.1)
        else:
            self._futile += 1
        if self._futile > FAILURES:
            return False
        self._start()
        return True

    def _hit(self, kind: str) -> None:
        self._log(kind)
        self.outcome.faults[kind] += 1
        if kind.startswith("driver killed"):
            assert self._driver is not None
            self._driver.kill()
            self._driver.wait()
            if "truncated" in kind and not self._damage():
                self._log("there was no checkpoint to truncate")
                self.outcome.faults[kind] -= 1
                self.outcome.faults["driver killed"] += 1
            self._start()
            return
        self._turn += 1
        if kind == "node killed":
            which = self._turn % 2
            self.machines.kill_node(which)
            mend: Callable[[], object] = lambda: self.machines.add_node(which)  # noqa: E731
        elif kind == "tracker killed":
            self.tracker.kill()
            mend = self.tracker.start
        else:
            self.tracker.send(signal.SIGSTOP)
            mend = lambda: self.tracker.send(signal.SIGCONT)  # noqa: E731
        self._mending = time.monotonic() + AWAY[kind], f"{kind.split()[0]} is back", mend

    def _mend(self, now: bool = False) -> None:
        """End an outage; in the main thread, the only one in which Ray can start a node."""
        if self._mending is not None and (now or time.monotonic() >= self._mending[0]):
            self._mending[2]()
            self._log(self._mending[1])
            self._mending = None

    def _wake(self) -> None:
        """Schedule the continuation of stopped trials."""
        for line in self._lines():
            pid = int(line["pid"])
            if line["fault"].endswith("action=stop") and pid not in self._woken:
                self._woken.add(pid)
                self._log(f"process {pid} of trial {line['trial']} is stopped")
                timer = threading.Timer(FROZEN, _continue, [pid])
                timer.daemon = True
                timer.start()

    def _stop(self) -> None:
        if self._driver is not None and self._driver.poll() is None:
            self._log("aborted")
            self._driver.kill()
            self._driver.wait()
        self._mend(now=True)

    def _count(self) -> None:
        lines = list(self._lines())
        begun = [(line["trial"], line["unit"]) for line in lines if line["fault"] == BEGUN]
        self.outcome.begun = len(begun)
        self.outcome.repeated = len(begun) - len(set(begun))
        for line in lines:
            if line["fault"] != BEGUN:
                parts = dict(part.split("=") for part in line["fault"].split(","))
                self.outcome.faults[f"{parts['action']} at {parts['phase']}"] += 1
        stalls = self.folder / STALLS
        if stalls.exists():
            self.outcome.longest_stall = max(float(line.split()[0]) for line in stalls.read_text().splitlines())

    def _log(self, text: str) -> None:
        with (self.folder / "happened").open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {self.begun} units begun: {text}\n")


def _continue(pid: int) -> None:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "T":
            os.kill(pid, signal.SIGCONT)
