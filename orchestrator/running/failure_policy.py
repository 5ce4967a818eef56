"""A disk that is full or fails under a study: many may meet it first, each with an error of its own; one is shown.

What kind of failure a traceback tells of, so that a person can see at a glance what to do about it.

Stops a study whose trials mostly fail for one reason: what is wrong is not with them; the rest would fail, too.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Stopper

from orchestrator.record.records import INTERRUPTED

_PATTERNS = (
    ("nan", r"NonFiniteError"),
    (
        "host_oom",
        r"ray\.exceptions\.OutOfMemoryError|running low on memory|DefaultCPUAllocator|can't allocate memory"
        r"|Cannot allocate memory|(?<!OutOf)MemoryError|killed by the OOM killer|memory monitor",
    ),
    ("oom", r"OutOfMemoryError|out of memory|OOM"),
    ("stalled", r"Stalled|TimeoutError|timed out|watchdog"),
    ("data", r"DataError|StoreError|UnidentifiedImageError|ArrowInvalid|DecompressionBomb"),
    (
        "infra",
        r"ActorDiedError|ActorUnavailableError|RayActorError|NodeDiedError|WorkerCrashedError|RaySystemError"
        r"|actor died|actor is dead|actor (?:\w+ )?is (?:temporarily )?unavailable"
        r"|worker process has died|worker died|node (?:has )?died|FencedError"
        r"|RuntimeEnvSetupError|ObjectLostError|OwnerDiedError|No space left on device|CUDA error|NCCL|ConnectionError",
    ),
)
"""First match wins: an actor that died because memory ran out is `host_oom`, not `infra`; `oom` is a GPU's memory."""

_GUESSES = re.compile(r"Some common causes include.*")
"""What Ray says of every process that vanished, the kernel's OOM killer first: no evidence of anything."""
_ERROR = re.compile(r"^\s*(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit))\b:? ?(.*)$")
_VANISHED = re.compile(r"actor died unexpectedly before finishing this task", re.IGNORECASE)
_PLACE = {"pid": re.compile(r"^\s*pid: (\d+)", re.MULTILINE), "ip": re.compile(r"^\s*ip: (\S+)", re.MULTILINE)}


def classify(text: str) -> str:
    """`nan`, `oom` (a GPU's memory), `host_oom` (a machine's), `stalled`, `data`, `infra`, or `user` (an error in the
    study or in a strategy) for the text of a failure; an empty text is `infra`, because a process that can say nothing
    was killed."""
    text = _GUESSES.sub("", text)
    if not text.strip():
        return "infra"
    for reason, pattern in _PATTERNS:
        if re.search(pattern, text):
            return reason
    return "user"


def error_line(text: str, limit: int = 500) -> str:
    """The line of a traceback that says what happened (the last `SomeError: message`), else its last line; of a process
    that ended without a word, where it was."""
    if _VANISHED.search(text) and classify(text) == "infra":
        pid, ip = (found[1] if (found := pattern.search(text)) else "?" for pattern in _PLACE.values())
        return (
            f"ActorDiedError: process {pid} on {ip} ended without a word: it crashed (a segmentation fault, or a "
            "library that ends the process), or it was killed from outside (by the kernel, if memory ran out: see "
            "dmesg there). Its last words, if any, are in Ray's worker logs."
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _ERROR.match(line)]
    return ([*named, *lines[-1:]] or [""])[-1 if not named else len(named) - 1][:limit]


ADVICE = {
    "nan": "Training diverges: hold the learning rates at lower values (fixed), or look at the images.",
    "oom": "GPU memory does not suffice: lower search.batch_size or data.image_size, or give a trial more of a GPU "
    "(resources.gpus).",
    "host_oom": "The machines' memory does not suffice: run fewer trials at a time (resources.concurrent), or on "
    "larger machines.",
    "stalled": "Look at what the machines wait for (file systems, GPUs), or allow more time: failures.stall_factor, "
    "failures.stall_floor.",
    "data": "Look at the data: luthier data check.",
    "infra": "Look at the machines and their logs.",
    "user": "Look at the values held in the study file (fixed) and, where it is your own, at the strategy's code.",
}
"""What a person can do about each reason."""
SHOWN = 5
"""Trials that are named."""


class FailureGateError(ValueError):
    """A study was stopped because its trials kept failing."""


