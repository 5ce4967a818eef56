"""From a source to the Arrow store: list, decide on splits, decode once in parallel, publish."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from orchestrator.ingest.errors import DataError
from orchestrator.ingest.images import BadImageError
from orchestrator.ingest.samples import Listing, Sample
from trainables.data.splits import SplitError, nested_order, stratified_split
from trainables.data.store import MANIFEST, Store, write_store


@dataclass(frozen=True)
class IngestRequest:
    """What to read and how to lay it out."""

    source: Literal["folder", "parquet", "npz", "digits"]
    root: str | None = None
    id: tuple[str, ...] = ()
    """ID domains; empty = all that are not in `ood`."""
    ood: tuple[str, ...] = ()
    """Domains that are only evaluated; for digits empty = all but the handwritten ones."""
    image_size: int = 224
    """Side of the stored squares, in pixels."""
    interpolation: str = "bicubic"
    val_fraction: float = 0.15
    test_fraction: float = 0.15
    seed: int = 0


def ingest(request: IngestRequest, into: Path) -> Store:
    """The store of a request below the folder `into`: the one that is there already, or a new one.

    Raises:
        DataError: the source is missing or cannot be used as asked.
    """
    listing = list_source(request.source, request.root)
    domains = _resolve_domains(request, listing)
    key = hashlib.sha256(
        json.dumps([dataclasses.asdict(request), listing.fingerprint, 1], sort_keys=True).encode()
    ).hexdigest()[:16]
    folder = into / f"{request.source}-{key}"
    if not (folder / MANIFEST).is_file():
        into.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / MANIFEST).is_file():
                _build(request, listing, domains, folder)
    return Store(folder)


def list_source(source: str, root: str | None) -> Listing:
    """What a source offers, without decoding an image (errors: see `ingest`)."""
    if source == "digits":
        from orchestrator.ingest.digits import list_digits

        return list_digits()
    from orchestrator.ingest.folder import list_folder
    from orchestrator.ingest.npz import list_npz
    from orchestrator.ingest.parquet import list_parquet

    if root is None:
        raise DataError(f"The source {source!r} needs data.root: the path of your images.")
    listers = {"folder": list_folder, "parquet": list_parquet, "npz": list_npz}
    return listers[source](Path(root))


def survey(request: IngestRequest) -> Listing:
    """What a request would read, without decoding an image: missing or empty domains and classes that are never ID
    are found out at once (errors: see `ingest`)."""
    listing = list_source(request.source, request.root)
    ids, ood = _resolve_domains(request, listing)
    _classes([sample for sample in listing.samples if sample.domain in {*ids, *ood}], ids)
    return listing


def _resolve_domains(request: IngestRequest, listing: Listing) -> tuple[list[str], list[str]]:
    """ID and OOD domains, each with at least one image."""
    present = sorted({sample.domain for sample in listing.samples})
    ood = list(request.ood)
    if request.source == "digits" and not ood:
        ood = [d for d in present if d != "handwritten"]
    for domain in (*request.id, *ood):
        if domain not in present:
            empty = any(Path(f).parts[:1] == (domain,) for f in listing.empty)
            what = "is empty" if empty else "is not there"
            raise DataError(
                f"Every domain of the study needs images, but the domain {domain!r} {what}. "
                f"The source has: {', '.join(present)}."
            )
    ids = list(request.id) or [d for d in present if d not in ood]
    if not ids:
        raise DataError(f"A study needs an ID domain to train on, but data.ood lists all of them: {', '.join(ood)}.")
    return ids, ood


def _build(request: IngestRequest, listing: Listing, domains: tuple[list[str], list[str]], folder: Path) -> None:
    ids, ood = domains
    started = time.perf_counter()
    samples = [s for s in listing.samples if s.domain in {*ids, *ood}]
    classes = _classes(samples, ids)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        pixels, good, bad = _decode_all(samples, request, temporary / "pixels.tmp")
        seconds = time.perf_counter() - started
        kept = [samples[i] for i in good]
        positions = _splits(kept, classes, ids, ood, request)
        names = [*ids, *(d for d in ood if d not in ids)]
        labels = np.array([classes.index(s.label) for s in kept], dtype=np.int64)
        domain_ids = np.array([names.index(s.domain) for s in kept], dtype=np.int64)
        # Rows in the order of the store: a second mapped file, so that no split has to fit into memory.
        parts = {}
        for i, (split, rows) in enumerate(positions.items()):
            block = np.memmap(temporary / f"split-{i}.tmp", np.uint8, "w+", shape=(len(rows), *pixels.shape[1:]))
            for start in range(0, len(rows), 1024):
                block[start : start + 1024] = pixels[np.asarray(good)[rows[start : start + 1024]]]
            parts[split] = (block, labels[rows], domain_ids[rows])
        notes = _notes(request, listing, kept, bad, seconds, parts["train"][0])
        write_store(temporary, parts, classes, names, notes)
        del pixels, parts
        for file in temporary.glob("*.tmp"):
            file.unlink()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _classes(samples: Sequence[Sample], ids: Sequence[str]) -> list[str]:
    inside = {s.label for s in samples if s.domain in ids}
    only_ood = sorted({s.label for s in samples} - inside)
    if only_ood:
        where = sorted({s.domain for s in samples if s.label in only_ood})
        raise DataError(
            f"Every class needs ID images to be learnt from, but {', '.join(map(repr, only_ood[:5]))} "
            f"{'occurs' if len(only_ood) == 1 else 'occur'} only in the OOD domain{'s' if len(where) > 1 else ''} "
            f"{', '.join(where)}. Remove these images there, or add some to {', '.join(ids)}."
        )
    if len(inside) < 2:
        raise DataError(
            f"Classification needs at least 2 classes, but the ID domains have {len(inside)}: "
            f"{', '.join(sorted(inside)) or 'none'}."
        )
    return sorted(inside)


def _decode_all(
    samples: Sequence[Sample], request: IngestRequest, file: Path
) -> tuple[NDArray[np.uint8], list[int], list[tuple[str, str]]]:
    """Pixels of all samples in a mapped file, the positions that could be read, and (name, reason) of the others."""
    side = request.image_size
    pixels = np.memmap(file, np.uint8, "w+", shape=(len(samples), side, side, 3))

    def read(position: int) -> str | None:
        try:
            pixels[position] = samples[position].decode(side, request.interpolation)
        except BadImageError as error:
            return str(error)
        return None

    # Threads: Pillow releases the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(pool.map(read, range(len(samples)), chunksize=16))
    good = [i for i, reason in enumerate(reasons) if reason is None]
    bad = [(samples[i].name, reason) for i, reason in enumerate(reasons) if reason is not None]
    if not good:
        raise DataError(f"None of the {len(samples)} images could be read; the first: {bad[0][0]}: {bad[0][1]}.")
    return pixels, good, bad


def _splits(
    kept: Sequence[Sample], classes: list[str], ids: Sequence[str], ood: Sequence[str], request: IngestRequest
) -> dict[str, NDArray[np.int64]]:
    """Positions in `kept` per split; `train` in nested stratified order."""
    labels = np.array([classes.index(s.label) for s in kept], dtype=np.int64)
    inside = np.array([s.domain in ids for s in kept])
    given = np.array([s.split or "" for s in kept])
    free = np.flatnonzero(inside & ((given == "") | (given == "train")))
    has_val, has_test = (bool((inside & (given == name)).any()) for name in ("val", "test"))
    fractions = (0.0 if has_val else request.val_fraction, 0.0 if has_test else request.test_fraction)
    try:
        found = stratified_split(labels[free], *fractions, request.seed, classes)
    except SplitError as error:
        raise DataError(str(error)) from None
    parts = {name: free[rows] for name, rows in found.items()}
    for name, there in (("val", has_val), ("test", has_test)):
        if there:
            parts[name] = np.flatnonzero(inside & (given == name))
    lost = [classes[c] for c in range(len(classes)) if not (labels[parts["train"]] == c).any()]
    if lost:
        raise DataError(f"Every class needs training images, but {', '.join(map(repr, lost[:5]))} has none.")
    parts["train"] = parts["train"][nested_order(labels[parts["train"]], request.seed)]
    for domain in ood:
        parts[f"ood/{domain}"] = np.flatnonzero([s.domain == domain for s in kept])
        if not len(parts[f"ood/{domain}"]):
            raise DataError(f"Every OOD domain needs images, but none of {domain!r} could be read.")
    return parts


def _notes(
    request: IngestRequest,
    listing: Listing,
    kept: Sequence[Sample],
    bad: list[tuple[str, str]],
    seconds: float,
    train: NDArray[np.uint8],
) -> dict[str, Any]:
    sample = train[:2048].reshape(-1, 3) / 255.0
    return {
        "source": request.source,
        "root": request.root,
        "layout": listing.layout,
        "request": dataclasses.asdict(request),
        "source_fingerprint": listing.fingerprint,
        "quarantined": [{"name": name, "reason": reason} for name, reason in bad],
        "skipped": listing.skipped,
        "channel_mean": sample.mean(0).tolist(),
        "channel_std": sample.std(0).tolist(),
        "class_counts": dict(sorted(Counter(s.label for s in kept).items())),
        "domain_counts": dict(sorted(Counter(s.domain for s in kept).items())),
        "images_per_second": len(kept) / max(seconds, 1e-9),
    }
