"""The manifest of a store: counts, quarantined images, duplicates, channel statistics.

Duplicates are images that occur more than once: leaks between splits, and contradictory labels. Two samples are the
same image if their pixels are equal before scaling: copies of a file, and files saved again without loss (PNG as BMP,
with other metadata). Nearly equal images (`orchestrator.ingest.near_equal`) are listed apart: a threshold decides.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestrator.ingest.assign import Assignment
from orchestrator.ingest.errors import first_few
from orchestrator.ingest.near_equal import ImageGroups
from orchestrator.ingest.request import IngestRequest
from orchestrator.ingest.source import MaskSurvey, Outcome, Sample, Source
from orchestrator.wording import counted
from trainables.data.store import DATA, FORMAT

MANIFEST_VERSION = 3
"""Version of the manifest's content. A store with an older one is written again; its data and digest do not change."""
UNGROUPED_VERSION = 2
"""`MANIFEST_VERSION` of stores whose splits were drawn image by image."""
STATISTICS_IMAGES = 4096
"""Training images of the channel statistics; a prefix is a stratified sample."""
STATISTICS_BYTES = 2**29
"""Bytes of whole pictures that are read for them."""
MAX_NAMES = 6
"""Images of one group that are named in a sentence."""
MAX_GROUPS = 1000
"""Groups of each kind that a manifest names; it counts all."""

_STATISTICS_BLOCK = 2**22
"""Pixels that are counted at a time."""


@dataclass(frozen=True)
class Duplicates:
    """Groups of samples that are the same image, as positions."""

    across: list[list[int]]
    """In more than one split or domain."""
    leaks: list[list[int]]
    """Of these: in more than one of training, validation, and what is measured (test and OOD). Train/test leakage: the
    score would measure memorisation."""
    contradictory: list[list[int]]
    """In more than one class, or with different masks."""
    repeats: int
    """Images that repeat another one of the same split, domain and class."""
    names: dict[int, tuple[str, str]]
    """Name and split of the samples in the groups."""
    resaved: frozenset[int]
    """First positions of the groups with equal pixels in different bytes."""
    near_leaks: list[list[int]]
    """Nearly equal images, of different pixels, in more than one of training, validation and what is measured."""
    crowded: int
    """See `orchestrator.ingest.near_equal.ImageGroups`."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the names of up to `MAX_GROUPS` of each."""
        fields: dict[str, Any] = {"repeats": self.repeats, "crowded": self.crowded}
        for key, groups in (("across", self.across), ("leaks", self.leaks), ("contradictory", self.contradictory)):
            fields[key] = [
                self._named(group, "pixels" if group[0] in self.resaved else "bytes") for group in groups[:MAX_GROUPS]
            ]
            fields[f"{key}_groups"] = len(groups)
        fields["near_leaks"] = [self._named(group, "nearly") for group in self.near_leaks[:MAX_GROUPS]]
        fields["near_leaks_groups"] = len(self.near_leaks)
        return fields

    def _named(self, group: list[int], same: str) -> dict[str, Any]:
        return {
            "names": [self.names[i][0] for i in group],
            "places": [self.names[i][1] for i in group],
            "same": same,
        }


def in_words(group: Mapping[str, Any]) -> str:
    """A group in words: `a.png (train) = b.bmp (test)`.

    With a note where only the pixels are equal, or not even they.

    Example:
        >>> in_words({"names": ["a.png", "b.bmp"], "places": ["train", "test"], "same": "pixels"})
        'a.png (train) = b.bmp (test) (equal pixels, other bytes)'
    """
    named = list(zip(group["names"], group["places"], strict=True))
    text = " = ".join(f"{name} ({split})" if split else name for name, split in named[:MAX_NAMES])
    if len(named) > MAX_NAMES:
        text += f" and {len(named) - MAX_NAMES} more"
    notes = {"pixels": " (equal pixels, other bytes)", "nearly": " (nearly equal)"}
    return text + notes.get(group["same"], "")


def find_duplicates(
    samples: Sequence[Sample],
    outcomes: Mapping[int, Outcome],
    split_of: Mapping[int, str],
    same: ImageGroups,
    survey: MaskSurvey | None = None,
) -> Duplicates:
    """Sort the groups of equal and nearly equal images by what they mean for a study.

    Args:
        samples: of the source.
        outcomes: by position in `samples`.
        split_of: the split of a position, `ood/<domain>` for OOD domains.
        same: the groups of these samples.
        survey: of the samples' masks, where they have masks instead of classes.
    """
    groups = [list(group) for group in same.equal]
    targets = [sample.label for sample in samples] if survey is None else survey.digests

    def domain_and_split(position: int) -> tuple[str, str]:
        return samples[position].domain, split_of.get(position, "")

    across = [group for group in groups if len({domain_and_split(i) for i in group}) > 1]
    contradictory = [group for group in groups if len({targets[i] for i in group}) > 1]

    def leaks_nearly(group: list[int]) -> bool:
        roles_of: dict[bytes, set[str]] = {}
        for i in group:
            roles_of.setdefault(outcomes[i].pixels, set()).add(_role(split_of.get(i, "")))
        # One picture with copies in two roles is an equal leak already.
        return len({frozenset(roles) for roles in roles_of.values()}) > 1

    near_leaks = [list(group) for group in same.near if leaks_nearly(list(group))]
    named = (*across, *contradictory, *near_leaks)
    distinct = (len({(domain_and_split(i), targets[i]) for i in group}) for group in groups)
    return Duplicates(
        across=across,
        leaks=[group for group in across if len({_role(split_of.get(i, "")) for i in group}) > 1],
        contradictory=contradictory,
        repeats=sum(map(len, groups)) - sum(distinct),
        names={i: (samples[i].name, split_of.get(i, "")) for group in named for i in group},
        resaved=frozenset(group[0] for group in groups if len({outcomes[i].sha256 for i in group}) > 1),
        near_leaks=near_leaks,
        crowded=same.crowded,
    )


