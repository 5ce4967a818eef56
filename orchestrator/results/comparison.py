"""Scores with intervals, their comparison, and the chosen entries of a study side by side.

An interval or comparison states what it is over: test samples and seeds where the study keeps per-sample results, test
samples alone for one seed, seeds alone where no per-sample results are kept or a mean over classes has a class of one
sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.record.records import TrialRecord
from orchestrator.results.intervals import (
    LEVEL,
    Floats,
    MeanEstimate,
    SeedVariance,
    estimate,
    holm,
    mean_interval,
    paired,
)
from orchestrator.results.predictions import SampleTable, SampleTables
from orchestrator.results.selection import Choice, per_label, reported_trials, without_validation_domain
from orchestrator.wording import listed
from trainables.specs.metrics import CLASSIFICATION, Metric, TaskMetrics

Basis = Literal["samples and seeds", "samples", "seeds", "none"]
"""What an interval is over."""

DETERMINISTIC = frozenset({"linear_probe"})
"""Strategies whose every phase is solved in closed form, so that all seeds give the same trial."""
SIGNIFICANT = 1 - LEVEL
"""Adjusted p value up to which a leader is ahead."""


@dataclass(frozen=True)
class Score:
    """A mean with its 95 % interval, and what the interval is over."""

    mean: float
    low: float = math.nan
    """Lower end of the interval; NaN = there is none."""
    high: float = math.nan
    """Upper end."""
    seeds: int = 1
    samples: int | None = None
    """Number of test samples; None = not known."""
    basis: Basis = "none"

    @classmethod
    def of(cls, values: Iterable[float]) -> Score | None:
        """Score of one value per seed; None without a value.

        With an interval over seeds alone.

        Example:
            >>> Score.of([0.5]).has_interval
            False
        """
        numbers = list(values)
        if not numbers:
            return None
        mean, half = mean_interval(numbers)
        basis: Basis = "seeds" if len(numbers) > 1 else "none"
        return cls(mean, mean - half, mean + half, len(numbers), basis=basis)

    @classmethod
    def symmetric(cls, mean: float, half: float, seeds: int = 1) -> Score:
        """Score of a mean and the half-width of its interval over seeds."""
        return cls(mean, mean - half, mean + half, seeds, basis="none" if math.isnan(half) else "seeds")

    @classmethod
    def of_table(cls, table: SampleTable) -> Score:
        """Score of per-sample results.

        With an interval over samples, and over seeds where there are several.
        """
        measured = estimate(table.values, table.strata, table.weights)
        if table.ends == "share":
            return cls.of_estimate(measured, measured.share_interval(effective=table.effective))
        if table.ends == "bounded":
            return cls.of_estimate(measured, measured.bounded_interval(effective=table.effective))
        return cls.of_estimate(measured)

    @classmethod
    def of_estimate(cls, measured: MeanEstimate, ends: tuple[Floats, Floats] | None = None) -> Score:
        """Score of a mean over samples and seeds.

        Args:
            ends: of the interval; None = the symmetric one.
        """
        basis: Basis = "samples and seeds" if measured.seeds > 1 else "samples"
        low, high = (float(end) for end in ends or measured.interval())
        return cls(float(measured.mean), low, high, measured.seeds, measured.samples, basis)

    @property
    def has_interval(self) -> bool:
        """Whether the score has an interval, over whatever it is."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def half(self) -> float:
        """The longer side of the interval.

        mean ± half contains it. NaN where there is none.
        """
        return max(self.high - self.mean, self.mean - self.low)

    @property
    def n(self) -> str:
        """Numbers behind the score.

        Example:
            >>> Score(0.5, 0.4, 0.6, seeds=3, samples=360).n, Score(0.5).n
            ('n = 360 × 3 seeds', '1 seed')
        """
        seeds = f"{self.seeds} seed{'' if self.seeds == 1 else 's'}"
        return seeds if self.samples is None else f"n = {self.samples:,} × {seeds}"

    def text(self, metric: Metric) -> str:
        """The score in the metric's unit.

        Example:
            >>> from trainables.specs.metrics import ACCURACY
            >>> Score(0.971, 0.967, 0.974).text(ACCURACY), Score(0.971).text(ACCURACY)
            ('97.1 ± 0.4 %', '97.1 %')
        """
        return metric.text(self.mean, self.half)

    def difference(self, metric: Metric) -> str:
        """The score as a difference of two values of a metric.

        With a note where its interval contains 0.

        Example:
            >>> from trainables.specs.metrics import ACCURACY
            >>> Score(0.012, -0.008, 0.032, seeds=3, samples=500, basis="samples and seeds").difference(ACCURACY)
            '+1.2 ± 2.0 points (within the interval)'
        """
        text = metric.difference(self.mean, self.half)
        if not self.has_interval:
            return f"{text} (one seed)"
        return f"{text} (within the interval)" if self.contains_zero else text

    @property
    def contains_zero(self) -> bool:
        """Whether the interval of a difference contains 0; True without an interval."""
        return not self.has_interval or self.low <= 0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """Paired difference of two entries over the same samples and seeds."""

    difference: Score
    """First less second, as recorded (not oriented)."""
    p: float
    """Two-sided p value of no difference; NaN where the comparison is not over both samples and seeds."""

    @property
    def over_both(self) -> bool:
        """Whether the comparison is over test samples and seeds, so that it allows a conclusion."""
        return not math.isnan(self.p)

    def clause(self) -> str:
        """Clause on whether the two can be told apart."""
        if self.over_both:
            if self.difference.contains_zero:
                return "their paired difference is within its 95 % interval, so that the order may be chance"
            return "their paired difference is outside its 95 % interval"
        return f"{missing_part(self.difference.basis)}, so that the order may be chance"

    def mark(self) -> str:
        """Suffix of a number.

        Empty where the comparison is over samples and seeds and has a sign.
        """
        if self.over_both:
            return " (within the interval)" if self.difference.contains_zero else ""
        return f" ({missing_part(self.difference.basis)})"


