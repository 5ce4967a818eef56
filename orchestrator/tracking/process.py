"""Delivery in a process of its own: neither the study nor the driver's exit depends on MLflow.

Parent → child, on stdin: one line of JSON (settings), then the line `finish`. The end of the pipe means that the parent
has died: the child ends at once, as a kill would end it, and the journal keeps what is not delivered.

Child → parent, on stdout: JSON text sequences (RFC 7464: each text between a record separator and a newline). Anything
else there was printed by a library.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import redact
from orchestrator.tracking.delivery_state import DeliveryLock
from orchestrator.tracking.follower import (
    PATIENCE_S,
    FollowerSettings,
    GiveUp,
    MlflowFollower,
    undelivered_events,
)
from orchestrator.tracking.run_update import Summarizer
from trainables.specs.metrics import TaskMetrics, register

RECORD_SEPARATOR = "\x1e"
FINISH = "finish"
RESTART_S = 5.0
"""Wait before a tracking process that ended unexpectedly is started again."""
PACKAGE_ROOT = Path(__file__).resolve().parents[2]

logger = logging.getLogger("luthier")


class TrackingProcess:
    """The driver's end: starts the process, follows its state, and ends it with the study.

    A process that ends unexpectedly (out of memory, killed by hand) is started again.

    Args:
        settings: what is delivered where. They may hold a password, so they are sent through a pipe.
        module: entry point of the process (`python -m`), which calls `serve`.
    """

    def __init__(self, settings: FollowerSettings, module: str) -> None:
        self.settings = settings
        self.problem: str | None = None
        """Last failure of the server, or of the process; None after a success."""
        self.refused = 0
        """Number of items that the server rejected for good."""
        self.delivered_offset = 0
        """Byte of the journal after the last delivered event."""
        self._progress = float("-inf")
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._mutex = threading.Lock()
        self._closing = threading.Event()
        self._is_exporting = False
        """Whether the process exports the chosen model, for which a closing study waits."""
        self._is_killed = False
        """Whether the end of the study gave up waiting for the process."""
        self._supervisor = threading.Thread(target=self._supervise, name="luthier-tracking", daemon=True)

    @property
    def backlog(self) -> int:
        """Number of events that are not delivered."""
        return undelivered_events(self.settings.path, self.delivered_offset)

    @property
    def pid(self) -> int | None:
        """Process id, None while no process runs."""
        process = self._process
        return process.pid if process is not None else None

    def start(self) -> TrackingProcess:
        """Start to follow the journal; returns at once."""
        self._supervisor.start()
        return self

    def close(self, timeout_s: float = 30.0, patience_s: float = PATIENCE_S) -> int:
        """Deliver what remains, end the process, and return the number of events that are not delivered.

        Closing again only counts again.

        Args:
            timeout_s: seconds at most, without those of the model's export.
            patience_s: seconds without progress while the server fails.
        """
        if not self._closing.is_set():
            limit = GiveUp(timeout_s, patience_s)
            try:
                self._finish()
                last_look = time.monotonic()
                while self._supervisor.is_alive():
                    now = time.monotonic()
                    if self._is_exporting:
                        limit.extend(now - last_look)
                    elif limit.is_due(self.problem, self._progress):
                        break
                    last_look = now
                    self._supervisor.join(0.05)
            finally:
                self._kill()
                self._supervisor.join()
        return self.backlog

    def __enter__(self) -> TrackingProcess:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _supervise(self) -> None:
        while True:
            try:
                process = self._spawn()
            except OSError as error:
                self._report_end(f"cannot be started ({error})")
            else:
                if process is None:
                    return
                last_line = self._read(process)
                code = process.wait()
                if self._is_killed or (code == 0 and self._closing.is_set()):
                    return
                self._report_end(f"has ended (exit code {code}{': ' if last_line else ''}{last_line})")
            if self._closing.wait(RESTART_S):
                return

    def _report_end(self, reason: str) -> None:
        self._is_exporting = False
        self.problem = f"the tracking process {reason}"
        if not self._closing.is_set():
            logger.warning("MLflow: %s. It is started again; the journal keeps what is missing.", self.problem)

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """Start the process, unless the study has ended meanwhile."""
        path = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._mutex:
            if self._is_killed:
                return None
            process = subprocess.Popen(
                # -P: the working directory is the user's, and its files must not shadow modules.
                [sys.executable, "-P", "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                start_new_session=True,  # signals of the driver's terminal and process group do not reach it
            )
            self._process = process
            start = {
                "settings": self.settings.to_dict(),
                "driver_pid": os.getpid(),
                "log_level": logger.getEffectiveLevel(),
            }
            self._send(json.dumps(start))
            if self._closing.is_set():
                self._send(FINISH)
        return process

    def _finish(self) -> None:
        with self._mutex:
            # Under the lock that `_spawn` holds: a process that starts at this moment gets the line, too.
            self._closing.set()
            if self._process is not None:
                self._send(FINISH)

    def _send(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the process has ended; the supervisor reports that
            os.write(self._process.stdin.fileno(), line.encode() + b"\n")

    def _kill(self) -> None:
        with self._mutex:
            self._is_killed = True
            if self._process is not None and self._process.poll() is None:
                # Its whole session: an export that it has started ends with it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, process: subprocess.Popen[bytes]) -> str:
        """Handle the process's messages until it ends; returns the last line that is not one of them."""
        assert process.stdout is not None
        last_line = ""
        for line in read_lines(process.stdout.fileno()):
            text, _, message = line.partition(RECORD_SEPARATOR)
            if message:
                try:
                    self._handle(json.loads(message))
                except (ValueError, KeyError):  # a library printed into the message
                    text += message
            if text.strip():
                last_line = redact(text.strip())
                logger.debug("Output of the tracking process: %s", last_line)
        with self._mutex:
            process.stdout.close()
            if process.stdin is not None:
                process.stdin.close()
            self._process = None
        return last_line

    def _handle(self, message: dict[str, Any]) -> None:
        if "log" in message:
            logger.log(message["log"]["level"], "%s", message["log"]["message"])
            return
        self.problem = message["problem"]
        self.refused = message["refused"]
        self.delivered_offset = message["delivered_offset"]
        self._is_exporting = message["is_exporting"]
        if message["is_progress"]:
            self._progress = time.monotonic()


