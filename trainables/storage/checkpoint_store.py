"""Checkpoint store of one trial.

Rate-limited writes, digests verified on read, a single writer by fencing token.

    <study>/checkpoints/trial-0007/owner.json              fencing token of the process that may write
                                   unit-000003/            after three units
                                   unit-000003-step-0120/  in the middle of the fourth
    <study>/checkpoints/quarantine/trial-0007-unit-000003/ a damaged checkpoint, with `problem.txt`

A trial resumes from the newest valid checkpoint of its store, whatever interrupted it: a retry by Tune, a lost node
and a repeated `luthier run` take the same path.
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
        folder: the trial's own; created by `acquire`.
        mid_unit_interval_s: minimum interval between checkpoints in the middle of a unit, in seconds.
        clock: monotonic seconds, for the rate limit.
    """

    def __init__(
        self,
        folder: str | Path,
        mid_unit_interval_s: float = MID_UNIT_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = Path(folder)
        self.problems: list[str] = []
        """Failed writes and damaged checkpoints that have not been reported yet."""
        self._token: str | None = None
        self._mid_unit_interval_s = mid_unit_interval_s
        self._clock = clock
        self._last_write = clock()
        self._write_seconds = 0.0
        self._last_poll = clock()

    def acquire(self) -> None:
        """Acquire write ownership; revokes the previous owner's token."""
        self.folder.mkdir(parents=True, exist_ok=True)
        token = uuid.uuid4().hex
        fields = {"token": token, "pid": os.getpid(), "host": platform.node(), "time": time.time()}
        write_text(self.folder / OWNER_FILE, json.dumps(fields))
        self._token = token
        (self.folder / SAVE_REQUEST_FILE).unlink(missing_ok=True)
        # After the token: the former owner begins no further file.
        for leftover in self.folder.glob(".*"):  # temporary folders of a process that was killed
            _remove(leftover)
        self._last_write = self._clock()

    def valid_states(self) -> Iterator[tuple[Path, RunState]]:
        """The valid checkpoints, newest first; damaged ones are moved to the quarantine."""
        # Lazily: where the newest is valid, no other is read.
        for path in reversed(list_checkpoints(self.folder)):
            try:
                yield path, load_state(path)
            except CheckpointError as error:
                self.quarantine(path, str(error))

    def quarantine(self, path: Path, problem: str) -> None:
        """Move an unusable checkpoint to the quarantine and record the problem.

        Raises:
            FencedError: another process owns the trial.
        """
        self._check_token()
        self.problems.append(problem)
        log.warning("Quarantined a checkpoint. %s", problem)
        # Outside of the trial's folder, which is removed when the trial ends.
        target = self.folder.parent / QUARANTINE / f"{self.folder.name}-{path.name}"
        target.parent.mkdir(exist_ok=True)
        _remove(target)
        # A failing disk may refuse the move; the checkpoint then stays where it is, and is skipped.
        with contextlib.suppress(OSError):
            os.rename(path, target)
            (target / "problem.txt").write_text(problem + "\n")
        by_age = sorted(target.parent.iterdir(), key=lambda p: p.stat().st_mtime)
        for old in by_age[:-QUARANTINE_LIMIT]:
            _remove(old)

    def save(self, state: Callable[[], RunState]) -> None:
        """Write a checkpoint now, whatever the rate limit."""
        self._write(state)

    def save_after_unit(self, state: Callable[[], RunState]) -> None:
        """Write a checkpoint after a unit, subject to the rate limit."""
        if self._is_due(0.0):
            self._write(state)

    def save_after_step(self, state: Callable[[], RunState]) -> None:
        """Write a checkpoint in the middle of a unit.

        Subject to the rate limit and the mid-unit interval.
        """
        if self._is_due(self._mid_unit_interval_s):
            self._write(state)

    def save_result(self, meta: Mapping[str, Any]) -> None:
        """Write the state of a finished trial.

        Without tensors, since nothing resumes from it.
        """
        self._write(lambda: RunState({}, meta))

    def check_owner(self) -> None:
        """Raise unless this process may write files of the trial.

        Raises:
            FencedError: another process owns the trial.
        """
        self._check_token()

    def _is_due(self, interval_s: float) -> bool:
        elapsed = self._clock() - self._last_write
        return elapsed >= max(interval_s, MIN_INTERVAL_FACTOR * self._write_seconds) or self._is_requested()

    def _is_requested(self) -> bool:
        now = self._clock()
        # Not at every step: the folder may lie on a network file system.
        if now - self._last_poll < POLL_INTERVAL_S:
            return False
        self._last_poll = now
        return (self.folder / SAVE_REQUEST_FILE).exists()

    def _write(self, make_state: Callable[[], RunState]) -> None:
        """Write a checkpoint and remove older ones.

        A full or failing disk loses the checkpoint, not the trial.

        Raises:
            FencedError: another process owns the trial.
        """
        began = self._clock()
        self._check_token()
        state = make_state()
        unit = int(state.meta["unit"])
        step = int(state.meta["step"])
        name = f"unit-{unit:06d}"
        if step:
            name += f"-step-{step:04d}"
        target = self.folder / name
        try:
            if target.exists():
                self._discard(target)  # of an earlier attempt that this one did not resume from
            save_state(target, state)
            for old in list_checkpoints(self.folder)[:-RETAINED]:
                self._discard(old)
        except OSError as error:
            # Where the next owner has removed the folder, the cause is the lost token and not the disk.
            self._check_token()
            self.problems.append(f"No checkpoint could be written to {target}: {error}")
            log.warning("%s. The trial continues without it.", self.problems[-1])
        (self.folder / SAVE_REQUEST_FILE).unlink(missing_ok=True)
        # After a failure, too: a full disk is not tried at every step.
        self._last_write = self._clock()
        self._write_seconds = self._last_write - began

    def _discard(self, path: Path) -> None:
        # Renamed first, in one step: a folder that is half removed must not look like a checkpoint.
        hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        os.rename(path, hidden)
        _remove(hidden)

    def _check_token(self) -> None:
        # Read before every write: the trial of a process that was stopped for minutes (SIGSTOP, a swapped-out machine)
        # may have been restarted elsewhere.
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
    """Folders of a trial that are named like checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    named = (path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return sorted(named, key=_position)


def _position(checkpoint: Path) -> list[int]:
    """Unit and step as numbers: a name of seven digits sorts after one of six."""
    return [int(digits) for digits in re.findall(r"\d+", checkpoint.name)]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
