"""Image folders: `root/<domain>/<class>/*`, `root/train|val|test/<class>/*` (with `root/ood/<domain>/<class>/*`), or
`root/<class>/*`."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.ingest.errors import DataError
from orchestrator.ingest.images import SUFFIXES, decode
from orchestrator.ingest.samples import Listing, Sample

SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
SINGLE = "id"
"""Name of the domain where a folder has none."""


def list_folder(root: Path) -> Listing:
    """What lies below `root`, without opening an image.

    Raises:
        DataError: no folder, no image, or a layout that is none of the three.
    """
    if not root.is_dir():
        near = sorted(p.name for p in root.parent.iterdir() if p.is_dir())[:5] if root.parent.is_dir() else []
        hint = f" Beside it there are: {', '.join(near)}." if near else ""
        raise DataError(f"data.root must be a folder with images, but {root} is not there.{hint}")
    skipped: Counter[str] = Counter()
    files = sorted(_images(root, skipped))
    if not files:
        raise DataError(f"data.root must hold images ({', '.join(SUFFIXES)}), but none is below {root}.")
    top = {path.parts[0] for path in files}
    depths = {len(path.parts) for path in files}
    if top <= {*SPLITS, "ood"} and top & {"train"}:
        layout, samples = "train/val/test folders: root/<split>/<class>/*", _split_layout(root, files)
    elif min(depths) >= 3:
        layout, samples = "domains: root/<domain>/<class>/*", _domain_layout(root, files)
    elif depths == {2}:
        layout, samples = "one domain: root/<class>/*", [_sample(root, p, p.parts[0], SINGLE) for p in files]
    else:
        raise DataError(
            f"Images lie in root/<domain>/<class>/, root/train|val|test/<class>/ or root/<class>/, but below {root} "
            f"they lie {' and '.join(str(d - 1) for d in sorted(depths))} folders deep, such as {files[0]}."
        )
    return Listing(samples, layout, _fingerprint(root, files), dict(skipped), _empty_folders(root))


def _images(root: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Image files below `root`, relative to it; each directory once, however many links lead to it."""
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            skipped["folder seen before (link)"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            if name.startswith("."):
                skipped["hidden file"] += 1
            elif path.suffix.lower() not in SUFFIXES:
                skipped[f"not an image: {path.suffix.lower() or 'no suffix'}"] += 1
            elif not path.is_file():
                skipped["not a regular file (broken link, pipe)"] += 1
            else:
                yield path.relative_to(root)


def _split_layout(root: Path, files: list[Path]) -> list[Sample]:
    found = []
    for path in files:
        if path.parts[0] == "ood":
            if len(path.parts) < 4:
                raise DataError(f"OOD images lie in root/ood/<domain>/<class>/, but got {path}.")
            found.append(_sample(root, path, "/".join(path.parts[2:-1]), path.parts[1]))
        elif len(path.parts) < 3:
            raise DataError(f"Images of a split lie in root/<split>/<class>/, but got {path}.")
        else:
            found.append(_sample(root, path, "/".join(path.parts[1:-1]), SINGLE, SPLITS[path.parts[0]]))
    return found


def _domain_layout(root: Path, files: list[Path]) -> list[Sample]:
    return [_sample(root, path, "/".join(path.parts[1:-1]), path.parts[0]) for path in files]


def _sample(root: Path, path: Path, label: str, domain: str, split: str | None = None) -> Sample:
    return Sample(str(path), label, domain, partial(_decode, root / path), split)


def _decode(path: Path, side: int, interpolation: str) -> NDArray[np.uint8]:
    return decode(path, side, interpolation)


def _fingerprint(root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        status = (root / path).stat()
        digest.update(f"{os.fsencode(path)!r} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _empty_folders(root: Path) -> list[str]:
    return sorted(
        str(folder.relative_to(root))
        for folder in (Path(f) for f, _, _ in os.walk(root))
        if folder != root and not folder.name.startswith(".") and not any(folder.iterdir())
    )
