"""Digest and size of a file, read from the disk or taken while it is written."""

from __future__ import annotations

import io
from pathlib import Path

from trainables.storage.file_identity import FileIdentity, HashedFile

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""SHA-256 of "abc" (FIPS 180-4)."""


def test_of_a_file_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert FileIdentity.of(tmp_path / "x") == FileIdentity(ABC, 3)


def test_of_what_is_written_in_parts() -> None:
    file = io.BytesIO()
    hashed = HashedFile(file)
    assert [hashed.write(b"ab"), hashed.tell(), hashed.write(b"c"), hashed.tell()] == [2, 2, 1, 3]
    assert (hashed.identity, file.getvalue()) == (FileIdentity(ABC, 3), b"abc")
    hashed.close()
    assert hashed.closed
