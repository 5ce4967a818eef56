"""Where a command's output goes: data on stdout, everything else on stderr, no secret on either."""

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

from orchestrator.errors import StudyError, Terminated, dotted, redact

if TYPE_CHECKING:
    from rich.console import Console

OK, FAILED, USAGE, PARTIAL, PREFLIGHT, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 4, 130, 143
"""Exit codes of every command."""

_PREFLIGHT_ERRORS = frozenset(
    {
        "orchestrator.errors.PreflightError",
        "orchestrator.ingest.errors.DataError",
        "trainables.data.store.StoreError",
        "orchestrator.cluster.auth.ClusterError",
        "orchestrator.cluster.resources.ResourceError",
    }
)


class Output:
    """What one command prints.

    Args:
        as_json: data as one JSON document on stdout; what libraries print there goes to stderr instead.
        verbose: show tracebacks and informational logs.
    """

    def __init__(self, as_json: bool = False, verbose: bool = False) -> None:
        self.as_json, self.verbose = as_json, verbose
        self._stdout: IO[str] | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Set up logging and, for JSON, keep stdout for the result, for the length of a command."""
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Redacting("%(levelname)s: %(message)s"))
        names = ("luthier", "orchestrator", "trainables", "search_spaces")
        before = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
        for logger, _ in before:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO if self.verbose else logging.WARNING)
        try:
            with _stdout_kept() if self.as_json else contextlib.nullcontext() as kept:
                self._stdout = kept
                yield
        finally:
            self._stdout = None
            for logger, level in before:
                logger.removeHandler(handler)
                logger.setLevel(level)

    def result(self, data: Any, render: Callable[[Console], None]) -> None:
        """Print the command's result: `data` as JSON, or what `render` prints for a person."""
        if self.as_json:
            text = redact(json.dumps(data, indent=2, ensure_ascii=False, default=str))
            print(text, file=self._stdout or sys.stdout, flush=True)
            return
        from rich.console import Console

        render(Console(file=sys.stdout, soft_wrap=False))

    def note(self, text: str) -> None:
        """A line for a person, on stderr."""
        print(redact(text), file=sys.stderr, flush=True)

    def error(self, error: BaseException) -> int:
        """Say what went wrong, in one paragraph, and return the exit code."""
        code = exit_code(error)
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


def exit_code(error: BaseException) -> int:
    """The exit code that stands for an error."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if isinstance(error, KeyboardInterrupt):
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    if names & _PREFLIGHT_ERRORS:
        return PREFLIGHT
    return USAGE if isinstance(error, StudyError | FileExistsError) else FAILED


def message(error: BaseException) -> str:
    """One paragraph without a traceback. Errors that are not meant for a person are named as such."""
    if isinstance(error, KeyboardInterrupt):
        word = "terminated" if isinstance(error, Terminated) else "interrupted"
        return f"{word}. Run the same command again to continue."
    if isinstance(error, ValueError | OSError) and str(error):
        return redact(str(error))
    first = str(error).strip().splitlines()[:1]
    return redact(
        f"unexpected {type(error).__name__}{': ' + first[0] if first else ''}. Run the command again with -v for the "
        "traceback, and report it if it looks like a defect of Luthier."
    )


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@contextlib.contextmanager
def _stdout_kept() -> Iterator[IO[str]]:
    """Give stdout to the caller alone; prints of this process and its children go to stderr."""
    stdout = sys.stdout
    try:
        descriptor = stdout.fileno()
    except (OSError, ValueError, io.UnsupportedOperation):
        with contextlib.redirect_stdout(sys.stderr):
            yield stdout
        return
    stdout.flush()
    kept = os.dup(descriptor)
    os.dup2(2, descriptor)
    try:
        with contextlib.redirect_stdout(sys.stderr), open(kept, "w", encoding="utf-8", closefd=False) as stream:
            yield stream
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
