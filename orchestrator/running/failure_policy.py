"""Failures: reasons of trials, a circuit breaker over trials, disk errors."""

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
"""Reason and pattern of its texts. The first match wins: an actor that died because memory ran out is `host_oom`, not
`infra`. The texts are Ray's, torch's and Python's: where one changes, failures fall to `infra` or `user`."""

_GUESSES = re.compile(r"Some common causes include.*")
"""Ray lists these for every process that vanished, the kernel's OOM killer among them: no evidence of anything."""
_ERROR = re.compile(r"^\s*(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit))\b:? ?(.*)$")
_VANISHED = re.compile(r"actor died unexpectedly before finishing this task", re.IGNORECASE)
_PID = re.compile(r"^\s*pid: (\d+)", re.MULTILINE)
_IP = re.compile(r"^\s*ip: (\S+)", re.MULTILINE)


def classify(text: str) -> str:
    """The reason for the text of a failure.

    Returns:
        `nan`, `oom` (a GPU's memory), `host_oom` (a machine's memory), `stalled`, `data`, `infra`, or `user` (an error
        in the study or in a strategy). An empty text is `infra`: the process was killed before it could write one.

    Example:
        >>> classify("torch.OutOfMemoryError: CUDA out of memory.")
        'oom'
    """
    text = _GUESSES.sub("", text)
    if not text.strip():
        return "infra"
    for reason, pattern in _PATTERNS:
        if re.search(pattern, text):
            return reason
    return "user"


def is_out_of_memory(text: str) -> bool:
    """Whether a failure's text is that of a process killed for its machine's memory."""
    return classify(text) == "host_oom"


def error_line(text: str, limit: int = 2000) -> str:
    """The last `SomeError: message` of a traceback, else its last line; one that is too long ends in an ellipsis.

    The limit leaves room for the rule, the value and the way out of Luthier's own messages.

    For a process that vanished there is no such line; the message then names the process and its machine.

    Example:
        >>> error_line("Traceback …\\nValueError: no such class\\n  in trial 3")
        'ValueError: no such class'
    """
    if _VANISHED.search(text) and classify(text) == "infra":
        pid = _first_group(_PID, text)
        ip = _first_group(_IP, text)
        return (
            f"ActorDiedError: process {pid} on {ip} ended without an error message: it crashed (a segmentation fault, "
            "or a library that ends the process), or it was killed from outside (by the kernel, if memory ran out: "
            "see dmesg there). Its last output, if any, is in Ray's worker logs."
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    errors = [line for line in lines if _ERROR.match(line)]
    line = errors[-1] if errors else lines[-1]
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _first_group(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1] if match else "?"


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
"""Way out for each reason."""
MAX_NAMED = 5
"""Trials that a message names."""


class CircuitBreakerError(ValueError):
    """A study was stopped because most of its trials failed for the same reason."""


class CircuitBreaker(Stopper):  # type: ignore[misc]  # ray is untyped
    """Stops a study when most trials fail for the same reason.

    The rest would fail, too. A running trial counts as a success until it fails, so that trials which fail fast do not
    stop a study whose others are still training. Failures of earlier runs do not count: their cause may be gone.

    Args:
        after: failures for one reason that open the circuit; None = never.
        share: fraction of all started trials that they must be, at least.
    """

    def __init__(self, after: int | None, share: float) -> None:
        self._after, self._share = after, share
        self._started: set[str] = set()
        self._names: dict[str, str] = {}
        self._failed: dict[str, tuple[str, str]] = {}
        self.reason: str | None = None
        """The reason that stopped the study; None = it was not stopped."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Count one event of the journal."""
        kind = event["kind"]
        trial_id = str(event.get("trial_id"))
        if kind == "trial_suggested":
            self._names[trial_id] = f"{event['number']} {event.get('label') or event['strategy']}"
        elif kind == "trial_started":
            self._started.add(trial_id)
        elif kind == "trial_failed" and event.get("reason") != INTERRUPTED and trial_id in self._started:
            self._failed[trial_id] = str(event.get("reason")), str(event.get("error") or "")
            self._judge()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether the study stops now."""
        return self.reason is not None

    def check(self) -> None:
        """Raise if the study was stopped.

        Raises:
            CircuitBreakerError: with `message`.
        """
        if self.reason is not None:
            raise CircuitBreakerError(self.message())

    def message(self) -> str:
        """The reason, the commonest error, and the way out."""
        errors = {trial_id: error for trial_id, (reason, error) in self._failed.items() if reason == self.reason}
        common, count = Counter(map(_shape, errors.values())).most_common(1)[0]
        alike = [trial_id for trial_id, error in errors.items() if _shape(error) == common]
        names = ", ".join(self._names.get(trial_id, trial_id) for trial_id in alike[:MAX_NAMED])
        more = f" and {count - MAX_NAMED} more" if count > MAX_NAMED else ""
        return (
            f"the study was stopped, because {len(errors)} of the {len(self._started)} trials that were started failed "
            f"for one reason: {self.reason}. The commonest error ({count}×: {names}{more}) is: "
            f"{errors[alike[0]].rstrip('.')}. {ADVICE.get(str(self.reason), '')} What has finished is kept, and the "
            "same command continues with the rest; failures.stop_after: null never stops a study."
        )

    def _judge(self) -> None:
        reason, count = Counter(reason for reason, _ in self._failed.values()).most_common(1)[0]
        if self._after is not None and count >= self._after and count >= self._share * len(self._started):
            self.reason = self.reason or reason


def _shape(error: str) -> str:
    """An error without its numbers.

    The same mistake in two trials is then the same text.
    """
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", error)


FREE_BYTES = 64 * 2**20
"""With more than these bytes free, the disk that is full is another one."""

_FULL = ("database or disk is full", "No space left on device", "Disk quota exceeded")
_FAILING = ("disk I/O error", "Input/output error", "readonly database", "Read-only file system")
_FULL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FAILING_NUMBERS = (errno.EIO, errno.EROFS, errno.ESTALE)


class DiskError(OSError):
    """The study's folder takes no more data, fails, or has gone."""


@contextlib.contextmanager
def report_disk_errors(folder: Path) -> Iterator[None]:
    """Raise one `DiskError` for a full or failing disk, or a removed journal.

    Whichever component met it first.

    SQLite, the journal, checkpoints and the report each raise errors of their own for it. Other errors pass.

    Args:
        folder: of the study.

    Raises:
        DiskError: from the error that the block raised.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and str(error.filename) == str(folder / "journal.jsonl"):
            raise DiskError(
                f"A study writes its record to {folder}, but the journal there has gone: it was removed or moved while "
                "the study ran. Put it back and run the same command again; without it the study starts over."
            ) from error
        full = _is_full(error)
        free = shutil.disk_usage(folder).free if full else 0
        if full is None or free > FREE_BYTES:
            raise
        raise DiskError(_message(folder, full, free)) from error


def _is_full(error: BaseException) -> bool | None:
    """Whether an error comes from a full disk (True) or a failing one (False).

    Its causes and contexts count, too. None = neither.
    """
    visited: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop()
        if cause is None or cause in visited:
            continue
        visited.append(cause)
        waiting += [cause.__cause__, cause.__context__]
        number = cause.errno if isinstance(cause, OSError) else None
        text = str(cause)
        # By the text, too: SQLite's errors carry no error number of the system.
        if number in _FULL_NUMBERS or any(part in text for part in _FULL):
            return True
        if number in _FAILING_NUMBERS or any(part in text for part in _FAILING):
            return False
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
