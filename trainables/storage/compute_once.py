"""Results that are computed once per machine and read from disk afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

Result = TypeVar("Result")


def cache_root(root: str | Path | None = None) -> Path:
    """The folder for features and demo networks: `root`, else `$LUTHIER_CACHE`, else `~/.cache/luthier`.

    Example:
        >>> str(cache_root("/scratch/luthier"))
        '/scratch/luthier'
    """
    return Path(root or os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier")


def compute_once(
    path: Path,
    load: Callable[[Path], Result | None],
    compute: Callable[[], Result],
    save: Callable[[Result, Path], None] | None = None,
) -> Result:
    """Load a result, or compute and save it under a file lock.

    Concurrent processes compute it once.

    Args:
        path: where the result is stored; its parent folder is created, the lock is `<path>.lock`.
        load: reads the result; None = absent or unreadable.
        compute: computes it.
        save: writes it, atomically; None = `compute` has written it.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> def load(path): return json.loads(path.read_text()) if path.exists() else None
        >>> def save(value, path): path.write_text(json.dumps(value))
        >>> compute_once(folder / "answer.json", load, lambda: 6 * 7, save)
        42
        >>> compute_once(folder / "answer.json", load, lambda: 1 / 0, save)
        42
    """
    result = load(path)
    if result is not None:
        return result
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        result = load(path)  # another process may have saved it while this one waited for the lock
        if result is None:
            result = compute()
            if save is not None:
                save(result, path)
    return result
