"""What the process that drives a study changes about itself: environment, signals, a free port; all undone after."""

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
    """Set (None = unset) environment variables for the length of a block.

    Args:
        override: False leaves variables alone that have a value already.
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
    """Give SIGTERM back the handler that it had before the block (`ray.init` installs one of its own)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM does what Ctrl-C does, so that whoever writes records and closes clusters in `finally`
    gets to it; what leaves the block is `Terminated`. For after `ray.init`; `sigterm_restored` undoes it."""
    heard = False

    def hear(signum: int, frame: FrameType | None) -> None:
        nonlocal heard
        heard = True
        on_interrupt = signal.getsignal(signal.SIGINT)
        if not callable(on_interrupt):  # a shell starts background jobs with SIGINT ignored
            raise KeyboardInterrupt
        on_interrupt(signal.SIGINT, frame)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, hear)
    try:
        yield
    except KeyboardInterrupt as error:  # Ray raises one of its own where a signal's handler raised
        if heard:
            raise Terminated from error
        raise


@contextlib.contextmanager
def second_interrupt_leaves() -> Iterator[None]:
    """For a command: Ctrl-C ends it in good order, the next Ctrl-C at once. A program with a handler of its own, and
    one that ignores SIGINT, keep that."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    heard = False

    def hear(signum: int, frame: FrameType | None) -> None:
        nonlocal heard
        if heard:
            os.write(2, b"Stopped at once. Run the same command again to continue.\n")
            os._exit(128 + signal.SIGINT)
        heard = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
