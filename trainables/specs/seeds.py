"""Seeds of named streams of random numbers."""

from __future__ import annotations

import hashlib
import json


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one named stream of random numbers ("shuffle", "head", …).

    Streams are derived by hashing names, so that a new stream never changes the draws of an old one.
    """
    text = json.dumps([seed, *names])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
