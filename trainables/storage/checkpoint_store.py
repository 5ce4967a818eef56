"""Where one trial keeps its checkpoints: written often but not too often, verified on reading, never by two at once.

    <study>/checkpoints/trial-0007/owner.json              who may write here: the latest process that took the trial
                                   unit-000003/            after three units
                                   unit-000003-step-0120/  in the middle of the fourth
    <study>/checkpoints/quarantine/trial-0007-unit-000003/ what was found damaged, with `problem.txt`

The trial finds its newest intact checkpoint by itself, so that a retry by Tune, a lost node and a repeated
`luthier run` are one and the same thing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainables.specs.errors import FencedError
from trainables.storage.atomic_files import write_text
from trainables.storage.checkpoint_format import CheckpointError, RunState, load_state, save_state

log = logging.getLogger("luthier")

KEPT = 2
"""Checkpoints of a trial that stay: the newest, and the one before in case that it turns out damaged."""
QUARANTINED = 10
"""Damaged checkpoints of a study that are kept to be looked at."""
WITHIN_SECONDS = 60.0
"""Seconds after which a unit that still runs gets a checkpoint in its middle."""
SHARE = 10
"""A checkpoint is written at the end of a unit if at least this many times the seconds that the last one took have
passed since: checkpoints cost a trial a tenth of its time at most, and what a crash repeats is one unit or ten times
the time of a checkpoint, whichever is longer."""

OWNER, QUARANTINE, KEEP_NOW = "owner.json", "quarantine", "keep-now"
LOOK_SECONDS = 0.2
"""How often a trial looks whether it is asked, by a file of the name KEEP_NOW beside its checkpoints, to write one at
once; it removes the file when that is done."""
_NAME = re.compile(r"unit-\d{6,}(-step-\d{4,})?")


class Keeper:
    """Reads and writes the checkpoints of one trial.

    Args:
        folder: the trial's own; made by `claim`.
        within: seconds after which the middle of a unit is kept.
        clock: seconds, for the rules on how often.
    """

    def __init__(
        self, folder: str | Path, within: float = WITHIN_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder = Path(folder)
        self.problems: list[str] = []
        """What went wrong with checkpoints and has not been reported yet."""
        self._token: str | None = None
        self._within, self._clock = within, clock
        self._last, self._cost = clock(), 0.0
        self._looked = clock()

    def claim(self) -> None:
        """Become the one process that may write here; whoever could before cannot any more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        token = uuid.uuid4().hex
        fields = {"token": token, "pid": os.getpid(), "host": platform.node(), "time": time.time()}
        write_text(self.folder / OWNER, json.dumps(fields))
        self._token = token
        (self.folder / KEEP_NOW).unlink(missing_ok=True)
        for leftover in self.folder.glob(".*"):  # of a process that was killed while it wrote or removed
            _remove(leftover)
        self._last = self._clock()

    def states(self) -> Iterator[tuple[Path, RunState]]:
        """The intact checkpoints, newest first; damaged ones go to the quarantine on the way."""
        for path in reversed(checkpoints(self.folder)):
            try:
                yield path, load_state(path)
            except CheckpointError as error:
                self.quarantine(path, str(error))

    def quarantine(self, path: Path, problem: str) -> None:
        """Put a checkpoint aside that cannot be used, and remember to report it."""
        self._check_owner()
        self.problems.append(problem)
        log.warning("A checkpoint is put aside. %s", problem)
        place = self.folder.parent / QUARANTINE / f"{self.folder.name}-{path.name}"
        place.parent.mkdir(exist_ok=True)
        _remove(place)
        with contextlib.suppress(OSError):  # it may lie on a disk that fails: then it stays where it is, and is skipped
            os.rename(path, place)
            (place / "problem.txt").write_text(problem + "\n")
        for old in sorted(place.parent.iterdir(), key=lambda p: p.stat().st_mtime)[:-QUARANTINED]:
            _remove(old)

    def unit_done(self, state: Callable[[], RunState]) -> None:
        """Keep the state after a unit, unless checkpoints are too dear for that."""
        if self._clock() - self._last >= SHARE * self._cost or self._asked():
            self._write(state)

    def finished(self, meta: Mapping[str, Any]) -> None:
        """Keep the result of a trial that has used its budget: its state without tensors, which nobody will read."""
        self._write(lambda: RunState({}, meta))

    def step_done(self, state: Callable[[], RunState]) -> None:
        """Keep the middle of a unit, if the last checkpoint is long ago or somebody asks for one."""
        if self._clock() - self._last >= max(self._within, SHARE * self._cost) or self._asked():
            self._write(state)

    def _asked(self) -> bool:
        now = self._clock()
        if now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        return (self.folder / KEEP_NOW).exists()

    def _write(self, make: Callable[[], RunState]) -> None:
        """A disk that is full or failing costs the checkpoint, not the trial.

        Raises:
            FencedError: the trial belongs to another process now.
        """
        began = self._clock()
        self._check_owner()
        state = make()
        unit, step = int(state.meta["unit"]), int(state.meta["step"])
        target = self.folder / (f"unit-{unit:06d}" + (f"-step-{step:04d}" if step else ""))
        try:
            if target.exists():
                self._discard(target)  # of an attempt before, from which this one did not start
            save_state(target, state)
            for old in checkpoints(self.folder)[:-KEPT]:
                self._discard(old)
        except OSError as error:
            self._check_owner()  # rather the true reason, if the folder is gone
            self.problems.append(f"No checkpoint could be written to {target}: {error}")
            log.warning("%s. The trial goes on without.", self.problems[-1])
        (self.folder / KEEP_NOW).unlink(missing_ok=True)
        self._last = self._clock()
        self._cost = self._last - began

    def _discard(self, path: Path) -> None:
        gone = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        os.rename(path, gone)  # in one go: a folder that is half removed must not look like a checkpoint
        _remove(gone)

    def _check_owner(self) -> None:
        try:
            owner = json.loads((self.folder / OWNER).read_text())
        except (OSError, ValueError):
            owner = {}
        if self._token is None or owner.get("token") != self._token:
            raise FencedError(
                f"The checkpoints in {self.folder} are written by one process at a time, but this one (pid "
                f"{os.getpid()}) is not the latest that took the trial (pid {owner.get('pid')} on "
                f"{owner.get('host')}). It stops here."
            )


def checkpoints(folder: Path) -> list[Path]:
    """The folders that hold, or should hold, a checkpoint; oldest first."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
