"""Changes to the driver's own process, undone afterwards.

Environment variables and signal handlers; a free port.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from types import FrameType

from orchestrator.errors import Terminated


@contextlib.contextmanager
def environment(values: Mapping[str, str | None], override: bool = False) -> Iterator[None]:
    """Set (None = unset) environment variables for the duration of a block.

    Args:
        values: name → value.
        override: False keeps the value of variables that have one.
    """
    before = {name: os.environ.get(name) for name in values}
    changed = {name: value for name, value in values.items() if override or before[name] is None}
    _apply(changed)
    try:
        yield
    finally:
        _apply({name: before[name] for name in changed})


def _apply(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def sigterm_restored() -> Iterator[None]:
    """Restore the SIGTERM handler after the block (`ray.init` installs one)."""
    # Python sets signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None: the former handler was not set by Python, and cannot be set from it.
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM as SIGINT within the block.

    `finally` clauses then run, and the block raises `Terminated`. To be entered after `ray.init`; `sigterm_restored`
    undoes it.
    """
    received = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        on_interrupt = signal.getsignal(signal.SIGINT)
        if not callable(on_interrupt):  # shells start background jobs with SIGINT ignored
            raise KeyboardInterrupt
        on_interrupt(signal.SIGINT, frame)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except KeyboardInterrupt as error:  # not always the handler's own: Ray replaces it by another instance
        if received:
            raise Terminated from error
        raise


@contextlib.contextmanager
def second_interrupt_exits() -> Iterator[None]:
    """Within the block the first Ctrl-C raises KeyboardInterrupt, the second exits the process at once.

    Has no effect where SIGINT is ignored or has a handler other than Python's default.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    received = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        if received:
            # Not `print`, whose buffer the interrupted code may hold; `_exit` flushes none either.
            os.write(2, b"Stopped at once. Run the same command again to continue.\n")
            os._exit(128 + signal.SIGINT)
        received = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
