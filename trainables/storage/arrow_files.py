"""Checks of an Arrow IPC file before pyarrow parses its schema. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

_MAGIC = b"ARROW1"
"""An Arrow file ends with its footer, the footer's length (4 bytes, little-endian) and this."""


def footer_problem(path: Path) -> str | None:
    """Why an Arrow file's footer is not one of plain columns.

    None if it is one. Parsing a type that a library has registered, as ray does in every trial, may run code from the
    file. The raw footer is therefore searched for extension types before Arrow parses the schema.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(_MAGIC) - 4))
        tail = file.read()
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != _MAGIC or length > size:
            return "does not end like one"
        file.seek(max(0, size - len(_MAGIC) - 4 - length))
        if b"ARROW:extension:name" in file.read(length):
            return "has an extension type, which could run code when it is read"
    return None
