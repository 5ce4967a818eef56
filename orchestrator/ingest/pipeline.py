"""`ingest`: from a source of images to its Arrow store, once. Every later call finds the store that is there.

That a store still is what was written: its digest is compared before a run, and not only its size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from orchestrator.ingest.assign import Assignment, assign
from orchestrator.ingest.decoding import DecodingProgress, Job, decode_all
from orchestrator.ingest.digits import recipe_digest
from orchestrator.ingest.errors import DataError, counted, few
from orchestrator.ingest.manifest import DESCRIPTION, describe, in_words, quarantine_list
from orchestrator.ingest.request import IngestRequest, open_source
from orchestrator.ingest.source import Outcome, Source
from orchestrator.ingest.writer import Rows, copy_rows, finish, lay_out
from trainables.data.store import DATA, FORMAT, MANIFEST, Store
from trainables.storage.atomic_files import atomic_folder, write_text
from trainables.storage.compute_once import cache_root

log = logging.getLogger("luthier")

SMALL = 2**30
"""Bytes that are compared before every run: a second or two. What is larger is compared once on each machine for each
state of the file (size and time of modification): a disk that changes bits later is then found by
`luthier check` alone."""


def check_intact(store: Store) -> None:
    """Compare the store's SHA-256 with the manifest's, unless it is large and was compared before.

    Raises:
        StoreError: the file has changed since it was written; the message says what to do.
    """
    note, state = _note(store), _state(store)
    if store.manifest["bytes"] > SMALL:
        if note.exists() and note.read_text(encoding="utf-8") == state:
            return
        log.info("Comparing the digest of %s (%.1f GiB), once", store.path, store.manifest["bytes"] / 2**30)
    store.verify()
    remember_intact(store)


def remember_intact(store: Store) -> None:
    """Take note of a large store whose digest is known to be right, such as one that was just written."""
    if store.manifest["bytes"] > SMALL:
        note = _note(store)
        note.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, _state(store))


def _note(store: Store) -> Path:
    return cache_root() / "intact" / f"{hashlib.sha256(str(store.path).encode()).hexdigest()[:24]}.json"


def _state(store: Store) -> str:
    stat = (store.path / DATA).stat()
    return json.dumps([str(store.path), stat.st_size, stat.st_mtime_ns, store.digest])


__all__ = ["IngestRequest", "ingest", "survey"]

log = logging.getLogger("luthier")


def survey(request: IngestRequest) -> tuple[Source, Assignment]:
    """List a source, check that a study could use it and decide who goes where; no image is opened.

    Raises:
        DataError: see `ingest`, but for what only decoding shows.
    """
    source = open_source(request)
    return source, assign(source, request)


def ingest(
    request: IngestRequest, into: Path, workers: int | None = None, progress: DecodingProgress | None = None
) -> Store:
    """Read a source once and write its store below `into`, or find the one that is there.

    A store is found again by names, sizes and modification times of the source's files and by the request. Whoever
    comes second waits for the first (file lock); a store appears complete or not at all.

    Args:
        request: what to read.
        into: folder of the stores; made if it is missing.
        workers: decoder processes; None = one per CPU.
        progress: called from several threads with (images done, images in all, unreadable ones).

    Raises:
        StoreError: the store that is there is damaged.
        DataError: the source is missing or unusable, `into` cannot be written or is too small; with
            `on_bad="fail"`, an image is unreadable; with `on_leak="fail"`, an image is in training and in what is
            measured.
    """
    source = None if request.source == "digits" else open_source(request)
    digest = (
        recipe_digest() if source is None else source.digest
    )  # a built-in source need not be made to be found again
    place = into.absolute() / f"{request.source}-{_key(digest, request)}"
    fresh = False
    if not _complete(place):
        source = source or open_source(request)
        assignment = assign(source, request)
        _make_room(place.parent, len(assignment.used) * _row_bytes(request))
        with FileLock(f"{place}.lock"):
            if not _complete(place):
                _build(source, request, assignment, place, workers, progress)
                remember_intact(Store(place))
                fresh = True
    store = Store(place)
    if not fresh:
        check_intact(store)
    if request.on_bad == "fail" and store.manifest["quarantine"]:
        raise _refused(store.manifest["quarantine"], request)
    if request.on_leak == "fail" and store.manifest["duplicates"]["leaks"]:
        raise _leaking(store)
    _warn(store.manifest)
    return store


def _key(digest: str, request: IngestRequest) -> str:
    """Sixteen hex digits. Where the source lies does not matter, nor what is to happen to bad or leaked images."""
    fields = dataclasses.asdict(request)
    del fields["root"], fields["on_bad"], fields["on_leak"]
    return hashlib.sha256(json.dumps([FORMAT, DESCRIPTION, digest, fields], sort_keys=True).encode()).hexdigest()[:16]


def _complete(place: Path) -> bool:
    """Whether a store lies there; a damaged one is an error of the store's own, never silently replaced."""
    return (place / MANIFEST).exists() and bool(Store(place).manifest)


