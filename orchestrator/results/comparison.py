"""Scores with intervals, their comparison, and the chosen entries of a study side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.record.records import TrialRecord
from orchestrator.results.leaderboard import mean_interval, reported_trials
from orchestrator.results.selection import per_label, without_validation_domain
from trainables.specs.metrics import CLASSIFICATION, Metric, TaskMetrics


@dataclass(frozen=True)
class Score:
    """A mean over seeds with the half-width of its 95 % interval (NaN for one seed)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Score | None:
        """None without a value.

        Example:
            >>> Score.of([0.5]).has_interval
            False
        """
        numbers = list(values)
        return cls(*mean_interval(numbers)) if numbers else None

    @property
    def has_interval(self) -> bool:
        """False for a single seed."""
        return math.isfinite(self.half)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half

    def text(self, metric: Metric) -> str:
        """The score in the metric's unit.

        Example:
            >>> from trainables.specs.metrics import ACCURACY
            >>> Score(0.971, 0.004).text(ACCURACY), Score(0.971, float("nan")).text(ACCURACY)
            ('97.1 ± 0.4 %', '97.1 %')
        """
        return metric.text(self.mean, self.half)

    def difference(self, metric: Metric) -> str:
        """The score as a difference of two values of a metric, and whether its interval contains 0.

        Example:
            >>> from trainables.specs.metrics import ACCURACY
            >>> Score(0.012, 0.02).difference(ACCURACY)
            '+1.2 ± 2.0 points (within the interval)'
        """
        text = metric.difference(self.mean, self.half)
        if not self.has_interval:
            return f"{text} (one seed)"
        return f"{text} (within the interval)" if self.low <= 0 <= self.high else text


def overlap(a: Score, b: Score) -> bool | None:
    """Whether two 95 % intervals overlap; None where one of the scores has no interval."""
    if not (a.has_interval and b.has_interval):
        return None
    return a.low <= b.high and b.low <= a.high


def certainty(a: Score, b: Score) -> str:
    """Clause on how far the order of two scores can be trusted."""
    shared = overlap(a, b)
    if shared is None:
        return "one seed has no interval, so that the order may be chance"
    if shared:
        return "their 95 % intervals overlap, so that the order may be chance"
    return "their 95 % intervals are apart"


@dataclass(frozen=True)
class Competitor:
    """One entry of a study with its chosen configuration and the trials that report it."""

    label: str
    strategy: str
    chosen: TrialRecord
    runs: Sequence[TrialRecord]

    def score(self, name: str) -> Score | None:
        """Mean of a recorded metric over the runs that have it; None where none has."""
        values = (run.metric(name) for run in self.runs)
        return Score.of(value for value in values if value is not None)


def competitors(records: Sequence[TrialRecord], rule: str, metrics: TaskMetrics = CLASSIFICATION) -> list[Competitor]:
    """All entries with a complete trial, best first by the rule, OOD scores over test domains alone.

    Raises:
        ValueError: no complete trial, or the rule lacks what it needs.
    """
    records = without_validation_domain(records, rule, metrics)
    return [
        Competitor(label, choice.record.strategy, choice.record, reported_trials(records, choice.record.config_hash))
        for label, choice in per_label(records, rule, metrics).items()
    ]
