"""Short content hashes for names of files, caches and configurations."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def short_hash(value: Any, digits: int = 12) -> str:
    """First hex digits of the SHA-256 of a JSON value.

    The order of keys does not matter. Collisions: among n values the probability is about n² / 2^(4 · digits + 1), for
    the default of 12 digits and a million values 0.2 %.

    Args:
        value: anything that `json.dumps` accepts.
        digits: length of the result, at most 64.

    Example:
        >>> short_hash({"lr": 0.1, "epochs": 20})
        '7bc736cd0f7f'
        >>> short_hash({"epochs": 20, "lr": 0.1}, digits=4)
        '7bc7'
    """
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
