"""Ingest: scan a source, assign its samples, write the data store, verify it.

    scan(request)                     → Source       samples, domains and classes; no image is opened
    assign(source, request)           → Assignment   the split of each sample
    write_store(source, assignment …) → Store        decodes every image, once
    verify(store, request)                           digest, unreadable images, leaks

A store is written once and found again by its name, which is a hash of the source and the request.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from orchestrator.ingest.assign import Assignment, assign
from orchestrator.ingest.decoding import DecodingProgress
from orchestrator.ingest.errors import DataError, first_few
from orchestrator.ingest.layout import sample_bytes
from orchestrator.ingest.manifest import (
    MANIFEST_VERSION,
    UNGROUPED_VERSION,
    in_words,
    missing_classes,
    plain_request,
    together_in_words,
)
from orchestrator.ingest.mask_survey import survey_masks
from orchestrator.ingest.near_equal import MAX_GROUP
from orchestrator.ingest.request import IngestRequest, scan
from orchestrator.ingest.source import Source
from orchestrator.ingest.writer import describe_quarantined, refuse_unreadable, write_store
from orchestrator.wording import counted
from trainables.data.store import DATA, FORMAT, MANIFEST, Store
from trainables.specs.short_hash import short_hash
from trainables.storage.atomic_files import write_text
from trainables.storage.compute_once import cache_root

__all__ = ["IngestRequest", "existing_store", "ingest", "survey"]

log = logging.getLogger("luthier")

ALWAYS_VERIFIED_BYTES = 2**30
"""A store up to this size is hashed before every run, in a second or two. A larger one is hashed once per machine and
state of its file (size and modification time); bits that its disk flips later are detected by `luthier check` alone."""

SPACE_MARGIN = 1.05
"""Required free disk space, as a multiple of the size of the pixels."""


def survey(request: IngestRequest) -> tuple[Source, Assignment]:
    """Scan and assign without writing.

    What a plan shows of the data; no image is opened.

    Raises:
        DataError: see `ingest`, except for what only decoding shows.
    """
    source = scanned(request)
    return source, assign(source, request, unreadable_masks(source))


def scanned(request: IngestRequest, progress: DecodingProgress | None = None) -> Source:
    """The source of a request; of pictures with masks also what the masks hold.

    Raises:
        DataError: see `ingest`, except for what only decoding shows.
    """
    source = scan(request)
    return source if request.masks is None else survey_masks(source, request, progress)


def unreadable_masks(source: Source) -> Collection[int]:
    """Positions that are left out because their mask or their picture's header cannot be read."""
    return () if source.survey is None else source.survey.unreadable


def ingest(
    request: IngestRequest, into: Path, workers: int | None = None, progress: DecodingProgress | None = None
) -> Store:
    """The data store of a request: the existing one, verified, or a new one.

    A store is identified by names, sizes and modification times of the source's files and by the request. Concurrent
    processes write it once (file lock); it appears complete or not at all.

    Args:
        request: source, domains, splits, image size.
        into: folder of the stores; created if it is missing.
        workers: decoder processes; None = one per CPU.
        progress: called from several threads, see `DecodingProgress`.

    Raises:
        StoreError: the existing store is damaged.
        DataError: the source is missing or unusable, `into` cannot be written or is too small; with
            `on_bad="fail"`, an image is unreadable; with `on_leak="fail"`, an image is in training and in what is
            measured.
    """
    source = scanned(request)
    folder = into.absolute() / f"{request.source}-{_store_key(source, request)}"
    just_written = False
    if not _store_exists(folder):
        assignment = assign(source, request, unreadable_masks(source))
        way_out = "use a smaller image_size" if source.survey is None else "scale pictures and masks down beforehand"
        _check_space(folder.parent, int(sample_bytes(source, request)[assignment.used].sum()), way_out)
        # Beside the folder, not in it: a folder appears by a rename, complete or not at all.
        with FileLock(f"{folder}.lock"):
            if not _store_exists(folder):  # another process may have written it while this one waited for the lock
                write_store(source, assignment, request, folder, workers, progress)
                just_written = True
    store = Store(folder)
    verify(store, request, just_written)
    return store


def verify(store: Store, request: IngestRequest, just_written: bool = False) -> None:
    """Check a store's digest and the request's rules.

    The rules are those for unreadable and leaked images; warnings are logged.

    Args:
        store: the store of the request.
        request: its rules `on_bad` and `on_leak`.
        just_written: the digest was computed from the file by this process.

    Raises:
        StoreError: the file has changed since it was written.
        DataError: images that the request refuses.
    """
    if just_written:
        mark_verified(store)
    else:
        verify_digest(store)
    manifest = store.manifest
    if request.on_bad == "fail" and manifest["quarantine"]:
        raise refuse_unreadable(manifest["quarantine"], request)
    if request.on_leak == "fail" and manifest["duplicates"]["leaks"]:
        raise _refuse_leaks(store)
    _warn(manifest)


def _store_key(source: Source, request: IngestRequest) -> str:
    """Sixteen hex digits that name a store.

    The source's path does not matter, nor how unreadable and leaked images are treated.
    """
    fields = plain_request(request)
    for name in ("root", "on_bad", "on_leak"):
        del fields[name]
    if source.survey is not None:
        # Whole pictures: the size that a network sees changes nothing. A map counts by its meaning, wherever it stands.
        for name in ("image_size", "crop_size", "interpolation"):
            del fields[name]
        fields["masks"] = source.survey.translation.to_json()
    version = MANIFEST_VERSION
    if request.copies == "apart":
        # As earlier versions drew: their stores keep their names.
        del fields["copies"]
        version = UNGROUPED_VERSION
    if request.crop_size is None and source.survey is None:
        del fields["crop_size"]  # stores from before there was one keep their names
    return short_hash([FORMAT, version, source.digest, fields], digits=16)


