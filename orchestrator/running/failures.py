"""What kind of failure a traceback tells of, so that a person can see at a glance what to do about it."""

from __future__ import annotations

import re

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
