"""Where a machine keeps what is computed once for all studies."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root(root: str | Path | None = None) -> Path:
    """The folder for features and demo networks: `root`, `$LUTHIER_CACHE`, or `~/.cache/luthier`."""
    return Path(root or os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier")
