"""Manifests: a CSV file or JSON lines with the path of a picture in each row, and its class or the path of its mask.

Columns `image` (or `picture`, `file`, `path`), `label` or `mask`, and optional columns `domain` and `split`. Relative
paths count from the manifest's folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import did_you_mean
from orchestrator.ingest.errors import SOURCE_HINT, DataError, first_few, printable
from orchestrator.ingest.folder import FolderSource
from orchestrator.ingest.label_map import LABEL_FILES, MaskRequest, read_label_file
from orchestrator.ingest.source import DEFAULT_DOMAIN, SPLIT_NAMES, Sample
from orchestrator.wording import counted

SUFFIXES = frozenset({".csv", ".jsonl"})
"""Endings of manifests, by which a file is recognised as one."""
IMAGE_COLUMNS = ("image", "picture", "file", "path", "filename", "file_name")
LABEL_COLUMNS = ("label", "class", "target", "category")
MASK_COLUMNS = ("mask", "segmentation", "annotation", "label", "target")
DOMAIN_COLUMNS = ("domain", "environment", "env")
SPLIT_COLUMN = "split"
MAX_BYTES = 2**30
"""Maximum size of a manifest."""


def scan_manifest(file: Path, label: str | None = None, masks: MaskRequest | None = None) -> FolderSource:
    """List the rows of a manifest; no picture is opened.

    Args:
        file: `.csv` or `.jsonl`.
        label: the column with the classes; None = the first of `LABEL_COLUMNS` that the manifest has.
        masks: the rows are pictures with masks.

    Raises:
        DataError: not a manifest, missing columns, cells or files, a picture twice.
    """
    rows = _rows(file)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    image = _column(file, columns, None, IMAGE_COLUMNS, "picture", "")
    if masks is None:
        _refuse_masks(file, columns, label)
        target = _column(file, columns, label, LABEL_COLUMNS, "class", "data.label (in commands: --label)")
    else:
        target = _column(file, columns, masks.column, MASK_COLUMNS, "mask", "data.mask (in commands: --mask)")
    _check_cells(file, rows, (image, target))
    domain = next((name for name in DOMAIN_COLUMNS if name in columns), None)
    root = file.absolute().parent
    digest = hashlib.sha256()
    missing: list[str] = []
    samples: list[Sample] = []
    for row in rows:
        split = _split(file, row[SPLIT_COLUMN]) if row.get(SPLIT_COLUMN) else None
        domain_name = printable(row[domain]) if domain is not None and row.get(domain) else DEFAULT_DOMAIN
        paths = [row[image]] if masks is None else [row[image], row[target]]
        for path in paths:
            try:
                status = os.stat(root / path)
            except OSError:
                missing.append(path)
                continue
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        class_name = printable(row[target]) if masks is None else ""
        digest.update(f"{class_name}\0{domain_name}\0{split}\n".encode("utf-8", "surrogateescape"))
        mask = None if masks is None else row[target]
        samples.append(Sample(printable(row[image]), class_name, domain_name, split, row[image], mask))
    if missing:
        raise DataError(
            f"Every path in a manifest must lead to a file, but {counted(len(missing), 'path')} of "
            f"{printable(file.name)} {'does' if len(missing) == 1 else 'do'} not: "
            f"{first_few(map(printable, missing))}. Relative paths count from {printable(str(root))}."
        )
    label_file = next((root / name for name in LABEL_FILES if masks is not None and (root / name).is_file()), None)
    if label_file is not None:
        digest.update(label_file.read_bytes())
    return FolderSource(
        kind="manifest",
        layout=f"manifest {printable(file.name)}, columns {image} and {target}",
        samples=samples,
        digest=digest.hexdigest(),
        label_map=None if label_file is None else read_label_file(label_file, label_file.name),
        root=root,
    )


def has_masks(file: Path) -> bool:
    """Whether a manifest has a mask column by its name, and no classes."""
    rows = _rows(file)
    columns = {name for row in rows for name in row}
    return "mask" in columns and not columns & {*LABEL_COLUMNS}


def _rows(file: Path) -> list[dict[str, str]]:
    """The cells of every row by column, as text; empty cells are left out."""
    if not file.is_file() or file.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"A manifest is a file that ends in {' or '.join(sorted(SUFFIXES))}, but {printable(str(file))} is none. "
            f"{SOURCE_HINT}"
        )
    if file.stat().st_size > MAX_BYTES:
        raise DataError(f"A manifest may have {MAX_BYTES // 2**20} MiB, but {printable(file.name)} is larger.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".csv":
            rows = [dict(row) for row in csv.DictReader(io.StringIO(text))]
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"The manifest {printable(file.name)} cannot be read: {error}.") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"A manifest needs rows of named columns, but {printable(file.name)} has {'others' if rows else 'none'}."
        )
    # Beyond the named columns `csv` has a list under None.
    return [{str(key).strip(): str(value).strip() for key, value in row.items() if key and value not in (None, "")}
            for row in rows]  # fmt: skip


def _column(file: Path, columns: Sequence[str], given: str | None, usual: Sequence[str], what: str, key: str) -> str:
    if given is not None:
        if given in columns:
            return given
        raise DataError(
            f"The {what} column is {given!r} ({key}), but {printable(file.name)} has "
            f"{first_few(map(printable, columns), 20)}.{did_you_mean(given, columns)}"
        )
    for name in usual:
        if name in columns:
            return name
    way_out = f" Name yours in {key}." if key else ""
    raise DataError(
        f"A manifest needs a {what} column, called {' or '.join(usual)}, but {printable(file.name)} has "
        f"{first_few(map(printable, columns), 20)}.{way_out}"
    )


def _refuse_masks(file: Path, columns: Sequence[str], label: str | None) -> None:
    if label is None and "mask" in columns and not {*columns} & {*LABEL_COLUMNS}:
        raise DataError(
            f"A manifest of a classification has a label column, but {printable(file.name)} has pictures with masks "
            "(column mask). Set task: segmentation in the study file."
        )


def _check_cells(file: Path, rows: Sequence[dict[str, str]], columns: Sequence[str]) -> None:
    """Raise DataError for empty cells, and for a picture that has several rows."""
    for column in columns:
        empty = [str(number) for number, row in enumerate(rows, 1) if column not in row]
        if empty:
            raise DataError(
                f"Every row of a manifest needs a value in the column {column!r}, but in {printable(file.name)} "
                f"{counted(len(empty), 'row')} {'has' if len(empty) == 1 else 'have'} none: row {first_few(empty)}."
            )
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        other = first.setdefault(row[columns[0]], number)
        if other != number:
            raise DataError(
                f"A picture has one row in a manifest, but {printable(row[columns[0]])} stands in rows {other} and "
                f"{number} of {printable(file.name)}. Remove one of them."
            )


def _split(file: Path, text: str) -> str:
    if text.casefold() not in SPLIT_NAMES:
        raise DataError(
            f"The column 'split' must hold {', '.join(SPLIT_NAMES)}, but in {printable(file.name)} it also holds "
            f"{printable(text)}."
        )
    return SPLIT_NAMES[text.casefold()]
