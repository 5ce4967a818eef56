"""Intervals and comparisons over test samples and seeds: pure functions on arrays.

A configuration that was trained on S seeds and measured on n samples gives a two-way table without replication,
y[s, i] = θ + a[s] + b[i] + e[s, i]: the effect a of the seed, b of the sample (its difficulty), and e of both together,
all random. The variance of the table's mean is

    V = σ_a²/S + σ_b²/n + σ_e²/(S n),

and its usual estimators come from the mean squares of the analysis of variance (Searle, Casella and McCulloch, 1992,
"Variance Components", chapter 4). A paired comparison is the same computation on the differences of two tables.

Samples may be drawn in strata, such as domains or classes: θ is then the weighted mean of the strata's means, and the
strata are fixed while the samples within them are random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student_t

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Confidence level of every interval."""
FLOOR = 0.5
"""Smallest variance, as a part of that of the samples: by chance the means of few seeds lie close together."""
BISECTIONS = 40
"""Halvings of the range of log10 p."""
RESAMPLES = 2000
"""Resamples of the paired bootstrap."""


@dataclass(frozen=True)
class MeanEstimate:
    """A mean over samples and seeds with its standard error.

    And degrees of freedom; arrays over the leading axes.
    """

    mean: Floats
    variance: Floats
    """Of `mean`, over both samples and seeds (samples alone where there is one seed)."""
    freedom: Floats
    """Degrees of freedom of `variance` (Satterthwaite, 1946)."""
    seeds: int
    samples: int
    seed_share: Floats
    """Part of `variance` that was estimated from the seeds' means."""
    seed_part: Floats
    """That variance: of the seeds' means, divided by their number."""
    seed_freedom: float
    """Degrees of freedom of `seed_part`: S − 1, or those of a pooled one."""

    def quantile(self, level: float | Floats = LEVEL) -> Floats:
        """Two-sided quantile of the studentised mean.

        With few seeds, Student's t with Satterthwaite's degrees of freedom covers too little where seeds and samples
        contribute alike (92 % for three seeds): where the seeds' means lie close together by chance, both the variance
        and its uncertainty are underestimated. The average of the two parts' own quantiles, weighted by the variances
        (Cochran and Cox, 1957, "Experimental Designs", section 4.14), covers too much (97 %). Their mean covers
        between 94 and 96 % at any ratio of the two parts (benchmarks/intervals.py).
        """
        return self._quantile(level, self.freedom, self.samples - 1)

    def _quantile(self, level: float | Floats, freedom: Floats, of_samples: float) -> Floats:
        """`quantile`, given the degrees of freedom of the whole variance and of the samples' part."""
        probability = (1 + np.asarray(level)) / 2
        satterthwaite = student_t.ppf(probability, freedom)
        if self.seeds == 1:
            return np.asarray(satterthwaite)
        of_seeds = student_t.ppf(probability, self.seed_freedom)
        weighted = self.seed_share * of_seeds + (1 - self.seed_share) * student_t.ppf(probability, of_samples)
        return np.asarray((satterthwaite + weighted) / 2)

    def interval(self, level: float = LEVEL) -> tuple[Floats, Floats]:
        """Ends of the symmetric interval `mean` ± t · √`variance`."""
        half = self.quantile(level) * np.sqrt(self.variance)
        return self.mean - half, self.mean + half

    def share_interval(self, level: float = LEVEL, effective: float | None = None) -> tuple[Floats, Floats]:
        """Ends of Wilson's interval for a mean of shares in [0, 1].

        At the effective sample size p(1 − p)/V. The symmetric interval fails near 0 and 1. The score interval at the
        effective sample size, with Student's t in place of the normal quantile, is that of Dean and Pagano (2015),
        "Evaluating Confidence Interval Methods for Binomial Proportions in Clustered Surveys"; for one seed it is
        Wilson's own.

        Args:
            effective: sample size where all values are equal; None = the number of samples.
        """
        # The unbiased variance of the samples divides by n - 1; Wilson's interval has n.
        size = self._effective(effective) * self.samples / (self.samples - 1)
        size = np.clip(size, 1.0, self.samples * self.seeds)
        if self.seeds == 1:
            return wilson(self.mean, np.minimum(size, self.samples), norm.ppf((1 + level) / 2))
        # A share determines the variance of its samples, so that only the seeds' is estimated.
        with np.errstate(divide="ignore"):
            freedom = self.seed_freedom / self.seed_share**2
        return wilson(self.mean, size, self._quantile(level, freedom, math.inf))

    def bounded_interval(self, level: float = LEVEL, effective: float | None = None) -> tuple[Floats, Floats]:
        """Ends of the score interval of a metric in [0, 1] that is no share, such as AUROC.

        As `share_interval`, but the metric does not determine the variance of its samples, which is therefore estimated
        and may be smaller than that of a share.

        Args:
            effective: as `share_interval`.
        """
        return wilson(self.mean, np.maximum(self._effective(effective), 1.0), self.quantile(level))

    def _effective(self, equal: float | None) -> Floats:
        """Effective sample size p(1 − p)/V; where V is 0, `equal` or the number of samples."""
        with np.errstate(divide="ignore", invalid="ignore"):
            effective = self.mean * (1 - self.mean) / self.variance
        return np.where(self.variance > 0, effective, self.samples if equal is None else equal)

    def p_value(self) -> Floats:
        """Two-sided p value of the hypothesis that the mean is 0.

        The level at which `interval` touches 0; 1 where nothing varies and the mean is 0. Values below 1e-12 are 1e-12.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(self.mean) / np.sqrt(self.variance)
        ratio = np.where((self.variance == 0) & (self.mean == 0), 0.0, ratio)
        low = np.full(ratio.shape, -12.0)
        high = np.zeros(ratio.shape)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            smaller = self.quantile(1 - 10.0**middle) < ratio  # the p value is below that of the middle
            high = np.where(smaller, middle, high)
            low = np.where(smaller, low, middle)
        return np.where(ratio == 0, 1.0, 10.0**high)


def wilson(share: Floats, samples: Floats, quantile: Floats | float) -> tuple[Floats, Floats]:
    """Ends of the score interval of a share (Wilson, 1927).

    Args:
        share: observed.
        samples: number of independent ones behind it; may be fractional.
        quantile: two-sided, 1.96 for 95 %.
    """
    square = quantile**2
    centre = (share + square / (2 * samples)) / (1 + square / samples)
    half = quantile / (1 + square / samples) * np.sqrt(share * (1 - share) / samples + square / (4 * samples**2))
    # Rounding may put an end on the wrong side of a share of 0 or 1.
    return np.clip(centre - half, 0.0, share), np.clip(centre + half, share, 1.0)


@dataclass(frozen=True)
class SeedVariance:
    """Variance of the means of seeds, pooled over the tables that are compared."""

    part: Floats
    """Of the mean of S seeds."""
    freedom: float

    @classmethod
    def pooled(cls, estimates: Sequence[MeanEstimate]) -> SeedVariance:
        """Variance of a difference of two of several tables.

        The tables have independent seeds, all of one variance per seed.
        """
        several = [one for one in estimates if one.seeds > 1]
        freedom = sum(one.seeds - 1 for one in several)
        return cls(np.asarray(2 * sum((one.seeds - 1) * one.seed_part for one in several) / freedom), freedom)


def estimate(
    table: Floats,
    strata: NDArray[np.int64] | None = None,
    weights: Floats | None = None,
    pooled: SeedVariance | None = None,
) -> MeanEstimate:
    """Mean of a table over its samples and seeds, from variance components.

    Args:
        table: (…, S, n), a value per seed and sample.
        strata: (n,) indices 0 … D − 1 of the stratum of each sample; None = one stratum.
        weights: (D,) weights of the strata, of sum 1; None = equal.
        pooled: takes the place of the variance of the table's own seeds.

    Raises:
        ValueError: no seed, or a stratum of fewer than two samples.
    """
    seeds, samples = table.shape[-2:]
    if seeds < 1 or samples < 2:
        raise ValueError(f"An interval over samples needs a seed and two samples, but got {seeds} and {samples}.")
    if strata is None:
        strata = np.zeros(samples, np.int64)
    count = int(strata.max()) + 1
    if weights is None:
        weights = np.full(count, 1 / count)
    by_seed = np.zeros(table.shape[:-1])
    sampling = np.zeros(table.shape[:-2])
    residual = np.zeros(table.shape[:-2])
    sampling_squared = np.zeros(table.shape[:-2])
    residual_squared = np.zeros(table.shape[:-2])
    for index, weight in enumerate(weights):
        part = table if count == 1 else table[..., strata == index]
        size = part.shape[-1]
        if size < 2:
            raise ValueError(f"A stratum needs two samples, but stratum {index} has {size}.")
        seed_means = part.mean(axis=-1)
        by_seed += weight * seed_means
        sample_means = part.mean(axis=-2)
        between = weight**2 * sample_means.var(axis=-1, ddof=1) / size
        sampling += between
        sampling_squared += between**2 / (size - 1)
        if seeds > 1:
            # Residuals of the two-way table, by the sums of squares: the residuals themselves would be a copy of it.
            total = part.var(axis=-1).sum(axis=-1) / seeds
            # Rounding may leave a difference of sums of squares below zero.
            within = np.maximum(total - sample_means.var(axis=-1), 0.0) * size * seeds
            freedom = (seeds - 1) * (size - 1)
            rest = weight**2 * within / freedom / (seeds * size)
            residual += rest
            residual_squared += rest**2 / freedom
    mean = by_seed.mean(axis=-1)
    if seeds == 1:
        freedoms = _freedom(sampling, sampling_squared, samples - count)
        nothing = np.zeros(mean.shape)
        return MeanEstimate(mean, sampling, freedoms, seeds, samples, nothing, nothing, 0)
    between_seeds = by_seed.var(axis=-1, ddof=1) / seeds
    seed_freedom = float(seeds - 1)
    if pooled is not None:
        between_seeds, seed_freedom = pooled.part, pooled.freedom
    variance = np.maximum(between_seeds + np.maximum(sampling - residual, 0.0), FLOOR * np.maximum(sampling, residual))
    squared = between_seeds**2 / seed_freedom + sampling_squared + residual_squared
    freedom = _freedom(variance, squared, (seeds - 1) * (samples - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.minimum(np.where(variance > 0, between_seeds / variance, 0.0), 1.0)
    return MeanEstimate(mean, variance, freedom, seeds, samples, share, between_seeds, seed_freedom)


def _freedom(variance: Floats, squared: Floats, most: int) -> Floats:
    """Satterthwaite's degrees of freedom of a sum of mean squares.

    Args:
        variance: the sum.
        squared: sum of the squares of the mean squares, each divided by its own degrees of freedom.
        most: returned where nothing varies.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = np.where(squared > 0, variance**2 / squared, most)
    return np.clip(freedom, 1.0, most)


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Mean and half-width of its two-sided Student-t interval.

    The half-width is t(n-1) · s / √n with the sample standard deviation s. It is NaN for fewer than two values, and
    both are NaN for none.

    Example:
        >>> mean, half = mean_interval([1.0, 2.0, 3.0])
        >>> f"{mean:.1f} ± {half:.2f}"
        '2.0 ± 2.48'
    """
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(student_t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, in the order given.

    After Holm (1979), "A Simple Sequentially Rejective Multiple Test Procedure".

    Example:
        >>> holm([0.04, 0.01])
        [0.04, 0.02]
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def paired(first: Floats, second: Floats) -> Floats:
    """Differences (S, n) of two tables over the same samples and seeds.

    A table of one row beside one of several is that of a deterministic configuration: every seed gives this row.

    Raises:
        ValueError: other numbers of samples, or of seeds.
    """
    if first.shape[-1] != second.shape[-1] or len({first.shape[-2], second.shape[-2]} - {1}) > 1:
        raise ValueError(f"A pair of tables has the same seeds and samples, but got {first.shape} and {second.shape}.")
    return first - second


def bootstrap_interval(
    table: Floats, strata: NDArray[np.int64] | None = None, weights: Floats | None = None, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile interval of a table's mean over resamples of its samples and seeds, each independently.

    Samples are drawn within their stratum. The same table gives the same interval: the draws have a seed of their own.
    Resamples of n values vary by the factor √((n − 1)/n) too little: the distances of the ends from the mean are
    divided by that of the seeds.

    Args:
        table: (S, n).
        strata: (n,), as `estimate`.
        weights: (D,), as `estimate`.
    """
    generator = np.random.default_rng(0)
    seeds, samples = table.shape
    if strata is None:
        strata = np.zeros(samples, np.int64)
    count = int(strata.max()) + 1
    if weights is None:
        weights = np.full(count, 1 / count)
    by_seed = np.zeros((RESAMPLES, seeds))
    for index, weight in enumerate(weights):
        part = table[:, strata == index]
        size = part.shape[1]
        # How often each sample is drawn: a resample's mean is then a matrix product, without a copy of the table.
        draws = generator.multinomial(size, np.full(size, 1 / size), size=RESAMPLES)
        by_seed += weight * (draws @ part.T) / size
    seed_draws = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    means = (by_seed * seed_draws).sum(axis=1) / seeds
    middle = float(estimate_mean(table, strata, weights))
    stretch = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return middle - stretch * (middle - float(low)), middle + stretch * (float(high) - middle)


def estimate_mean(table: Floats, strata: NDArray[np.int64], weights: Floats) -> Floats:
    """Weighted mean over strata of a table (…, S, n), over its seeds."""
    means = [weight * table[..., strata == index].mean(axis=(-1, -2)) for index, weight in enumerate(weights)]
    return np.asarray(np.sum(means, axis=0))
