"""Progress displays of a study and of reading many images.

A study has a live table on a terminal, else one line per event; reading has a bar on a terminal, else a line every ten
seconds.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from orchestrator.ingest.decoding import DecodingProgress
from orchestrator.record.records import MEMORY_LAYOUT, TrialRecord, advance, metrics_of, suggested, validation_score
from trainables.specs.metrics import UNIT_SECONDS, TaskMetrics, task_metrics

RECENT = 5
"""Ended trials in the live table, and paused ones."""
_STYLES = {"complete": "dim", "pruned": "dim", "paused": "dim", "failed": "red"}


class Progress:
    """Fed with the journal's events; writes to stderr, because stdout belongs to the command's result.

    Colour follows the terminal and the NO_COLOR convention. A pickled copy is silent.

    Args:
        trials: trials that the study will run at most, for the ETA; None = unknown.
        epochs: units of budget of one trial.
        console: default: stderr.
        units: units that a trial really takes, where they may be fewer than its budget (linear probing takes one);
            None = `epochs`.
    """

    def __init__(
        self,
        trials: int | None = None,
        epochs: int | None = None,
        console: Console | None = None,
        units: Callable[[TrialRecord], int | None] | None = None,
    ) -> None:
        self.trials, self.epochs = trials, epochs
        self._metrics = task_metrics()
        self._planned = units
        self._console: Console | None = console or Console(stderr=True)
        self._live: Live | None = None
        self._records: dict[str, TrialRecord] = {}
        self._began = time.monotonic()

    def start(self) -> None:
        """Show the live table, if this is a terminal that can."""
        self._began = time.monotonic()
        console = self._console
        if console is not None and console.is_terminal and not console.is_dumb_terminal and self._live is None:
            self._live = Live(
                get_renderable=self.render, console=console, refresh_per_second=2, vertical_overflow="ellipsis"
            )
            self._live.start()

    def stop(self) -> None:
        """Leave the last state of the table on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_console": None, "_live": None, "_planned": None}

    def event(self, event: Mapping[str, Any]) -> None:
        """Apply one event of the journal."""
        if event["kind"] == "study_started":
            self._metrics = metrics_of(event.get("spec"))
        record = self._update(event)
        if self._console is None or self._live is not None:
            return
        line = event_line(event, record, self._units(record), self._metrics)
        if line:
            clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
            self._console.print(f"{clock} {line}", markup=False, highlight=False, soft_wrap=True)

    def _update(self, event: Mapping[str, Any]) -> TrialRecord | None:
        trial_id = event.get("trial_id")
        if trial_id is None:
            return None
        record = self._records.get(str(trial_id))
        if event["kind"] == "trial_suggested":
            record = suggested(event)
        elif record is not None:
            record = advance(record, event)
        if record is not None:
            self._records[record.trial_id] = record
        return record

    def _units(self, record: TrialRecord | None) -> int | None:
        return self.epochs if self._planned is None or record is None else self._planned(record)

    def _snapshot(self) -> list[TrialRecord]:
        return list(self._records.values())  # one step, so that the display's thread sees no half-made change

    @property
    def spend(self) -> float:
        """Seconds inside units of budget, over all trials."""
        return sum(spent(record) for record in self._snapshot())

    @property
    def eta(self) -> float | None:
        """Seconds until the study ends, at the rate so far.

        None until a trial has ended or if the total is unknown.
        """
        ended = sum(not r.unfinished for r in self._snapshot())
        if not ended or self.trials is None:
            return None
        # Running trials count by the share of their units that is done.
        running = sum(r.unit / (self._units(r) or math.inf) for r in self._snapshot() if r.unfinished)
        return (time.monotonic() - self._began) * max(self.trials - ended - running, 0.0) / (ended + running)

    def render(self) -> RenderableType:
        """The live table: running trials, the last ended and paused ones, and a line for the study."""
        records = self._snapshot()
        active = [r for r in records if r.state in ("running", "suggested")]
        paused = [r for r in records if r.state == "paused"]
        ended = sorted((r for r in records if r not in [*active, *paused]), key=lambda r: r.ended or 0.0)[-RECENT:]
        table = Table(box=None, pad_edge=False)
        for header in ("trial", "strategy", "epoch", "val", "spend", "state"):
            table.add_column(header, justify="left" if header in ("strategy", "state") else "right")
        waiting = sorted(paused, key=lambda r: r.number)[-RECENT:]
        for record in [*ended, *waiting, *sorted(active, key=lambda r: r.number)]:
            style = _STYLES.get(record.state)
            table.add_row(*_row(record, self._units(record), self._metrics), style=style)
        return Group(table, Text(self.summary(), style="bold"))

    def summary(self) -> str:
        """The study on one line: trials ended and paused, best validation score, spend and ETA."""
        records = self._snapshot()
        ended = sum(not r.unfinished for r in records)
        total = "?" if self.trials is None else str(self.trials)
        parts = [f"{ended}/{total} trials"]
        if failed := sum(r.state == "failed" for r in records):
            parts.append(f"{failed} failed")
        if paused := sum(r.state == "paused" for r in records):
            parts.append(f"{paused} paused")
        scored = [(validation_score(r, self._metrics), r) for r in records if r.role == "search"]
        searched = [(value, r) for value, r in scored if value is not None]
        if searched:
            value, best = max(searched, key=lambda pair: self._metrics.selection.score(pair[0]))
            parts.append(f"best val {value:.3f} ({best.label})")
        eta = self.eta
        return ", ".join([*parts, f"spend {duration(self.spend)}", f"ETA {'-' if eta is None else duration(eta)}"])