def _role(split: str) -> str:
    """Training, validation, or measured: copies within one role leak nothing."""
    return "measured" if split == "test" or split.startswith("ood/") else split


def kept_together(assignment: Assignment, outcomes: Mapping[int, Outcome]) -> dict[str, int]:
    """Groups and images that the drawn splits did not divide, and those of them with different pixels."""
    near = [group for group in assignment.together if len({outcomes[i].pixels for i in group}) > 1]
    return {
        "groups": len(assignment.together),
        "images": sum(map(len, assignment.together)),
        "near_groups": len(near),
        "near_images": sum(map(len, near)),
    }


def together_in_words(kept: Mapping[str, int]) -> str:
    """What `kept_together` counted, in a sentence.

    Example:
        >>> together_in_words({"groups": 3, "images": 7, "near_groups": 1, "near_images": 2})
        'The drawn splits keep 3 groups of 7 equal or nearly equal images together (nearly equal: 1 group of 2).'
    """
    if not kept["groups"]:
        return "The drawn splits have no equal or nearly equal images to keep together."
    return (
        f"The drawn splits keep {counted(kept['groups'], 'group')} of {kept['images']} equal or nearly equal images "
        f"together (nearly equal: {counted(kept['near_groups'], 'group')} of {kept['near_images']})."
    )


def quarantine_list(source: Source, outcomes: Mapping[int, Outcome]) -> list[dict[str, str]]:
    """Name, reason, domain and class of every unreadable sample."""
    entries = []
    for position, outcome in outcomes.items():
        if outcome.reason is not None:
            sample = source.samples[position]
            entries.append(
                {"name": sample.name, "reason": outcome.reason, "domain": sample.domain, "class": sample.label}
            )
    return entries


def describe(
    source: Source,
    request: IngestRequest,
    assignment: Assignment,
    outcomes: Mapping[int, Outcome],
    groups: ImageGroups,
    folder: Path,
    seconds: float,
) -> dict[str, Any]:
    """The manifest, except size and SHA-256 of the data file.

    Args:
        source: the scan.
        request: what the store was made for.
        assignment: the split of each readable sample.
        outcomes: by position in `source.samples`.
        groups: of these samples.
        folder: the incomplete store, with all pixels.
        seconds: of reading and decoding.
    """
    samples = source.samples
    class_counts = {name: Counter(samples[i].label for i in positions) for name, positions in assignment.splits.items()}
    notes = Counter(note for outcome in outcomes.values() for note in outcome.notes)
    mean, std = _statistics(folder / DATA, list(assignment.splits).index("train"))
    if source.survey is not None:
        # All pictures are one stratum, whose name is no class.
        class_counts = {name: Counter() for name in class_counts}
    return {
        "format": FORMAT,
        "source": source.kind,
        "layout": source.layout,
        "source_digest": source.digest,
        "request": plain_request(request),
        "image_size": request.image_size if source.survey is None else 0,
        "classes": assignment.classes,
        "domains": assignment.domains,
        "id_domains": assignment.id_domains,
        "ood_domains": assignment.ood_domains,
        "unused_domains": assignment.unused_domains,
        "splits": list(class_counts),
        "counts": {name: len(positions) for name, positions in assignment.splits.items()},
        "class_counts": {
            name: {label: counts[label] for label in assignment.classes if label in counts}
            for name, counts in class_counts.items()
        },
        "channel_mean": mean,
        "channel_std": std,
        "quarantine": quarantine_list(source, outcomes),
        "ignored": [entry._asdict() for entry in source.ignored],
        "notes": dict(sorted(notes.items())),
        "duplicates": find_duplicates(samples, outcomes, assignment.split_of, groups, source.survey).to_dict(),
        "kept_together": kept_together(assignment, outcomes),
        "seconds": round(seconds, 3),
        "images_per_second": round(len(outcomes) / seconds, 1),
        **({} if source.survey is None else _of_masks(source, source.survey, assignment)),
    }


def plain_request(request: IngestRequest) -> dict[str, Any]:
    """The request as JSON values; what only masks have is left out of other stores."""
    fields = dataclasses.asdict(request)
    if request.masks is None:
        del fields["masks"]
        return fields
    labels = request.masks.labels
    if labels is not None:
        # JSON has no integer keys.
        fields["masks"]["labels"] = {
            "classes": list(labels.classes),
            "values": sorted(labels.values.items()),
            "colours": sorted(labels.colours.items()),
            "origin": labels.origin,
        }
    return fields


