"""What a store says about itself: counts, what was left out and why, duplicates, statistics.

Images that occur more than once: leaks between splits, and contradictory labels.

Two samples are the same image if their pixels are equal before they are scaled: copies of a file, and the same picture
saved again without loss (PNG as BMP, with other metadata). Pictures that only look alike are not found.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.ingest.assign import Assignment
from orchestrator.ingest.request import IngestRequest
from orchestrator.ingest.source import Outcome, Sample, Source
from trainables.data.store import DATA, FORMAT

SHOWN = 6
"""Images of one group that are shown to a person."""
LISTED = 1000
"""Groups that are named; the counts hold for all."""


@dataclass(frozen=True)
class Duplicates:
    """Groups of samples that are the same image, as positions."""

    across: list[list[int]]
    """In more than one split or domain."""
    leaks: list[list[int]]
    """Of these: in more than one of training, validation, and what is measured (test and OOD), so that a number tells
    what was learnt or chosen by heart."""
    contradictory: list[list[int]]
    """In more than one class."""
    repeats: int
    """Images that repeat another one of the same split, domain and class."""
    names: dict[int, tuple[str, str]]
    """Name and place of the samples in the groups."""
    resaved: frozenset[int]
    """First positions of the groups whose files differ: their pixels are equal, their bytes are not."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the groups named, up to `LISTED` of each."""
        found: dict[str, Any] = {"repeats": self.repeats}
        for key, groups in (("across", self.across), ("leaks", self.leaks), ("contradictory", self.contradictory)):
            found |= {key: [self._named(group) for group in groups[:LISTED]], f"{key}_groups": len(groups)}
        return found

    def _named(self, group: list[int]) -> dict[str, Any]:
        return {
            "names": [self.names[i][0] for i in group],
            "places": [self.names[i][1] for i in group],
            "same": "pixels" if group[0] in self.resaved else "bytes",
        }


def in_words(group: Mapping[str, Any]) -> str:
    """A named group: `a.png (train) = b.bmp (test)`; says so where only the pixels are the same."""
    named = list(zip(group["names"], group["places"], strict=True))
    equal = " = ".join(f"{name} ({place})" if place else name for name, place in named[:SHOWN])
    equal += f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return equal + (" (equal pixels, other bytes)" if group["same"] == "pixels" else "")


def find_duplicates(
    samples: Sequence[Sample], outcomes: Mapping[int, Outcome], place_of: Mapping[int, str]
) -> Duplicates:
    """Group the readable samples by the SHA-256 of their pixels.

    Args:
        outcomes: by position in `samples`.
        place_of: the split of a position, `ood/<domain>` for OOD domains.
    """
    groups: dict[bytes, list[int]] = {}
    for position, outcome in outcomes.items():
        if outcome.reason is None:
            groups.setdefault(outcome.pixels, []).append(position)
    several = [group for group in groups.values() if len(group) > 1]
    across = [group for group in several if len({_place(samples, place_of, i) for i in group}) > 1]
    leaks = [group for group in across if len({_use(place_of.get(i, "")) for i in group}) > 1]
    contradictory = [group for group in several if len({samples[i].label for i in group}) > 1]
    distinct = (len({(_place(samples, place_of, i), samples[i].label) for i in group}) for group in several)
    return Duplicates(
        across,
        leaks,
        contradictory,
        sum(map(len, several)) - sum(distinct),
        {i: (samples[i].name, place_of.get(i, "")) for group in (*across, *contradictory) for i in group},
        frozenset(group[0] for group in several if len({outcomes[i].sha256 for i in group}) > 1),
    )


def _place(samples: Sequence[Sample], place_of: Mapping[int, str], position: int) -> tuple[str, str]:
    return samples[position].domain, place_of.get(position, "")


def _use(place: str) -> str:
    return "measured" if place == "test" or place.startswith("ood/") else place


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
