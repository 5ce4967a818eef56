"""Output of the commands: data on stdout, everything else on stderr, secrets redacted on both."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

from orchestrator.commands import exit_status
from orchestrator.errors import StudyError, Terminated, dotted, redact

if TYPE_CHECKING:
    from rich.console import Console

_LOGGERS = ("luthier", "orchestrator", "trainables", "search_spaces")


class Output:
    """Output of one command.

    Args:
        as_json: print the result as one JSON document on stdout; prints of libraries go to stderr instead.
        verbose: show tracebacks and informational logs.
    """

    def __init__(self, as_json: bool = False, verbose: bool = False) -> None:
        self.as_json = as_json
        self.verbose = verbose
        self._stdout: IO[str] | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Set up logging and output for the duration of a command.

        For JSON, stdout is reserved for the result.
        """
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Redacting("%(levelname)s: %(message)s"))
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO if self.verbose else logging.WARNING)
        try:
            with _reserved_stdout() if self.as_json else contextlib.nullcontext() as stdout:
                self._stdout = stdout
                yield
        finally:
            self._stdout = None
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(level)

    def result(self, data: Any, render: Callable[[Console], None]) -> None:
        """Print the command's result: `data` as JSON, or as text by `render`."""
        if self.as_json:
            text = redact(json.dumps(data, indent=2, ensure_ascii=False, default=str))
            print(text, file=self._stdout or sys.stdout, flush=True)
            return
        from rich.console import Console

        render(Console(file=sys.stdout, soft_wrap=False))

    def note(self, text: str) -> None:
        """Print a line on stderr."""
        print(redact(text), file=sys.stderr, flush=True)

    def error(self, error: BaseException) -> int:
        """Print an error as one paragraph, and return the exit status."""
        code = exit_status.of_error(error)
        if self.verbose:
            self.note("".join(traceback.format_exception(error)).rstrip())
        else:
            self.note(f"Error: {message(error)}")
        if self.as_json:
            report = {"error": {"type": type(error).__name__, "message": message(error)}, "exit_code": code}
            if isinstance(error, StudyError):
                report["error"]["problems"] = [  # type: ignore[index]
                    {"path": dotted(p.path), "line": p.line, "message": p.message} for p in error.problems
                ]
            self.result(report, lambda console: None)
        return code


def message(error: BaseException) -> str:
    """An error as one paragraph without a traceback; unexpected types are marked as such."""
    if isinstance(error, Terminated):
        return "terminated. Run the same command again to continue."
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. Run the same command again to continue."
    if isinstance(error, ValueError | OSError) and str(error):
        return redact(str(error))
    description = type(error).__name__
    lines = str(error).strip().splitlines()
    if lines:
        description += f": {lines[0]}"
    return redact(
        f"unexpected {description}. Run the command again with -v for the traceback, and report it if it looks like a "
        "defect of Luthier."
    )


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@contextlib.contextmanager
def _reserved_stdout() -> Iterator[IO[str]]:
    """A stream to the real stdout.

    Prints of this process and its children go to stderr meanwhile.
    """
    stdout = sys.stdout
    try:
        descriptor = stdout.fileno()
    except (OSError, ValueError, io.UnsupportedOperation):
        with contextlib.redirect_stdout(sys.stderr):
            yield stdout
        return
    stdout.flush()
    # Redirected at the descriptor: C code and child processes do not write to sys.stdout.
    saved = os.dup(descriptor)
    os.dup2(2, descriptor)
    try:
        # `closefd=False`: the descriptor is needed once more, to restore stdout.
        with contextlib.redirect_stdout(sys.stderr), open(saved, "w", encoding="utf-8", closefd=False) as stream:
            yield stream
    finally:
        os.dup2(saved, descriptor)
        os.close(saved)
