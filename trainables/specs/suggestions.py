"""Suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def did_you_mean(value: object, options: Collection[str]) -> str:
    """A sentence that suggests the option nearest to `value`.

    With a leading space; empty if none is near. Upper and lower case count as equal.

    Example:
        >>> did_you_mean("learning_rat", ["learning_rate", "epochs"])
        " Did you mean 'learning_rate'?"
        >>> did_you_mean("momentum", ["epochs"])
        ''
    """
    by_lower_case = {option.lower(): option for option in options}
    matches = difflib.get_close_matches(str(value).lower(), by_lower_case, n=1)
    return f" Did you mean {by_lower_case[matches[0]]!r}?" if matches else ""
