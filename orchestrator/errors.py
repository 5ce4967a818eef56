"""What a person is told when a study cannot be understood or cannot run: all problems at once, no secrets."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from trainables.specs.redaction import redact

__all__ = ["Path", "PreflightError", "Problem", "StudyError", "Terminated", "did_you_mean", "dotted", "redact"]

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a study."""

    path: Path
    """Keys and list positions that lead to the value; empty = the study as a whole."""
    message: str
    """The rule, the value got, the way out."""
    line: int | None = None
    """Line of the study file, from 1; None = the study does not come from a file."""

    def __str__(self) -> str:
        where = [f"line {self.line}"] if self.line is not None else []
        where += [dotted(self.path)] if self.path else []
        return redact(f"{', '.join(where)}: {self.message}" if where else self.message)


class StudyError(ValueError):
    """A study file (or the arguments of `Study`) that cannot be understood.

    Args:
        problems: everything that is wrong, in the order of the file.
        source: what the problems are in, such as the name of the file.
        heading: what that means for the source; None = the words of this class.
    """

    heading = "is not valid"

    def __init__(self, problems: Iterable[Problem], source: str = "The study", heading: str | None = None) -> None:
        self.problems = sorted(problems, key=lambda problem: problem.line or 0)
        self.source = source
        head = f"{source} {heading or self.heading}"
        lines = [str(problem) for problem in self.problems]
        if len(lines) == 1:
            text = f"{head}: {lines[0]}"
        else:
            text = "\n".join([f"{head}, {len(lines)} problems:", *(f"  {line}" for line in lines)])
        super().__init__(redact(text))


class PreflightError(StudyError):
    """A study that is understood but could not run here: unknown model, missing data, too few machines."""

    heading = "cannot run here"


class Terminated(KeyboardInterrupt):
    """SIGTERM: somebody wants this process to end, as Ctrl-C does, but not the person at the keyboard."""


def dotted(path: Path) -> str:
    """`("strategies", 2, "fixed")` → `strategies[2].fixed`; positions count from 0."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def did_you_mean(given: object, known: Collection[str]) -> str:
    """` Did you mean 'x'?` for the nearest known name (with the leading space), or nothing."""
    near = difflib.get_close_matches(str(given).lower(), [name.lower() for name in known], n=1)
    original = {name.lower(): name for name in known}
    return f" Did you mean {original[near[0]]!r}?" if near else ""
