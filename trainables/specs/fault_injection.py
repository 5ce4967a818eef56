"""Fault injection at named points of trials and driver, for tests and soak.

The environment variable `LUTHIER_FAULT` holds faults, separated by `;`:

    LUTHIER_FAULT="trial=2,unit=3,phase=after_checkpoint,action=kill;phase=step,trial=4,step=7,action=nan"

A fault fires at the point of its `phase` if every other field that it names matches (`trial`: number in the study,
`unit`: 1-based, `step`: 1-based optimiser step within the unit, `event` and `seq`: kind and number of a journal event).
It fires `times` times (default 1; 0 = always), counted over all processes if `LUTHIER_FAULT_LOG` names a file, else per
process. Without the variable a point costs one look-up of a cached empty tuple.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ENV_FAULTS = "LUTHIER_FAULT"
ENV_FAULT_LOG = "LUTHIER_FAULT_LOG"

PHASES = {
    "before_unit": "before a trial's unit",
    "step": "after an optimiser step's loss, before its gradients",
    "before_checkpoint": "after a unit, before its checkpoint",
    "in_checkpoint": "after a checkpoint's tensors, before its manifest makes it valid",
    "after_checkpoint": "after a checkpoint, before the unit is reported",
    "before_event": "before the driver writes an event to the journal",
    "after_event": "after the event is synced, before any consumer reads it",
    "in_weights": "after the tensors of kept weights, before their manifest",
    "in_predictions": "after the rows of kept predictions, before the file has its name",
    "after_kept": "after a trial's weights and predictions were kept, before its final checkpoint",
    "in_discard": "after kept weights lost their name, before their files are removed",
    "in_corruptions": "in a trial's final evaluation, before each corruption and severity",
    "finalize": "after a trial's last unit, before its final evaluation",
}
FIELDS = ("trial", "unit", "step", "event", "seq")
"""Fields that narrow a fault down."""

_context: dict[str, int | str] = {}
_fired: dict[str, int] = {}


@dataclass(frozen=True)
class Fault:
    """One fault of `LUTHIER_FAULT`."""

    text: str
    phase: str
    action: str
    times: int = 1
    """How often it fires; 0 = always."""
    where: dict[str, str] = field(default_factory=dict)
    """Fields that must match, by name."""

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Parse `key=value,…`.

        Raises:
            ValueError: an unknown key, phase or action.

        Example:
            >>> Fault.parse("phase=step,trial=4,action=nan").where
            {'trial': '4'}
        """
        fields = dict(part.strip().partition("=")[::2] for part in text.split(","))
        phase = fields.pop("phase", "")
        action = fields.pop("action", "")
        times = fields.pop("times", "1")
        if phase not in PHASES or action not in ACTIONS or not times.isdigit() or set(fields) - set(FIELDS):
            raise ValueError(
                f"A fault has phase= one of {', '.join(PHASES)}, action= one of {', '.join(ACTIONS)}, and may have "
                f"times= and {', '.join(f'{name}=' for name in FIELDS)}, but {ENV_FAULTS} has {text!r}."
            )
        return cls(text.strip(), phase, action, int(times), fields)


@contextlib.contextmanager
def fault_context(**fields: int | str) -> Iterator[None]:
    """Set fields (`trial=`, `unit=`) for the points inside the block."""
    before = dict(_context)
    _context.update(fields)
    try:
        yield
    finally:
        _context.clear()
        _context.update(before)


def fault_point(phase: str, **fields: int | str) -> str | None:
    """Fire the first fault that matches this point.

    Returns:
        The action that the caller must perform ("nan": make the loss NaN), else None.
    """
    faults = _parsed_faults()
    if not faults:
        return None
    point = {name: str(value) for name, value in {**_context, **fields}.items()}
    for fault in faults:
        matches = fault.phase == phase and all(point.get(name) == value for name, value in fault.where.items())
        if matches and _count_firing(fault, point):
            return ACTIONS[fault.action]()
    return None


def reset_faults() -> None:
    """Read `LUTHIER_FAULT` again at the next point, and reset the counts of this process."""
    _parsed_faults.cache_clear()
    _fired.clear()


@functools.cache
def _parsed_faults() -> tuple[Fault, ...]:
    return tuple(Fault.parse(text) for text in os.environ.get(ENV_FAULTS, "").split(";") if text.strip())


def _count_firing(fault: Fault, point: dict[str, str]) -> bool:
    """Whether the fault may fire once more; counts it if so.

    Counted first, since the fault may kill this process.
    """
    path = os.environ.get(ENV_FAULT_LOG) or None
    count = _fired.get(fault.text, 0) if path is None else _logged_firings(Path(path), fault)
    if fault.times and count >= fault.times:
        return False
    _fired[fault.text] = count + 1
    if path is not None:
        fields = ",".join(f"{name}={value}" for name, value in point.items())
        with open(path, "a") as file:
            file.write(f"{fault.text} @ {fields},pid={os.getpid()}\n")
            file.flush()
            os.fsync(file.fileno())
    return True


def _logged_firings(log: Path, fault: Fault) -> int:
    if not log.exists():
        return 0
    return sum(line.partition(" @ ")[0] == fault.text for line in log.read_text().splitlines())


def _send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _raise(make: Callable[[], BaseException]) -> Callable[[], None]:
    def act() -> None:
        raise make()

    return act


def _out_of_memory() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Injected by a fault.")


def _hang() -> None:
    threading.Event().wait()


def _hang_holding_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(600)  # unlike CDLL, PyDLL keeps the interpreter's lock during the call


def _crash() -> None:
    ctypes.string_at(0)  # reads address 0: segmentation fault


ACTIONS: dict[str, Callable[[], str | None]] = {
    "kill": _send(signal.SIGKILL),
    "crash": _crash,
    "stop": _send(signal.SIGSTOP),
    "interrupt": _send(signal.SIGINT),
    "terminate": _send(signal.SIGTERM),
    "raise": _raise(lambda: RuntimeError("A fault was injected here.")),
    "oom": _raise(_out_of_memory),
    "full": _raise(lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "io_error": _raise(lambda: OSError(errno.EIO, os.strerror(errno.EIO))),
    "hang": _hang,
    "hang_gil": _hang_holding_the_interpreter,
    "nan": lambda: "nan",
    "note": lambda: None,  # only logs to LUTHIER_FAULT_LOG
}
"""Action of a fault by name."""
