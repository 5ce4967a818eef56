"""Checkpoint folders of a study's trials, seen from the driver: locations, on-demand saving, removal."""

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
from trainables.storage.checkpoint_store import SAVE_REQUEST_FILE


def checkpoint_folder(study: Path, number: int) -> Path:
    """Checkpoint folder of the trial with this number (`trainables.storage.checkpoint_store`)."""
    return study / "checkpoints" / f"trial-{number:04d}"


def keep_now(study: Path, numbers: Iterable[int], seconds: float) -> int:
    """Request immediate checkpoints from running trials, and wait for them.

    Also in the middle of a unit.

    A trial that is not training at the moment (it evaluates, or hangs) does not respond.

    Args:
        numbers: of the trials.
        seconds: timeout.

    Returns:
        Number of trials that wrote a checkpoint.
    """
    asked = [checkpoint_folder(study, number) / SAVE_REQUEST_FILE for number in numbers]
    open_requests = {request for request in asked if request.parent.is_dir()}
    for request in open_requests:
        request.touch()
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    try:
        waiting = _pending(open_requests)
        while waiting and time.monotonic() < deadline:
            pause.wait(0.02)
            waiting = _pending(waiting)
        return len(open_requests) - len(waiting)
    finally:
        # A request that no trial has served would cost a later attempt a checkpoint.
        for request in open_requests:
            request.unlink(missing_ok=True)


def _pending(requests: Iterable[Path]) -> set[Path]:
    return {request for request in requests if request.exists()}


def discard(study: Path, number: int) -> None:
    """Remove the checkpoints of a trial that has ended.

    A process that still writes them loses its fencing token.
    """
    folder = checkpoint_folder(study, number)
    gone = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(FileNotFoundError):
        # In one step: a process that still writes finds neither its folder nor its token, and stops.
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def tidy(study: Path, records: Iterable[TrialRecord]) -> None:
    """Remove leftovers of a killed driver: checkpoints of ended trials, and partially removed folders."""
    for record in records:
        if not record.resumable:
            discard(study, record.number)
    for leftover in (study / "checkpoints").glob(".trial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
