"""The driver's side of the trials' checkpoints: where they lie, and when they are not needed any more."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from orchestrator.record.records import TrialRecord
from trainables.storage.checkpoint_store import KEEP_NOW


def checkpoint_folder(study: Path, number: int) -> Path:
    """Where the trial with this number keeps its checkpoints (`trainables.storage.checkpoint_store`)."""
    return study / "checkpoints" / f"trial-{number:04d}"


def keep_now(study: Path, numbers: Iterable[int], seconds: float) -> int:
    """Ask running trials for a checkpoint at once, wherever in a unit they are, and wait until they have written it.

    A trial that is not training just now, because it evaluates or hangs, does not answer.

    Args:
        numbers: of the trials.
        seconds: the longest wait.

    Returns:
        How many answered.
    """
    asked = [checkpoint_folder(study, number) / KEEP_NOW for number in numbers]
    open_requests = {request for request in asked if request.parent.is_dir()}
    for request in open_requests:
        request.touch()
    deadline, pause = time.monotonic() + seconds, threading.Event()
    try:
        while waiting := {request for request in open_requests if request.exists()}:
            if time.monotonic() >= deadline:
                break
            pause.wait(0.02)
        return len(open_requests) - len(waiting)
    finally:
        for request in open_requests:
            request.unlink(missing_ok=True)


def discard(study: Path, number: int) -> None:
    """Remove the checkpoints of a trial that has ended; a process that still writes them is fenced off by it."""
    folder = checkpoint_folder(study, number)
    gone = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def tidy(study: Path, records: Iterable[TrialRecord]) -> None:
    """Remove what a killed driver left: checkpoints of trials that have ended, and folders half removed."""
    for record in records:
        if not record.resumable:
            discard(study, record.number)
    for leftover in (study / "checkpoints").glob(".trial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
