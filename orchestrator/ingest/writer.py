"""Writing a data store.

An Arrow file is laid out with blank pixels (`orchestrator.ingest.layout`), then filled in place by the decoders. If
images turn out unreadable, or a drawn split would divide equal or nearly equal ones, the splits are assigned again and
the decoded rows are copied into a new layout.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.ingest.assign import Assignment, assign
from orchestrator.ingest.decoding import DecodeJob, DecodingProgress, decode_all
from orchestrator.ingest.errors import DataError, first_few
from orchestrator.ingest.layout import Layout, lay_out
from orchestrator.ingest.manifest import describe, quarantine_list
from orchestrator.ingest.near_equal import ImageGroups, group_images
from orchestrator.ingest.request import IngestRequest
from orchestrator.ingest.source import MaskSurvey, Outcome, Source
from orchestrator.ingest.worker import write_at
from orchestrator.wording import counted
from trainables.data.store import DATA, MANIFEST
from trainables.storage.atomic_files import atomic_folder

log = logging.getLogger("luthier")


def write_store(
    source: Source,
    assignment: Assignment,
    request: IngestRequest,
    folder: Path,
    workers: int | None = None,
    progress: DecodingProgress | None = None,
) -> None:
    """Decode all used samples into a new store; the folder appears when it is complete.

    Args:
        source: the scan.
        assignment: the split of each sample.
        request: image size, interpolation, treatment of unreadable images.
        folder: of the store; the caller holds its lock.
        workers: decoder processes; None = one per CPU.
        progress: called from several threads, see `DecodingProgress`.

    Raises:
        DataError: all images are unreadable, or some are and the request or the smaller splits do not allow it.
        OSError: the disk refused a write.
    """
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of an ingest that was killed
        shutil.rmtree(leftover)
    started = time.perf_counter()
    with atomic_folder(folder) as partial:
        layout = lay_out(partial / DATA, source, request, assignment)
        if source.survey is None:
            job = DecodeJob(request.image_size, request.interpolation, partial / DATA, layout.images, request.crop_size)
        else:
            job = _pairs_job(source.survey, partial / DATA, layout)
        outcomes = decode_all(source, assignment.used.tolist(), job, workers, progress)
        if source.survey is not None:
            unreadable = source.survey.unreadable.items()
            outcomes |= {i: Outcome(reason, b"", b"", 0, 0, "", ()) for i, reason in unreadable}
        # Near-equal images are looked for in any case: splits of the source's own may divide them, which is reported.
        groups = group_images(outcomes)
        final = _assign_decoded(source, request, outcomes, groups)
        if not final.has_rows_of(assignment):
            _move_rows(partial, source, request, final, layout)
        seconds = time.perf_counter() - started
        manifest = describe(source, request, final, outcomes, groups, partial, seconds)
        _write_manifest(partial, manifest)
    images = sum(manifest["counts"].values())
    log.info("%d images (%.0f/s) → %s", images, manifest["images_per_second"], folder)


def _pairs_job(survey: MaskSurvey, target: Path, layout: Layout) -> DecodeJob:
    """Whole pictures, and masks as class indices."""
    return DecodeJob(
        side=0,
        interpolation="nearest",
        target=target,
        offsets=layout.images,
        translation=survey.translation,
        mask_offsets=layout.masks,
        sizes=survey.sizes,
    )


def refuse_unreadable(quarantine: Sequence[Mapping[str, str]], request: IngestRequest) -> DataError:
    """The error for unreadable images that a request does not allow."""
    return DataError(
        f"All images must be readable, but {counted(len(quarantine), 'image')} cannot be read: "
        f"{describe_quarantined(quarantine)}. Replace or remove what `luthier data check {request.root}` lists."
    )


def describe_quarantined(quarantine: Sequence[Mapping[str, str]]) -> str:
    """The first quarantined images with their reasons, in a sentence."""
    return first_few([f"{entry['name']} ({entry['reason']})" for entry in quarantine])


def _assign_decoded(
    source: Source, request: IngestRequest, outcomes: Mapping[int, Outcome], groups: ImageGroups
) -> Assignment:
    """The assignment of what decoding has shown: unreadable samples are left out, copies lie in one split."""
    bad = [position for position, outcome in outcomes.items() if outcome.reason is not None]
    if not bad:
        return assign(source, request, groups=groups)
    quarantine = quarantine_list(source, outcomes)
    if request.on_bad == "fail" or len(bad) == len(outcomes):
        raise refuse_unreadable(quarantine, request)
    try:
        return assign(source, request, bad, groups)
    except DataError as error:
        raise DataError(f"{error} Unreadable: {describe_quarantined(quarantine)}.") from error


def _move_rows(
    folder: Path, source: Source, request: IngestRequest, assignment: Assignment, old_layout: Layout
) -> None:
    """Replace the data file by one for another assignment, with the pixels copied."""
    old = folder / "as-decoded.arrow"
    # Both files are complete at once: the move needs the disk space twice.
    os.replace(folder / DATA, old)
    new_layout = lay_out(folder / DATA, source, request, assignment)
    positions = assignment.used[np.argsort(new_layout.images[assignment.used])]  # written in ascending order
    with open(old, "rb") as readable, open(folder / DATA, "r+b") as writable:
        for i in positions.tolist():
            for (old_offset, size), (new_offset, _) in zip(old_layout.spans(i), new_layout.spans(i), strict=True):
                write_at(writable.fileno(), os.pread(readable.fileno(), size, old_offset), new_offset)
    old.unlink()


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, with size and SHA-256 of the data file.

    Last, since it marks the store as complete.
    """
    with open(folder / DATA, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
    text = json.dumps({**manifest, "bytes": size, "sha256": digest}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