def _make_room(folder: Path, size: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError, PermissionError, OSError) as error:
        raise DataError(
            f"The data store needs a folder that can be written, but {folder} cannot: {error.strerror}. "
            "Set storage to another path."
        ) from error
    free = shutil.disk_usage(folder).free
    if free < size * 1.05:
        raise DataError(
            f"The data store needs {size / 2**30:.2f} GiB, but {folder} has {free / 2**30:.2f} GiB free. Free some "
            "space, set storage to another disk, or use a smaller image_size."
        )


def _row_bytes(request: IngestRequest) -> int:
    return request.image_size**2 * 3


def _build(
    source: Source,
    request: IngestRequest,
    assignment: Assignment,
    place: Path,
    workers: int | None,
    progress: DecodingProgress | None,
) -> None:
    for left in place.parent.glob(f".{place.name}-*"):  # of an ingest that was killed; nobody else holds the lock
        shutil.rmtree(left)
    started = time.perf_counter()
    with atomic_folder(place) as folder:
        offsets = _lay_out(folder / DATA, source, request, assignment)
        job = Job(request.image_size, request.interpolation, folder / DATA, offsets)
        outcomes = decode_all(source, assignment.used.tolist(), job, workers, progress)
        bad = [position for position, outcome in outcomes.items() if outcome.reason is not None]
        if bad:
            assignment = _without(source, request, outcomes, bad, folder, offsets)
        seconds = time.perf_counter() - started
        manifest = describe(source, request, assignment, outcomes, folder, seconds)
        finish(folder, manifest)
    _report(manifest, place)


def _lay_out(path: Path, source: Source, request: IngestRequest, assignment: Assignment) -> Any:
    """Write the blank file; returns the byte offset of each sample of the source (-1 = not used)."""
    rows = {
        split: Rows(assignment.labels[p], assignment.domain_ids[p], [source.samples[i].name for i in p])
        for split, p in assignment.splits.items()
    }
    notes = {"format": FORMAT, "classes": assignment.classes, "domains": assignment.domains, "splits": list(rows)}
    first = lay_out(path, request.image_size, rows, {**notes, "image_size": request.image_size})
    offsets = np.full(len(source.samples), -1, dtype=np.int64)
    for split, positions in assignment.splits.items():
        offsets[positions] = first[split] + np.arange(len(positions)) * _row_bytes(request)
    return offsets


def _without(
    source: Source, request: IngestRequest, outcomes: Mapping[int, Outcome], bad: list[int], folder: Path, offsets: Any
) -> Assignment:
    """Splits without the quarantined samples, and the file written anew for them."""
    quarantine = quarantine_list(source, outcomes)
    if request.on_bad == "fail" or len(bad) == len(outcomes):
        raise _refused(quarantine, request)
    try:
        assignment = assign(source, request, bad)
    except DataError as error:
        raise DataError(f"{error} Unreadable: {_listed(quarantine)}.") from error
    old = folder / "with-bad.arrow"
    os.replace(folder / DATA, old)
    moved = _lay_out(folder / DATA, source, request, assignment)
    used = assignment.used
    copy_rows(old, folder / DATA, offsets[used], moved[used], _row_bytes(request))
    old.unlink()
    return assignment


def _refused(quarantine: list[dict[str, str]], request: IngestRequest) -> DataError:
    return DataError(
        f"All images must be readable, but {counted(len(quarantine), 'image')} cannot be read: {_listed(quarantine)}. "
        f"Replace or remove what `luthier data check {request.root}` lists."
    )


def _listed(quarantine: list[dict[str, str]]) -> str:
    return few([f"{entry['name']} ({entry['reason']})" for entry in quarantine])


def _report(manifest: Mapping[str, Any], place: Path) -> None:
    log.info("%d images (%.0f/s) → %s", sum(manifest["counts"].values()), manifest["images_per_second"], place)


def _leaking(store: Store) -> DataError:
    found = store.manifest["duplicates"]
    count = found["leaks_groups"]
    return DataError(
        f"No image may be in more than one of training, validation and what is measured (data.on_leak: fail), but "
        f"{counted(count, 'image')} {'is' if count == 1 else 'are'}: {few(map(in_words, found['leaks']))}. Remove the "
        f"copies ({store.path / MANIFEST} lists them all), or allow them with data.on_leak: report."
    )


def _warn(manifest: Mapping[str, Any]) -> None:
    """What a person should know before every run, and not only the one that reads the data."""
    if manifest["quarantine"]:
        count = counted(len(manifest["quarantine"]), "unreadable image")
        log.warning("%s left out: %s", count, _listed(manifest["quarantine"]))
    classes = len(manifest["classes"])
    lacking = [
        f"{split} has {len(c)} of {classes}" for split, c in manifest["class_counts"].items() if len(c) < classes
    ]
    if lacking:
        log.warning("Numbers are over the classes that have images, which are not all everywhere: %s", few(lacking))
    found = manifest["duplicates"]
    if found["leaks"]:
        log.warning(
            "%s in more than one of training, validation and what is measured, which flatters the numbers: %s. "
            "data.on_leak: fail refuses such data.",
            counted(found["leaks_groups"], "image"), few(map(in_words, found["leaks"])),
        )  # fmt: skip
    if found["contradictory"]:
        count = counted(found["contradictory_groups"], "image")
        log.warning("%s in more than one class: %s", count, few(map(in_words, found["contradictory"])))
