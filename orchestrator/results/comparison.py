"""What can be said of two numbers with intervals: the entries of a study side by side, and words for how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.record.records import TrialRecord
from orchestrator.results.leaderboard import mean_interval, measured
from orchestrator.results.selection import per_label, tested


@dataclass(frozen=True)
class Score:
    """A mean over seeds with the half-width of its 95 % interval (NaN for one seed)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Score | None:
        """None without a value."""
        found = list(values)
        return cls(*mean_interval(found)) if found else None

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.half)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half

    def per_cent(self) -> str:
        """`97.1 ± 0.4 %`, or `97.1 %` of one seed."""
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.half:.1f} %" if self.known else " %")

    def points(self) -> str:
        """A difference of two accuracies: `+1.2 ± 0.8 points`, and whether its interval holds 0."""
        text = f"{100 * self.mean:+.1f}" + (f" ± {100 * self.half:.1f} points" if self.known else " points")
        if not self.known:
            return f"{text} (one seed)"
        return f"{text} (within the interval)" if self.low <= 0 <= self.high else text


def overlap(a: Score, b: Score) -> bool | None:
    """Whether two 95 % intervals share a point; None where one of them is not known."""
    if not (a.known and b.known):
        return None
    return a.low <= b.high and b.low <= a.high


def certainty(a: Score, b: Score) -> str:
    """How far the order of two scores can be trusted, as the end of a sentence."""
    shared = overlap(a, b)
    if shared is None:
        return "one seed has no interval, so that the order may be chance"
    if shared:
        return "their 95 % intervals overlap, so that the order may be chance"
    return "their 95 % intervals are apart"


@dataclass(frozen=True)
class Competitor:
    """One entry of the study with the configuration that was chosen for it, and the trials it is reported by."""

    label: str
    strategy: str
    chosen: TrialRecord
    runs: Sequence[TrialRecord]

    def score(self, metric: str) -> Score | None:
        """Mean over the runs that have the metric."""
        return Score.of(value for run in self.runs if (value := run.metric(metric)) is not None)


def competitors(records: Sequence[TrialRecord], rule: str) -> list[Competitor]:
    """All entries with a complete trial, best first by the rule, OOD scores over test domains alone.

    Raises:
        ValueError: no complete trial, or the rule lacks what it needs.
    """
    found = tested(records, rule)
    return [
        Competitor(label, choice.record.strategy, choice.record, measured(found, choice.record.config_hash))
        for label, choice in per_label(found, rule).items()
    ]


def listed(words: Sequence[str], most: int = 3) -> str:
    """`a`, `a and b`, `a, b and c`, `a, b and 4 others`."""
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} others"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
