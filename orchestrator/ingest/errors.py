"""Data errors, and the wording of their messages."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from orchestrator.errors import did_you_mean

SOURCE_HINT = "Set data.source to what is there."
"""Way out where a folder has no file of the kind of source that the study names."""


class DataError(ValueError):
    """Data that no study could use: rule, value found, way out."""


def printable(name: str) -> str:
    r"""A name with characters escaped that could mislead a reader.

    Backslashes, control characters and invalid UTF-8, for logs, lists and Arrow files. Different names stay different.

    Example:
        >>> print(printable("cat\n.png"))
        cat\n.png
    """
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(_escaped(character) for character in name)


def _escaped(character: str) -> str:
    if character.isprintable() and character != "\\":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def first_few(names: Iterable[str], limit: int = 5) -> str:
    """The first names of a list, and how many more there are.

    Example:
        >>> first_few("abcdefg")
        'a, b, c, d, e and 2 more'
    """
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def existing(path: Path) -> Path:
    """The path itself, after a check that it can be listed or read.

    Raises:
        DataError: nothing there, with similar names of the nearest folder; or no permission.
    """
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        elif path.exists():
            with open(path, "rb"):
                pass
        else:
            raise _missing(path)
    except PermissionError as error:
        raise DataError(f"Data must be readable, but this user has no permission to read {path}.") from error
    return path


def _missing(path: Path) -> DataError:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    first_missing = path.absolute().relative_to(folder).parts[0]
    names = sorted(printable(entry.name) for entry in folder.iterdir() if not entry.name.startswith("."))
    hint = did_you_mean(first_missing, names)
    if not hint:
        hint = f" The folder {printable(str(folder))} holds: {first_few(names) or 'nothing'}."
    return DataError(f"Data must exist, but there is nothing at {printable(str(path))}.{hint}")
