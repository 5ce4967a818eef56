"""What kind of failure a traceback tells of, so that a person can see at a glance what to do about it."""

from __future__ import annotations

import re

_PATTERNS = (
    ("nan", r"NonFiniteError"),
    ("oom", r"OutOfMemoryError|out of memory|OOM|MemoryError|running low on memory|can't allocate memory"),
    ("stalled", r"Stalled|TimeoutError|timed out|watchdog"),
    ("data", r"DataError|StoreError|UnidentifiedImageError|ArrowInvalid|DecompressionBomb"),
    (
        "infra",
        r"ActorDiedError|ActorUnavailableError|RayActorError|NodeDiedError|WorkerCrashedError|RaySystemError"
        r"|actor died|actor is dead|worker process has died|worker died|node (?:has )?died"
        r"|RuntimeEnvSetupError|ObjectLostError|OwnerDiedError|No space left on device|CUDA error|NCCL|ConnectionError",
    ),
)
"""First match wins: an actor that died because memory ran out is `oom`, not `infra`."""

_GUESSES = re.compile(r"Some common causes include.*")
"""What Ray says of every process that vanished, the kernel's OOM killer first: no evidence of anything."""
_ERROR = re.compile(r"^\s*(?:[\w.]+\.)?(\w*(?:Error|Exception|Interrupt|Exit))\b:? ?(.*)$")


def classify(text: str) -> str:
    """`nan`, `oom`, `stalled`, `data`, `infra`, or `user` (an error in the study or in a strategy) for the text of a
    failure; an empty text is `infra`, because a process that can say nothing was killed."""
    text = _GUESSES.sub("", text)
    if not text.strip():
        return "infra"
    for reason, pattern in _PATTERNS:
        if re.search(pattern, text):
            return reason
    return "user"


def error_line(text: str, limit: int = 500) -> str:
    """The line of a traceback that says what happened (the last `SomeError: message`), else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _ERROR.match(line)]
    return ([*named, *lines[-1:]] or [""])[-1 if not named else len(named) - 1][:limit]
