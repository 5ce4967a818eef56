"""What a person is told about data that cannot be used, and names made fit to be shown."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path

OTHER = "Set data.source to what is there."
"""The way out where a folder holds nothing of the kind of source that was named."""


class DataError(ValueError):
    """Data that no study could use: the rule, what was found, the way out."""


def shown(name: str) -> str:
    r"""A name as it may stand in logs, lists and Arrow files: backslashes, control characters and bytes that are no
    valid UTF-8 become escapes (`\n` → the two characters `\n`). Different names stay different."""
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape", "surrogatepass").decode() for c in name
    )


def did_you_mean(name: str, known: Collection[str]) -> str:
    """` Did you mean 'x'?`, or nothing if nothing is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def few(names: Iterable[str], limit: int = 5) -> str:
    """The first names of a list (as they are to be shown), and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def counted(count: int, noun: str, several: str = "") -> str:
    """`1 image`, `2 images`; `several` is the plural where it is not made with an s."""
    return f"{count} {noun if count == 1 else several or f'{noun}s'}"


def existing(path: Path) -> Path:
    """The path itself, if there is something that can be listed or read.

    Raises:
        DataError: nothing there, with the nearest names of the folder that exists; or no permission.
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
    parents = (p for p in path.absolute().parents if p.is_dir())
    parent = next(parents)
    wanted = path.absolute().relative_to(parent).parts[0]
    names = sorted(shown(p.name) for p in parent.iterdir() if not p.name.startswith("."))
    hint = did_you_mean(wanted, names) or f" The folder {shown(str(parent))} holds: {few(names) or 'nothing'}."
    return DataError(f"Data must exist, but there is nothing at {shown(str(path))}.{hint}")
