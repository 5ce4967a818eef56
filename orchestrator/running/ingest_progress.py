"""What a person sees while many images are read: a bar on a terminal, a line every ten seconds otherwise."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from orchestrator.ingest.decoding import Progress
from orchestrator.running.progress import duration

EVERY = 10.0
"""Seconds between two lines; what takes less is not spoken of."""


@contextlib.contextmanager
def shown(console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """What to pass on as `progress` of `ingest` or `check`; shows nothing until images are read.

    Args:
        console: default: stderr, because stdout belongs to the command's result.
        clock: seconds.
    """
    console = console or Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        columns = (TextColumn("Reading images"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            yield _on_bar(bar, clock)
    else:
        yield _in_lines(console, clock)


def _on_bar(bar: Bar, clock: Callable[[], float]) -> Progress:
    began, lock = clock(), threading.Lock()
    task: TaskID | None = None

    def progress(done: int, total: int, unreadable: int) -> None:
        nonlocal task
        with lock:
            if task is None:
                task = bar.add_task("", total=total, note="")
        bar.update(task, completed=done, note=_rate(done, clock() - began, unreadable))

    return progress


def _in_lines(console: Console, clock: Callable[[], float]) -> Progress:
    began = told = clock()
    lock = threading.Lock()

    def progress(done: int, total: int, unreadable: int) -> None:
        nonlocal told
        with lock:
            now = clock()
            if now - told < EVERY:
                return
            told = now
        left = duration((now - began) * (total - done) / max(done, 1))
        line = f"Reading images: {done:,} of {total:,} ({_rate(done, now - began, unreadable)}), {left} left"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return progress


def _rate(done: int, seconds: float, unreadable: int) -> str:
    bad = f", {unreadable:,} unreadable" if unreadable else ""
    return f"{done / seconds if seconds > 0 else 0:,.0f}/s{bad}"