def existing_store(request: IngestRequest, into: Path) -> Store | None:
    """The store of a request, if it was written before; not verified.

    Raises:
        StoreError: it is damaged.
        DataError: the source is missing or unusable.
    """
    folder = into.absolute() / f"{request.source}-{_store_key(scanned(request), request)}"
    return Store(folder) if _store_exists(folder) else None


def _store_exists(folder: Path) -> bool:
    """Whether the folder holds a store.

    Raises StoreError for a damaged one, which is never silently replaced.
    """
    return (folder / MANIFEST).exists() and bool(Store(folder).manifest)


def _check_space(folder: Path, size: int, way_out: str) -> None:
    """Create the folder of the stores; raise DataError unless `size` bytes fit into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # By trying: a network file system may refuse what the permission bits allow.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"The data store needs a folder that can be written, but {folder} cannot: {error.strerror}. "
            "Set storage to another path."
        ) from error
    free = shutil.disk_usage(folder).free
    if free < size * SPACE_MARGIN:
        raise DataError(
            f"The data store needs {size / 2**30:.2f} GiB, but {folder} has {free / 2**30:.2f} GiB free. Free some "
            f"space, set storage to another disk, or {way_out}."
        )


def verify_digest(store: Store) -> None:
    """Compare the store's SHA-256 with its manifest.

    Skipped for a large store that this machine has verified.

    Raises:
        StoreError: the file has changed since it was written; the message names the way out.
    """
    if store.manifest["bytes"] > ALWAYS_VERIFIED_BYTES:
        record = _verified_record(store)
        if record.exists() and record.read_text(encoding="utf-8") == _file_state(store):
            return
        log.info("Comparing the digest of %s (%.1f GiB), once", store.path, store.manifest["bytes"] / 2**30)
    store.verify()
    mark_verified(store)


def mark_verified(store: Store) -> None:
    """Record in this machine's cache that a large store's digest is right.

    For instance of a store that was just written.
    """
    if store.manifest["bytes"] > ALWAYS_VERIFIED_BYTES:
        record = _verified_record(store)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, _file_state(store))


def _verified_record(store: Store) -> Path:
    return cache_root() / "verified" / f"{short_hash(str(store.path), digits=24)}.json"


def _file_state(store: Store) -> str:
    stat = (store.path / DATA).stat()
    return json.dumps([str(store.path), stat.st_size, stat.st_mtime_ns, store.digest])


def _refuse_leaks(store: Store) -> DataError:
    duplicates = store.manifest["duplicates"]
    count = duplicates["leaks_groups"]
    return DataError(
        f"No image may be in more than one of training, validation and what is measured (data.on_leak: fail), but "
        f"{counted(count, 'image')} {'is' if count == 1 else 'are'}: {first_few(map(in_words, duplicates['leaks']))}. "
        f"Remove the copies ({store.path / MANIFEST} lists them all), or allow them with data.on_leak: report."
    )


def _warn(manifest: Mapping[str, Any]) -> None:
    """Log what affects the numbers of every run, also of those that find the store."""
    if manifest["quarantine"]:
        count = counted(len(manifest["quarantine"]), "unreadable image")
        log.warning("%s left out: %s", count, describe_quarantined(manifest["quarantine"]))
    for sentence in manifest.get("remarks", ()):
        log.info("%s", sentence)
    for sentence in manifest.get("warnings", ()):
        log.warning("%s", sentence)
    _warn_of_missing_classes(manifest)
    duplicates = manifest["duplicates"]
    if duplicates["leaks"]:
        log.warning(
            "%s in more than one of training, validation and what is measured, which flatters the numbers: %s. "
            "data.on_leak: fail refuses such data.",
            counted(duplicates["leaks_groups"], "image"),
            first_few(map(in_words, duplicates["leaks"])),
        )
    near_leaks = duplicates.get("near_leaks")  # stores of earlier versions were not searched for them
    if near_leaks:
        log.warning(
            "%s of nearly equal images in more than one of training, validation and what is measured, which may "
            "flatter the numbers: %s. Where they are one picture, remove the copies; data.on_leak: fail does not "
            "refuse them, because a threshold decides.",
            counted(duplicates["near_leaks_groups"], "group"),
            first_few(map(in_words, near_leaks)),
        )
    if duplicates.get("crowded"):
        log.warning(
            "%s resemble more than %d others, as the frames of a fixed camera do, and were drawn one by one. If they "
            "belong together, give the splits yourself, as folders train, val and test.",
            counted(duplicates["crowded"], "image"),
            MAX_GROUP,
        )
    kept = manifest.get("kept_together")
    if kept and kept["groups"]:
        log.info("%s", together_in_words(kept))
    if duplicates["contradictory"]:
        count = counted(duplicates["contradictory_groups"], "image")
        how = "with different masks" if manifest.get("targets") == "masks" else "in more than one class"
        log.warning("%s %s: %s", count, how, first_few(map(in_words, duplicates["contradictory"])))


def _warn_of_missing_classes(manifest: Mapping[str, Any]) -> None:
    classes = manifest["classes"]
    if manifest.get("targets") == "masks":
        for sentence in missing_classes(classes, manifest["pixels"]):
            log.warning("%s", sentence)
        return
    incomplete = [
        f"{split} has {len(counts)} of {len(classes)}"
        for split, counts in manifest["class_counts"].items()
        if len(counts) < len(classes)
    ]
    if incomplete:
        log.warning(
            "Numbers are over the classes that have images, which are not all everywhere: %s", first_few(incomplete)
        )