def _of_masks(source: Source, survey: MaskSurvey, assignment: Assignment) -> dict[str, Any]:
    """What the manifest of a store with masks has beside that of others."""
    return {
        "targets": "masks",
        "pixels": pixel_counts(survey, assignment.domain_ids, assignment.domains, assignment.splits),
        "translation": survey.translation.to_json(),
        "remarks": source.remarks,
        "warnings": source.warnings,
    }


def pixel_counts(
    survey: MaskSurvey, domain_ids: NDArray[np.int64], domains: Sequence[str], splits: Mapping[str, NDArray[np.int64]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Split → domain → `classes` (labelled pixels by class index) and `ignored` pixels."""
    counts: dict[str, dict[str, dict[str, Any]]] = {}
    for split, positions in splits.items():
        counts[split] = {}
        for number in sorted(set(domain_ids[positions].tolist())):
            pixels = survey.pixels[positions[domain_ids[positions] == number]].sum(axis=0).tolist()
            counts[split][domains[number]] = {"classes": pixels[:-1], "ignored": pixels[-1]}
    return counts


def _statistics(path: Path, batch: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, of pixel values in 0…1."""
    counts = np.zeros((3, 256), np.int64)
    with pa.memory_map(str(path)) as mapped:
        images = pa.ipc.open_file(mapped).get_batch(batch).column("image")
        pixels = _first_pixels(images)
        for start in range(0, len(pixels), _STATISTICS_BLOCK):
            block = pixels[start : start + _STATISTICS_BLOCK]
            counts += np.stack([np.bincount(block[:, channel], minlength=256) for channel in range(3)])
        # All are views of the file, which is unmapped here.
        del pixels, images, block
    # By histogram: exact counts, and no copy of the images as floats.
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    variance = counts @ values**2 / counts.sum(1) - mean**2
    # Rounding may leave the variance of a constant channel below zero.
    return mean.round(6).tolist(), np.sqrt(np.maximum(variance, 0)).round(6).tolist()


def pixel_sentences(survey: MaskSurvey, assignment: Assignment) -> list[str]:
    """Pixels of the classes and ignored pixels, a sentence for each split."""
    counts = pixel_counts(survey, assignment.domain_ids, assignment.domains, assignment.splits)
    sentences = []
    for split, domains in counts.items():
        named = zip(survey.classes, class_pixels(domains), strict=True)
        classes = first_few([f"{name} {count:,}" for name, count in named if count], 20)
        ignored = sum(of_domain["ignored"] for of_domain in domains.values())
        sentences.append(f"Pixels of {split}: {classes}; ignored {ignored:,}.")
    return sentences


def split_warnings(survey: MaskSurvey | None, assignment: Assignment) -> list[str]:
    """Classes without pixels in a split, although they occur elsewhere; a sentence for each split."""
    if survey is None:
        return []
    counts = pixel_counts(survey, assignment.domain_ids, assignment.domains, assignment.splits)
    return missing_classes(survey.classes, counts)


def missing_classes(classes: Sequence[str], pixels: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Classes without pixels in a split, although they occur elsewhere; a sentence for each split.

    Example:
        >>> missing_classes(["a", "b"], {"train": {"id": {"classes": [3, 4]}}, "val": {"id": {"classes": [7, 0]}}})
        ['val lacks pixels of b: its numbers are over the other classes.']
    """
    per_split = {split: class_pixels(domains) for split, domains in pixels.items()}
    total = [sum(counts) for counts in zip(*per_split.values(), strict=True)]
    sentences = []
    for split, counts in per_split.items():
        missing = [
            name for name, count, everywhere in zip(classes, counts, total, strict=True) if everywhere > count == 0
        ]
        if missing:
            learns = "no pixel trains them" if split == "train" else "its numbers are over the other classes"
            sentences.append(f"{split} lacks pixels of {first_few(missing, 10)}: {learns}.")
    return sentences


def class_pixels(domains: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """Labelled pixels by class index, over the domains of a split."""
    return [sum(counts) for counts in zip(*(domain["classes"] for domain in domains.values()), strict=True)]


def _first_pixels(images: Any) -> NDArray[np.uint8]:
    """Pixels (n, 3) of up to `STATISTICS_IMAGES` images of a column; of whole pictures `STATISTICS_BYTES` at most."""
    if pa.types.is_fixed_size_list(images.type):
        count = min(len(images), STATISTICS_IMAGES) * images.type.list_size
        return np.frombuffer(images.values.buffers()[1], np.uint8, count=count).reshape(-1, 3)
    _, offsets, data = images.buffers()
    ends = np.frombuffer(offsets, np.int64, count=len(images) + 1)[1 : STATISTICS_IMAGES + 1]
    # One picture at least, whatever its size.
    within = max(1, int(np.searchsorted(ends, STATISTICS_BYTES, side="right")))
    return np.frombuffer(data, np.uint8, count=int(ends[within - 1])).reshape(-1, 3)