def serve(summarizer: Summarizer) -> None:
    """Main function of the tracking process: follow the journal until the driver ends the delivery.

    Args:
        summarizer: computes summaries of trials and study.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the driver decides when the delivery ends
        signal.signal(number, signal.SIG_IGN)
    channel = _Channel(os.dup(sys.stdout.fileno()))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not be buffered between messages
    lines = read_lines(sys.stdin.fileno())
    start = json.loads(next(lines))
    logger.handlers = [_ChannelHandler(channel)]
    logger.propagate = False
    logger.setLevel(start["log_level"])
    settings = FollowerSettings(**start["settings"])
    if settings.task is not None:
        register(TaskMetrics.from_dict(settings.task))
    finishing = threading.Event()
    threading.Thread(target=_follow_driver, args=(lines, finishing), name="luthier-driver", daemon=True).start()
    follower = MlflowFollower(
        settings,
        summarizer,
        lock=DeliveryLock(settings.path, pid=start["driver_pid"]),
        on_change=channel.send_state,
    )
    follower.run(finishing)


def _follow_driver(lines: Iterator[str], finishing: threading.Event) -> None:
    for line in lines:
        if line == FINISH:
            finishing.set()
    # The driver has died. A restarted driver needs the delivery lock: end at once, whatever request hangs.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # an export that was started here ends, too
    os._exit(1)


class _Channel:
    """The child's end of its stdout.

    Args:
        descriptor: file descriptor to write to.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._mutex = threading.Lock()
        self._progress = float("-inf")
        self._state: dict[str, Any] | None = None

    def send(self, message: dict[str, Any]) -> None:
        """Send one message."""
        data = f"{RECORD_SEPARATOR}{json.dumps(message)}\n".encode()
        with self._mutex, contextlib.suppress(OSError):  # the driver has died: this process is about to end
            while data:
                data = data[os.write(self._descriptor, data) :]

    def send_state(self, follower: MlflowFollower) -> None:
        """Send the state of a delivery if it has changed."""
        is_progress = follower.progress > self._progress
        state = {
            "problem": follower.problem,
            "refused": follower.refused,
            "delivered_offset": follower.delivered_offset,
            "is_exporting": follower.is_exporting,
        }
        if is_progress or state != self._state:
            self._progress = follower.progress
            self._state = state
            self.send({**state, "is_progress": is_progress})


class _ChannelHandler(logging.Handler):
    """Sends log records to the driver, without secrets."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            message = redact(self.format(record))
            self._channel.send({"log": {"level": record.levelno, "message": message}})
        except Exception:
            self.handleError(record)


def read_lines(descriptor: int) -> Iterator[str]:
    """Lines of a pipe, until its other end is closed.

    Reads the descriptor itself: a thread that is blocked in a buffered file object holds a lock, which makes the
    interpreter abort when it ends.
    """
    rest = b""
    while chunk := os.read(descriptor, 65536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")
