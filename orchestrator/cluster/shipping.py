"""Luthier's packages as the working directory of a Ray job; data are never included."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from orchestrator.cluster.auth import ClusterError

PACKAGES = ("luthier", "orchestrator", "trainables", "search_spaces")
EXCLUDES = ("__pycache__", "*.pyc")
"""Patterns of Ray's `excludes` (.gitignore syntax). None for hidden files: to Ray `.*` matches the whole folder."""
LIMIT_BYTES = 100 * 2**20
"""Ray's job server refuses larger requests (HTTP 413)."""


class ShippingError(ClusterError):
    """The packages are too large to upload."""


def package_folders() -> list[Path]:
    """Folders of the packages that this process has imported."""
    folders = []
    for name in PACKAGES:
        file = importlib.import_module(name).__file__
        assert file is not None, name
        folders.append(Path(file).resolve().parent)
    return folders


def is_checkout() -> bool:
    """Whether Luthier runs from a source folder.

    A clone or an editable install, rather than site-packages.
    """
    return not {"site-packages", "dist-packages"} & set(package_folders()[0].parts)


def shipped_files(folder: Path) -> list[Path]:
    """Files of one package to upload, sorted: all but caches and hidden files."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and file.suffix != ".pyc"
        and not any(part == "__pycache__" or part.startswith(".") for part in file.relative_to(folder).parts)
    )


def check_size(files: Sequence[Path], limit_bytes: int = LIMIT_BYTES) -> int:
    """Total size in bytes, before compression.

    Raises:
        ShippingError: more than the limit; names the largest files.
    """
    sizes = {file: file.stat().st_size for file in files}
    total = sum(sizes.values())
    if total > limit_bytes:
        largest = sorted(sizes, key=lambda file: sizes[file], reverse=True)[:3]
        raise ShippingError(
            f"Luthier's packages must stay below {limit_bytes / 2**20:.0f} MiB to be sent to a cluster, but they hold "
            f"{total / 2**20:.0f} MiB. The largest files: "
            + ", ".join(f"{file} ({sizes[file] / 2**20:.0f} MiB)" for file in largest)
            + ". Move data and weights out of the packages; studies name them by path."
        )
    return total


def copy_packages(into: Path, limit_bytes: int = LIMIT_BYTES) -> int:
    """Copy the packages into one folder; returns their size in bytes (see `check_size`)."""
    folders = package_folders()
    total = check_size([file for folder in folders for file in shipped_files(folder)], limit_bytes)
    for folder in folders:
        for file in shipped_files(folder):
            target = into / folder.name / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return total
