"""Seeds of named random streams."""

from __future__ import annotations

import hashlib
import json


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one named random stream, such as `"shuffle"` or `("split", 3)`.

    Derived by hashing the names, so that a new stream never changes the draws of an existing one.

    Example:
        >>> stream_seed(0, "shuffle") == stream_seed(0, "shuffle")
        True
        >>> stream_seed(0, "shuffle") == stream_seed(0, "head")
        False
    """
    # JSON keeps names apart: ("split", 1) and ("split", "1") are two streams.
    text = json.dumps([seed, *names])
    # 63 bits: torch's generators take a signed integer of 64.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