def event_line(event: Mapping[str, Any], record: TrialRecord | None, epochs: int | None, metrics: TaskMetrics) -> str:
    """One line for a log, empty for events that need none."""
    kind = event["kind"]
    if kind == "study_started":
        return f"study {event.get('study', '')} started"
    if kind == "study_finished":
        return f"study {event.get('state', 'complete')}"
    if kind == "measured":
        return _measured_line(event)
    if kind == MEMORY_LAYOUT:
        return layout_line(event)
    if record is None:
        return ""
    name = f"trial {record.number} {record.label}"
    value = validation_score(record, metrics)
    val = "" if value is None else f", val {value:.3f}"
    if kind == "trial_started":
        return f"{name}: {'started' if record.attempts == 1 else f'started again (attempt {record.attempts})'}"
    if kind == "result":
        of_unit = record.history[-1].get(metrics.validation)
        val = "" if of_unit is None else f", val {of_unit:.3f}"
        return f"{name}: epoch {record.unit}/{epochs or '?'}{val}, {duration(spent(record))}"
    if kind == "trial_finished":
        length = "1 epoch" if record.unit == 1 else f"{record.unit} epochs"
        return f"{name}: {record.state} after {length}{val}, {duration(spent(record))}"
    if kind == "trial_paused":
        return f"{name}: paused after epoch {record.unit}/{epochs or '?'}{val}"
    if kind == "trial_promoted":
        return f"{name}: promoted after epoch {record.unit}/{epochs or '?'}{val}"
    if kind in ("trial_failed", "trial_retried"):
        return f"{name}: {kind.removeprefix('trial_')} ({event.get('reason')}) {event.get('error') or ''}".rstrip()
    return ""


def layout_line(event: Mapping[str, Any]) -> str:
    """The memory layout of a study and why, from the fields of its event."""
    name = "channels last" if event["channels_last"] else "contiguous"
    times = event.get("seconds")
    if times is None:
        return f"memory layout: {name}, as on every GPU"
    texts = [
        f"{layout.replace('_', ' ')} {seconds['training_step']:.3g} s and {seconds['evaluation_batch']:.3g} s"
        for layout, seconds in times.items()
    ]
    return f"memory layout: {name}; a training step and an evaluation batch took {', '.join(texts)} of CPU time"


def _measured_line(event: Mapping[str, Any]) -> str:
    what = str(event["what"])
    metrics = {key.removeprefix(f"{what}/"): value for key, value in event["metrics"].items() if value is not None}
    means = {key: value for key, value in metrics.items() if not key.endswith(("/low", "/high"))}
    values = ", ".join(f"{key} {value:.2f}" for key, value in sorted(means.items(), key=lambda pair: -pair[1]))
    return f"{what} measured: {values or 'nothing'}"


def spent(record: TrialRecord) -> float:
    """Seconds inside the units of one trial."""
    return sum(past.get(UNIT_SECONDS.name, 0.0) for past in record.history)


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _row(record: TrialRecord, epochs: int | None, metrics: TaskMetrics) -> tuple[str, ...]:
    value = validation_score(record, metrics)
    state = f"{record.state} ({record.reason})" if record.reason else record.state
    label = record.label if record.role == "search" else f"{record.label} [{record.role}]"
    val = "-" if value is None else f"{value:.3f}"
    unit = f"{record.unit}/{epochs or '?'}"
    return str(record.number), escape(label), unit, val, duration(spent(record)), escape(state)


LINE_INTERVAL_S = 10.0
"""Seconds between two lines; what takes less gets none."""


@contextlib.contextmanager
def ingest_progress(
    console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[DecodingProgress]:
    """The callback for `progress` of `ingest` and `check`; displays nothing until images are read.

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


def _on_bar(bar: Bar, clock: Callable[[], float]) -> DecodingProgress:
    began, lock = clock(), threading.Lock()
    task: TaskID | None = None

    def progress(done: int, total: int, unreadable: int) -> None:
        nonlocal task
        with lock:
            if task is None:
                task = bar.add_task("", total=total, note="")
        bar.update(task, completed=done, note=_rate(done, clock() - began, unreadable))

    return progress


def _in_lines(console: Console, clock: Callable[[], float]) -> DecodingProgress:
    began = clock()
    last_line = began
    lock = threading.Lock()

    def progress(done: int, total: int, unreadable: int) -> None:
        nonlocal last_line
        with lock:
            now = clock()
            if now - last_line < LINE_INTERVAL_S:
                return
            last_line = now
        left = duration((now - began) * (total - done) / max(done, 1))
        line = f"Reading images: {done:,} of {total:,} ({_rate(done, now - began, unreadable)}), {left} left"
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return progress


def _rate(done: int, seconds: float, unreadable: int) -> str:
    bad = f", {unreadable:,} unreadable" if unreadable else ""
    return f"{done / seconds if seconds > 0 else 0:,.0f}/s{bad}"
