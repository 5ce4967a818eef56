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

RETAINED = 2
"""Checkpoints kept per trial: the newest, and its predecessor in case the newest turns out damaged."""
QUARANTINE_LIMIT = 10
"""Damaged checkpoints kept per study for inspection."""
MID_UNIT_INTERVAL_S = 60.0
"""Minimum interval between checkpoints in the middle of a unit, in seconds."""
MIN_INTERVAL_FACTOR = 10
"""Minimum interval between checkpoints, as a multiple of the last write's duration: at most a tenth of a trial's time
goes into checkpoints, and a crash repeats one unit or ten write durations, whichever is longer."""
OWNER_FILE = "owner.json"
"""Holds the fencing token of the process that may write."""
QUARANTINE = "quarantine"
"""Folder of the study's damaged checkpoints."""
SAVE_REQUEST_FILE = "save-request"
"""A file of this name beside a trial's checkpoints requests one at once; removed when it is written."""
POLL_INTERVAL_S = 0.2
"""Poll interval for on-demand checkpoint requests, in seconds."""
_NAME = re.compile(r"unit-\d{6,}(-step-\d{4,})?")


class CheckpointStore:
    """Reads and writes the checkpoints of one trial.

    Args:
        folder: the trial's own; made by `acquire`.
        within: seconds after which the middle of a unit is kept.
        clock: seconds, for the rules on how often.
    """

    def __init__(
        self, folder: str | Path, within: float = MID_UNIT_INTERVAL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder = Path(folder)
        self.problems: list[str] = []
        """What went wrong with checkpoints and has not been reported yet."""
        self._token: str | None = None
        self._within, self._clock = within, clock
        self._last, self._cost = clock(), 0.0
        self._looked = clock()

    def acquire(self) -> None:
        """Become the one process that may write here; whoever could before cannot any more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        token = uuid.uuid4().hex
        fields = {"token": token, "pid": os.getpid(), "host": platform.node(), "time": time.time()}
        write_text(self.folder / OWNER_FILE, json.dumps(fields))
        self._token = token
        (self.folder / SAVE_REQUEST_FILE).unlink(missing_ok=True)
        for leftover in self.folder.glob(".*"):  # of a process that was killed while it wrote or removed
            _remove(leftover)
        self._last = self._clock()

    def valid_states(self) -> Iterator[tuple[Path, RunState]]:
        """The intact checkpoints, newest first; damaged ones go to the quarantine on the way."""
        for path in reversed(list_checkpoints(self.folder)):
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
        for old in sorted(place.parent.iterdir(), key=lambda p: p.stat().st_mtime)[:-QUARANTINE_LIMIT]:
            _remove(old)

    def save_after_unit(self, state: Callable[[], RunState]) -> None:
        """Keep the state after a unit, unless checkpoints are too dear for that."""
        if self._clock() - self._last >= MIN_INTERVAL_FACTOR * self._cost or self._asked():
            self._write(state)

    def save_result(self, meta: Mapping[str, Any]) -> None:
        """Keep the result of a trial that has used its budget: its state without tensors, which nobody will read."""
        self._write(lambda: RunState({}, meta))

    def save_after_step(self, state: Callable[[], RunState]) -> None:
        """Keep the middle of a unit, if the last checkpoint is long ago or somebody asks for one."""
        if self._clock() - self._last >= max(self._within, MIN_INTERVAL_FACTOR * self._cost) or self._asked():
            self._write(state)

    def _asked(self) -> bool:
        now = self._clock()
        if now - self._looked < POLL_INTERVAL_S:
            return False
        self._looked = now
        return (self.folder / SAVE_REQUEST_FILE).exists()

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
            for old in list_checkpoints(self.folder)[:-RETAINED]:
                self._discard(old)
        except OSError as error:
            self._check_owner()  # rather the true reason, if the folder is gone
            self.problems.append(f"No checkpoint could be written to {target}: {error}")
            log.warning("%s. The trial goes on without.", self.problems[-1])
        (self.folder / SAVE_REQUEST_FILE).unlink(missing_ok=True)
        self._last = self._clock()
        self._cost = self._last - began

    def _discard(self, path: Path) -> None:
        gone = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        os.rename(path, gone)  # in one go: a folder that is half removed must not look like a checkpoint
        _remove(gone)

    def _check_owner(self) -> None:
        try:
            owner = json.loads((self.folder / OWNER_FILE).read_text())
        except (OSError, ValueError):
            owner = {}
        if self._token is None or owner.get("token") != self._token:
            raise FencedError(
                f"The checkpoints in {self.folder} are written by one process at a time, but this one (pid "
                f"{os.getpid()}) is not the latest that took the trial (pid {owner.get('pid')} on "
                f"{owner.get('host')}). It stops here."
            )


def list_checkpoints(folder: Path) -> list[Path]:
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