def missing_part(basis: Basis) -> str:
    """What a comparison lacks that is not over both samples and seeds."""
    if basis == "seeds":
        return "over seeds alone: no per-sample results"
    return "one seed"


@dataclass(frozen=True)
class Competitor:
    """One entry of a study with its chosen configuration and the trials that report it."""

    label: str
    strategy: str
    chosen: TrialRecord
    runs: Sequence[TrialRecord]
    metrics: TaskMetrics = CLASSIFICATION
    tables: SampleTables = field(default_factory=SampleTables, repr=False, compare=False)

    @property
    def deterministic(self) -> bool:
        """Whether every seed would give the same trial."""
        return self.strategy in DETERMINISTIC

    def score(self, name: str) -> Score | None:
        """Mean of a recorded metric over the runs that have it; None where none has."""
        runs = [run for run in self.runs if run.metric(name) is not None]
        if not runs:
            return None
        table = self.tables.of(runs, self._measured_as(name), self.metrics)
        if table is not None:
            return Score.of_table(table)
        return Score.of(run.metrics[name] for run in runs)

    def _measured_as(self, name: str) -> str:
        """Name of the metric whose per-sample results are read.

        For the worst domain, the domain that is the worst one of every run; other names as they are.
        """
        if name != self.metrics.ood_worst:
            return name
        domains = self.metrics.domains(self.runs[0].metrics)
        excluded = self.tables.validation_domain
        names = [self.metrics.of_domain(domain) for domain in domains if domain != excluded]
        worst = {
            min(names, key=lambda domain: self.metrics.selection.score(run.metrics.get(domain, math.nan)))
            for run in self.runs
            if names
        }
        return worst.pop() if len(worst) == 1 else name


def compare(first: Competitor, second: Competitor, name: str, pooled: SeedVariance | None = None) -> Comparison | None:
    """Paired comparison of two entries on a recorded metric.

    None where one of them has no value. A deterministic entry has one run, which stands for every seed.

    Args:
        pooled: variance over seeds of several compared entries; None = that of the two alone.
    """
    pairs = _paired_runs(first, second, name)
    if not pairs:
        return _unpaired(first, second, name)
    tables = paired_tables(first, second, name)
    if tables is None:
        score = Score.of(a.metrics[name] - b.metrics[name] for a, b in pairs)
        assert score is not None
        return Comparison(score, math.nan)
    table, other = tables
    differences = paired(table.values, other.values)
    both_deterministic = first.deterministic and second.deterministic
    if both_deterministic:
        # All rows are the same, and would count as independent seeds.
        differences = differences[:1]
    measured = estimate(differences, table.strata, table.weights, pooled)
    concludes = len(differences) > 1 or both_deterministic
    return Comparison(Score.of_estimate(measured), float(measured.p_value()) if concludes else math.nan)


def paired_tables(first: Competitor, second: Competitor, name: str) -> tuple[SampleTable, SampleTable] | None:
    """Per-sample results of two entries, row by row of equal seeds.

    None where they are not of the same samples.
    """
    pairs = _paired_runs(first, second, name)
    table = first.tables.of([pair[0] for pair in pairs], name, first.metrics)
    other = second.tables.of([pair[1] for pair in pairs], name, second.metrics)
    if table is None or other is None or table.samples != other.samples:
        return None
    return table, other


def _paired_runs(first: Competitor, second: Competitor, name: str) -> list[tuple[TrialRecord, TrialRecord]]:
    """Runs of equal seeds.

    The one run of a deterministic entry is paired with every run of the other.
    """
    ours = [run for run in first.runs if run.metric(name) is not None]
    others = [run for run in second.runs if run.metric(name) is not None]
    if ours and others and first.deterministic:
        return [(ours[0], run) for run in others]
    if ours and others and second.deterministic:
        return [(run, others[0]) for run in ours]
    by_seed = {run.seed: run for run in others}
    return [(run, by_seed[run.seed]) for run in ours if run.seed in by_seed]


