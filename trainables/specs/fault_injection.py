"""Faults on purpose, at named points of a trial or of the driver: how the tests and the soak break things.

The environment variable `LUTHIER_FAULT` says what happens where, several faults separated by `;`:

    LUTHIER_FAULT="trial=2,unit=3,phase=after_checkpoint,action=kill;phase=step,trial=4,step=7,action=nan"

A fault acts when its `phase` is reached and every other field that it names agrees (`trial`: number in the study,
`unit`: 1-based, `step`: 1-based optimiser step within the unit, `event` and `seq`: kind and number of a journal event).
It acts `times` times (default 1; 0 = always), counted over all processes where `LUTHIER_FAULT_LOG` names a file, else
within each process.
Without the variable a point costs one look at a cached empty tuple. The variable is read here and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ENV_FAULTS, ENV_FAULT_LOG = "LUTHIER_FAULT", "LUTHIER_FAULT_LOG"

PHASES = {
    "before_unit": "a trial is about to do a unit",
    "step": "an optimiser step has its loss, not yet its gradients",
    "before_checkpoint": "a unit is done, its checkpoint not begun",
    "in_checkpoint": "tensors are written, the checkpoint is not yet valid",
    "after_checkpoint": "the checkpoint is valid, the unit not yet reported",
    "before_event": "the driver is about to write an event to the journal",
    "after_event": "the event is on the disk, nobody has heard of it",
    "finalize": "a trial's last unit is trained, its result not yet evaluated",
}
FIELDS = ("trial", "unit", "step", "event", "seq")

_where: dict[str, int | str] = {}
_acted: dict[str, int] = {}


@dataclass(frozen=True)
class Fault:
    """One fault of `LUTHIER_FAULT`."""

    text: str
    phase: str
    action: str
    times: int = 1
    where: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read `key=value,…`.

        Raises:
            ValueError: an unknown key, phase or action.
        """
        pairs = dict(part.strip().partition("=")[::2] for part in text.split(","))
        phase, action, times = pairs.pop("phase", ""), pairs.pop("action", ""), pairs.pop("times", "1")
        if phase not in PHASES or action not in ACTIONS or not times.isdigit() or set(pairs) - set(FIELDS):
            raise ValueError(
                f"A fault has phase= one of {', '.join(PHASES)}, action= one of {', '.join(ACTIONS)}, and may have "
                f"times= and {', '.join(f'{name}=' for name in FIELDS)}, but {ENV_FAULTS} has {text!r}."
            )
        return cls(text.strip(), phase, action, int(times), pairs)


@contextlib.contextmanager
def fault_context(**where: int | str) -> Iterator[None]:
    """Say where the points inside are (`trial=`, `unit=`), for those that do not know it themselves."""
    before = dict(_where)
    _where.update(where)
    try:
        yield
    finally:
        _where.clear()
        _where.update(before)


def fault_point(phase: str, **where: int | str) -> str | None:
    """A point of the code: act if a fault is meant for it.

    Returns:
        The action that is left to the caller ("nan": make the loss NaN), else None.
    """
    planned = _planned()
    if not planned:
        return None
    here = {name: str(value) for name, value in {**_where, **where}.items()}
    for fault in planned:
        if fault.phase == phase and all(here.get(k) == v for k, v in fault.where.items()) and _due(fault, here):
            return ACTIONS[fault.action]()
    return None


def reset_faults() -> None:
    """Read `LUTHIER_FAULT` again at the next point and forget what this process counted."""
    _planned.cache_clear()
    _acted.clear()


@functools.cache
def _planned() -> tuple[Fault, ...]:
    return tuple(Fault.parse(text) for text in os.environ.get(ENV_FAULTS, "").split(";") if text.strip())


def _due(fault: Fault, here: dict[str, str]) -> bool:
    """Whether the fault may act once more; if so it is on record before it acts."""
    path = os.environ.get(ENV_FAULT_LOG)
    known = Path(path).read_text().splitlines() if path and Path(path).exists() else []
    count = sum(line.partition(" @ ")[0] == fault.text for line in known) if path else _acted.get(fault.text, 0)
    if fault.times and count >= fault.times:
        return False
    _acted[fault.text] = count + 1
    if path:
        with open(path, "a") as file:
            file.write(f"{fault.text} @ {','.join(f'{k}={v}' for k, v in here.items())},pid={os.getpid()}\n")
            file.flush()
            os.fsync(file.fileno())
    return True


def _signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _fail(make: Callable[[], BaseException]) -> Callable[[], None]:
    def act() -> None:
        raise make()

    return act


def _out_of_memory() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Injected by a fault.")


def _hang() -> None:
    threading.Event().wait()


def _hang_holding_the_interpreter() -> None:
    import ctypes

    ctypes.PyDLL(None).sleep(600)  # a PyDLL does not let go of the interpreter's lock


def _crash() -> None:
    import ctypes

    ctypes.string_at(0)  # reads where no memory is


ACTIONS: dict[str, Callable[[], str | None]] = {
    "kill": _signal(signal.SIGKILL),
    "crash": _crash,
    "stop": _signal(signal.SIGSTOP),
    "interrupt": _signal(signal.SIGINT),
    "terminate": _signal(signal.SIGTERM),
    "raise": _fail(lambda: RuntimeError("A fault was injected here.")),
    "oom": _fail(_out_of_memory),
    "full": _fail(lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "io_error": _fail(lambda: OSError(errno.EIO, os.strerror(errno.EIO))),
    "hang": _hang,
    "hang_gil": _hang_holding_the_interpreter,
    "nan": lambda: "nan",
    "note": lambda: None,  # only the line in LUTHIER_FAULT_LOG
}
"""What a fault can do."""
