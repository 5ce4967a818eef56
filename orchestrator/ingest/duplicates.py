"""Images that occur more than once: leaks between splits, and contradictory labels.

Two samples are the same image if their pixels are equal before they are scaled: copies of a file, and the same picture
saved again without loss (PNG as BMP, with other metadata). Pictures that only look alike are not found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.ingest.source import Outcome, Sample

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
