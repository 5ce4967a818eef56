"""Names of columns beside those that classes give their names to."""

from __future__ import annotations

from collections.abc import Collection


def free_name(name: str, classes: Collection[str]) -> str:
    """The name, with underscores added where a class has it.

    Example:
        >>> free_name("path", ["cat", "path"])
        'path_'
    """
    while name in classes:
        name += "_"
    return name
