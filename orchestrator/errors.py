"""User-facing errors of a study, reported all at once and without secrets.

Each problem has the rule, the value and the way out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trainables.specs.redaction import redact
from trainables.specs.suggestions import did_you_mean

__all__ = ["KeyPath", "PreflightError", "Problem", "StudyError", "Terminated", "did_you_mean", "dotted", "redact"]

KeyPath = tuple[str | int, ...]
"""Keys and list positions that lead to a value of the study file."""


@dataclass(frozen=True)
class Problem:
    """One problem of a study."""

    path: KeyPath
    """Path of the value; empty = the study as a whole."""
    message: str
    """The rule, the value found, the way out."""
    line: int | None = None
    """Line of the study file, from 1; None = the study does not come from a file."""

    def __str__(self) -> str:
        location = []
        if self.line is not None:
            location.append(f"line {self.line}")
        if self.path:
            location.append(dotted(self.path))
        return redact(f"{', '.join(location)}: {self.message}" if location else self.message)


class StudyError(ValueError):
    """An invalid study file, or invalid arguments of `Study`.

    Args:
        problems: all problems, in the order of the file.
        source: what has the problems, such as the name of the file.
        heading: the predicate of the first line; None = that of this class.
    """

    heading = "is not valid"

    def __init__(self, problems: Iterable[Problem], source: str = "The study", heading: str | None = None) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.line or 0)
        self.source = source
        title = f"{source} {heading or self.heading}"
        lines = [str(problem) for problem in self.problems]
        if len(lines) == 1:
            text = f"{title}: {lines[0]}"
        else:
            text = "\n".join([f"{title}, {len(lines)} problems:", *(f"  {line}" for line in lines)])
        super().__init__(redact(text))


class PreflightError(StudyError):
    """A valid study that cannot run here: unknown model, missing data, too few machines."""

    heading = "cannot run here"


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM; handled as Ctrl-C is, with an exit code of its own."""


def dotted(path: KeyPath) -> str:
    """A path in one string; positions count from 0.

    >>> dotted(("strategies", 2, "fixed", "lr_head"))
    'strategies[2].fixed.lr_head'
    """
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif text:
            text += f".{part}"
        else:
            text = part
    return text
