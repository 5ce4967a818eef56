"""Where a machine keeps what is computed once for all studies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

Kept = TypeVar("Kept")


def cache_root(root: str | Path | None = None) -> Path:
    """The folder for features and demo networks: `root`, `$LUTHIER_CACHE`, or `~/.cache/luthier`."""
    return Path(root or os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier")


def compute_once(
    file: Path, load: Callable[[Path], Kept | None], make: Callable[[], Kept], save: Callable[[Kept, Path], None]
) -> Kept:
    """What a file keeps, made by the first of all processes that ask for it; its folder is made.

    Args:
        load: reads the file; None = there is none, or none that can be read.
        make: computes it anew.
        save: writes the file.
    """
    found = load(file)
    if found is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            found = load(file)
            if found is None:
                found = make()
                save(found, file)
    return found
