"""Identity of a stored file: SHA-256 and size. Standard library only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class FileIdentity:
    """SHA-256 and size of a file, for manifests and the study's record."""

    sha256: str
    """In hex."""
    bytes: int

    @classmethod
    def of(cls, path: Path) -> FileIdentity:
        """Identity of a file on the disk.

        Raises:
            OSError: the file cannot be read.
        """
        return cls(file_digest(path), path.stat().st_size)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashedFile:
    """Binary file, open for writing, whose identity is computed from what is written.

    It needs no second reading. For libraries that write to a Python file from its beginning to its end.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0

    @property
    def identity(self) -> FileIdentity:
        """Of what was written so far."""
        return FileIdentity(self._digest.hexdigest(), self._size)

    @property
    def closed(self) -> bool:
        """Whether the file is closed."""
        return self._file.closed

    def write(self, content: bytes) -> int:
        """Append bytes."""
        self._digest.update(content)
        self._size += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        """Position, in bytes."""
        return self._size

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
