"""One line of a journal: an event as JSON, and a checksum over its bytes, for a digit that a disk changed is as good
JSON as the right one."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

NEEDED = frozenset({"seq", "time", "kind"})
"""Fields of every event."""

_END = re.compile(rb', "crc": "([0-9a-f]{8})"}\Z')


def encode(event: Mapping[str, Any]) -> bytes:
    """The line of an event, with its newline; the checksum comes last, as the field `crc`.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(event, allow_nan=False, ensure_ascii=False).encode()
    return text[:-1] + b', "crc": "%08x"}\n' % zlib.crc32(text)


def decode(line: bytes) -> dict[str, Any]:
    """The event of a line without its newline. Lines of older journals have no checksum.

    Raises:
        ValueError: no event, or not the one that was written.
    """
    event = json.loads(line)
    if not isinstance(event, dict) or not event.keys() >= NEEDED:
        raise ValueError("not an event")
    if event.pop("crc", None) is not None:
        end = _END.search(line)
        if end is None or zlib.crc32(line[: end.start()] + b"}") != int(end[1], 16):
            raise ValueError("its checksum is another")
    return event
