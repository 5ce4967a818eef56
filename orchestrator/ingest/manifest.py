"""What a store says about itself: counts, what was left out and why, duplicates, statistics."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.ingest.assign import Assignment
from orchestrator.ingest.duplicates import find_duplicates
from orchestrator.ingest.request import IngestRequest
from orchestrator.ingest.source import Outcome, Source
from trainables.data.store import DATA, FORMAT

DESCRIPTION = 2
"""Version of what `describe` says. A store that says less is made again; its data and digest stay what they were."""
STATISTICS_IMAGES = 4096
"""How many training images the channel statistics are taken over; a prefix is a stratified sample."""


def quarantine_list(source: Source, outcomes: Mapping[int, Outcome]) -> list[dict[str, str]]:
    """Name, reason, domain and class of every unreadable sample."""
    bad = ((source.samples[i], outcome.reason) for i, outcome in outcomes.items() if outcome.reason is not None)
    return [{"name": s.name, "reason": str(reason), "domain": s.domain, "class": s.label} for s, reason in bad]


def describe(
    source: Source,
    request: IngestRequest,
    assignment: Assignment,
    outcomes: Mapping[int, Outcome],
    folder: Path,
    seconds: float,
) -> dict[str, Any]:
    """Everything that a manifest says but size and SHA-256 of the data.

    Args:
        folder: the unfinished store, with all pixels in place.
        seconds: what reading and decoding took.
    """
    samples = source.samples
    splits = {name: Counter(samples[i].label for i in rows) for name, rows in assignment.splits.items()}
    place_of = {int(i): name for name, positions in assignment.splits.items() for i in positions}
    notes = Counter(note for outcome in outcomes.values() for note in outcome.notes)
    mean, std = _statistics(folder / DATA, list(assignment.splits).index("train"))
    return {
        "format": FORMAT,
        "source": source.kind,
        "layout": source.layout,
        "source_digest": source.digest,
        "request": dataclasses.asdict(request),
        "image_size": request.image_size,
        "classes": assignment.classes,
        "domains": assignment.domains,
        "id_domains": assignment.id_domains,
        "ood_domains": assignment.ood_domains,
        "unused_domains": assignment.unused_domains,
        "splits": list(splits),
        "counts": {name: counts.total() for name, counts in splits.items()},
        "class_counts": {
            name: {c: counts[c] for c in assignment.classes if c in counts} for name, counts in splits.items()
        },
        "channel_mean": mean,
        "channel_std": std,
        "quarantine": quarantine_list(source, outcomes),
        "ignored": [left._asdict() for left in source.ignored],
        "notes": dict(sorted(notes.items())),
        "duplicates": find_duplicates(samples, outcomes, place_of).to_dict(),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(outcomes) / seconds, 1),
    }


def _statistics(path: Path, batch: int) -> tuple[list[float], list[float]]:
    """Per channel, of pixel values in 0…1."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as mapped:
        images = pa.ipc.open_file(mapped).get_batch(batch).column("image")
        count = min(len(images), STATISTICS_IMAGES) * images.type.list_size
        pixels = np.frombuffer(images.values.buffers()[1], np.uint8, count=count).reshape(-1, 3)
        counts = np.stack([np.bincount(pixels[:, channel], minlength=256) for channel in range(3)])
        del pixels, images
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    variance = counts @ values**2 / counts.sum(1) - mean**2
    return mean.round(6).tolist(), np.sqrt(np.maximum(variance, 0)).round(6).tolist()