def _unpaired(first: Competitor, second: Competitor, name: str) -> Comparison | None:
    a = first.score(name)
    b = second.score(name)
    if a is None or b is None:
        return None
    return Comparison(Score(a.mean - b.mean), math.nan)


@dataclass(frozen=True)
class Rival:
    """One entry behind the leader."""

    entry: Competitor
    score: Score
    comparison: Comparison
    """Leader less this entry."""
    adjusted: float
    """p value, Holm-adjusted for the number of rivals; NaN where the comparison allows no conclusion."""


@dataclass(frozen=True)
class Standing:
    """The entries by one metric, and whether the first is ahead of every other."""

    leader: Competitor
    score: Score
    rivals: Sequence[Rival]
    """Best first."""

    @property
    def ahead(self) -> bool:
        """Whether the leader is better than every rival: Holm-adjusted paired tests over samples and seeds."""
        return all(rival.adjusted <= SIGNIFICANT for rival in self.rivals)

    def clause(self) -> str:
        """Clause on how far the order can be trusted."""
        bases = {rival.comparison.difference.basis for rival in self.rivals if not rival.comparison.over_both}
        if bases:
            missing = missing_part("seeds") if bases == {"seeds"} else missing_part("none")
            return f"{missing}, so that the order may be chance"
        largest = max(rival.adjusted for rival in self.rivals)
        if self.ahead:
            return f"paired over the same samples and seeds, Holm-adjusted p {_p_value(largest)}"
        # Not `>`: a NaN allows no conclusion either.
        near = [rival.entry.label for rival in self.rivals if not rival.adjusted <= SIGNIFICANT]
        return (
            f"not told apart from {listed(near)} (paired over the same samples and seeds, Holm-adjusted p up to "
            f"{largest:.2f}), so that the order may be chance"
        )


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"≤ {math.ceil(1000 * p) / 1000:.3f}"


def standing(entries: Sequence[Competitor], name: str, metrics: TaskMetrics) -> Standing | None:
    """Entries that have a metric, best first, and the leader's comparisons.

    With every rival; None for fewer than two entries.
    """
    scored = [(entry, entry.score(name)) for entry in entries]
    present = [(entry, score) for entry, score in scored if score is not None]
    present.sort(key=lambda pair: -metrics.selection.score(pair[1].mean))
    if len(present) < 2:
        return None
    leader, score = present[0]
    pooled = _pooled([entry for entry, _ in present], name)
    comparisons = [compare(leader, entry, name, pooled) for entry, _ in present[1:]]
    usable = [comparison for comparison in comparisons if comparison is not None]
    # Comparisons without a conclusion count as tests: leaving them out would weaken Holm's adjustment of the others.
    p_values = [1.0 if math.isnan(comparison.p) else comparison.p for comparison in usable]
    rivals = [
        Rival(entry, rival_score, comparison, p if comparison.over_both else math.nan)
        for (entry, rival_score), comparison, p in zip(present[1:], usable, holm(p_values), strict=True)
    ]
    return Standing(leader, score, rivals)


def _pooled(entries: Sequence[Competitor], name: str) -> SeedVariance | None:
    """Variance over seeds of the entries that have several.

    None where any of them has no per-sample results. Deterministic entries are left out; a difference from one of them
    is then given more variance than it has.
    """
    estimates = []
    for entry in entries:
        if entry.deterministic:
            continue
        table = entry.tables.of(entry.runs, name, entry.metrics)
        if table is None or len(table.values) < 2:
            return None
        estimates.append(estimate(table.values, table.strata, table.weights))
    return SeedVariance.pooled(estimates) if estimates else None


def competitors(
    records: Sequence[TrialRecord],
    rule: str,
    metrics: TaskMetrics = CLASSIFICATION,
    tables: SampleTables | None = None,
) -> list[Competitor]:
    """All entries with a complete trial, best first by the rule.

    OOD scores are over test domains alone.

    Raises:
        ValueError: no complete trial, or the rule lacks what it needs.
    """
    records = without_validation_domain(records, rule, metrics)
    return [
        competitor(records, choice, metrics, tables or SampleTables())
        for choice in per_label(records, rule, metrics).values()
    ]


def competitor(
    records: Sequence[TrialRecord], choice: Choice, metrics: TaskMetrics, tables: SampleTables
) -> Competitor:
    """An entry with the trials that report its chosen configuration."""
    record = choice.record
    runs = reported_trials(records, record.config_hash)
    return Competitor(record.label, record.strategy, record, runs, metrics, tables)
