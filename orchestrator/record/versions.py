"""Versions of everything whose change could change a number: Python, packages, and Luthier's own code."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import sys
from importlib import metadata, resources

PACKAGES = ("luthier", "ray", "torch", "timm", "optuna", "mlflow", "pyarrow", "numpy", "scikit-learn")
CODE = ("trainables", "search_spaces")
"""Packages that decide what a trial computes."""


def versions() -> dict[str, str]:
    """Name → version. `code` is a digest of the packages `CODE`, which a version number in development is not."""
    found = {"python": platform.python_version(), "platform": sys.platform, "code": code_digest()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@functools.cache
def code_digest() -> str:
    """Twelve hex digits over the Python files of `CODE`, names included."""
    digest = hashlib.sha256()
    for package in CODE:
        root = resources.files(package)
        with resources.as_file(root) as folder:
            for file in sorted(folder.rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