class FailureGate(Stopper):  # type: ignore[misc]  # ray is untyped
    """Counts how the trials of this run end; once too many have failed for one reason, Tune stops the experiment.

    Every trial that has been started counts as a good one until it fails, so that trials which fail fast do not look
    like all there are. What failed in earlier runs of the study does not count: its cause may be gone.

    Args:
        after: failures of one reason; None = never stop.
        share: of all trials started that they must be, at least.
    """

    def __init__(self, after: int | None, share: float) -> None:
        self._after, self._share = after, share
        self._started: set[str] = set()
        self._names: dict[str, str] = {}
        self._failed: dict[str, tuple[str, str]] = {}
        self.reason: str | None = None
        """The reason that stopped the study, if it was stopped."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Take note of one event of the journal."""
        kind, trial_id = event["kind"], str(event.get("trial_id"))
        if kind == "trial_suggested":
            self._names[trial_id] = f"{event['number']} {event.get('label') or event['strategy']}"
        elif kind == "trial_started":
            self._started.add(trial_id)
        elif kind == "trial_failed" and event.get("reason") != INTERRUPTED and trial_id in self._started:
            self._failed[trial_id] = str(event.get("reason")), str(event.get("error") or "")
            self._judge()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped by this."""
        return False

    def stop_all(self) -> bool:
        """Whether the study stops now."""
        return self.reason is not None

    def check(self) -> None:
        """Say so, if the study was stopped.

        Raises:
            FailureGateError: it was.
        """
        if self.reason is not None:
            raise FailureGateError(self.message())

    def message(self) -> str:
        """What happened, the commonest error, and what to do."""
        errors = {trial_id: error for trial_id, (reason, error) in self._failed.items() if reason == self.reason}
        common, count = Counter(map(_shape, errors.values())).most_common(1)[0]
        alike = [trial_id for trial_id, error in errors.items() if _shape(error) == common]
        names = ", ".join(self._names.get(trial_id, trial_id) for trial_id in alike[:SHOWN])
        more = f" and {count - SHOWN} more" if count > SHOWN else ""
        return (
            f"the study was stopped, because {len(errors)} of the {len(self._started)} trials that were started failed "
            f"for one reason: {self.reason}. The commonest error ({count}×: {names}{more}) is: "
            f"{errors[alike[0]].rstrip('.')}. {ADVICE.get(str(self.reason), '')} What has finished is kept, and the "
            "same command goes on with the rest; failures.stop_after: null lets a study go on whatever fails."
        )

    def _judge(self) -> None:
        reason, count = Counter(reason for reason, _ in self._failed.values()).most_common(1)[0]
        if self._after is not None and count >= self._after and count >= self._share * len(self._started):
            self.reason = self.reason or reason


def _shape(error: str) -> str:
    """An error without the numbers in it: the same mistake in two trials."""
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", error)


ROOM = 64 * 2**20
"""Bytes: with more than these free, it is another disk that is full."""

_FULL = ("database or disk is full", "No space left on device", "Disk quota exceeded")
_FAILING = ("disk I/O error", "Input/output error", "readonly database", "Read-only file system")
_NUMBERS = {
    errno.ENOSPC: True, errno.EDQUOT: True, errno.EFBIG: True,
    errno.EIO: False, errno.EROFS: False, errno.ESTALE: False,
}  # fmt: skip


class DiskError(OSError):
    """The study's folder takes no more data, fails, or has gone."""


@contextlib.contextmanager
def disk_explained(folder: Path) -> Iterator[None]:
    """Turn whatever a full or failing disk, or a journal that was removed, made of the block into a `DiskError`;
    everything else passes.

    Args:
        folder: the study's.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and str(error.filename) == str(folder / "journal.jsonl"):
            raise DiskError(
                f"A study writes its record to {folder}, but the journal there has gone: it was removed or moved while "
                "the study ran. Put it back and run the same command again; without it the study begins anew."
            ) from error
        full = _is_full(error)
        free = shutil.disk_usage(folder).free if full else 0
        if full is None or free > ROOM:
            raise
        raise DiskError(_message(folder, full, free)) from error


def _is_full(error: BaseException) -> bool | None:
    """True = no room, False = the disk fails, None = neither, for an error or what it came from."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is None or found in seen:
            continue
        seen.append(found)
        waiting += [found.__cause__, found.__context__]
        if isinstance(found, OSError) and found.errno in _NUMBERS:
            return _NUMBERS[found.errno]
        for known, full in ((_FULL, True), (_FAILING, False)):
            if any(text in str(found) for text in known):
                return full
    return None


def _message(folder: Path, full: bool, free: int) -> str:
    if full:
        return (
            f"A study writes its record to {folder}, but that disk is full ({free / 2**20:.0f} MiB free). What was "
            "recorded is kept. Free some space and run the same command again."
        )
    return (
        f"A study writes its record to {folder}, but that disk fails or is read-only. What was recorded is kept. Look "
        "at the disk (its mount, the system's log), then run the same command again."
    )
