"""Images that occur more than once, byte for byte: leaks between splits, and contradictory labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.ingest.source import Outcome, Sample

LISTED = 1000
"""Groups that are named; the counts hold for all."""


@dataclass(frozen=True)
class Duplicates:
    """Groups of samples with the same SHA-256, as positions."""

    across: list[list[int]]
    """In more than one split or domain: what is learnt there is measured here."""
    contradictory: list[list[int]]
    """In more than one class."""
    repeats: int
    """Images that repeat another one of the same split, domain and class."""
    names: dict[int, tuple[str, str]]
    """Name and place of the samples in the groups."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the groups named, up to `LISTED` of each."""
        return {
            "across": [self._named(group) for group in self.across[:LISTED]],
            "across_groups": len(self.across),
            "contradictory": [self._named(group) for group in self.contradictory[:LISTED]],
            "contradictory_groups": len(self.contradictory),
            "repeats": self.repeats,
        }

    def _named(self, group: list[int]) -> dict[str, list[str]]:
        return {"names": [self.names[i][0] for i in group], "places": [self.names[i][1] for i in group]}


def find_duplicates(
    samples: Sequence[Sample], outcomes: Mapping[int, Outcome], place_of: Mapping[int, str]
) -> Duplicates:
    """Group the readable samples by their SHA-256.

    Args:
        outcomes: by position in `samples`.
        place_of: the split (or domain and split) of a position.
    """
    groups: dict[bytes, list[int]] = {}
    for position, outcome in outcomes.items():
        if outcome.reason is None:
            groups.setdefault(outcome.sha256, []).append(position)
    several = [group for group in groups.values() if len(group) > 1]
    across = [group for group in several if len({_place(samples, place_of, i) for i in group}) > 1]
    contradictory = [group for group in several if len({samples[i].label for i in group}) > 1]
    distinct = (len({(_place(samples, place_of, i), samples[i].label) for i in group}) for group in several)
    return Duplicates(
        across,
        contradictory,
        sum(map(len, several)) - sum(distinct),
        {i: (samples[i].name, place_of.get(i, "")) for group in (*across, *contradictory) for i in group},
    )


def _place(samples: Sequence[Sample], place_of: Mapping[int, str], position: int) -> tuple[str, str]:
    return samples[position].domain, place_of.get(position, "")
