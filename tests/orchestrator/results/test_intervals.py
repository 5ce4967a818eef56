"""Intervals and comparisons against closed forms, other libraries, and simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.intervals import Setting, simulate, tetrachoric
from orchestrator.results.intervals import (
    bootstrap_interval,
    estimate,
    estimate_mean,
    holm,
    mean_interval,
    paired,
)


def table(seeds: int, samples: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    effects = generator.normal(size=(seeds, 1)) + generator.normal(size=(1, samples))
    return np.asarray(effects + generator.normal(size=(seeds, samples)))


class TestMeanInterval:
    @given(st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda v: max(v) - min(v) > 1e-3))
    def test_it_is_that_of_the_t_test(self, values: list[float]) -> None:
        mean, half = mean_interval(values)
        reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (mean - half, mean + half) == pytest.approx((reference.low, reference.high), rel=1e-9, abs=1e-12)

    def test_in_closed_form(self) -> None:
        assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302652729911275 / math.sqrt(3)))
        mean, half = mean_interval([0.5])
        assert mean == 0.5
        assert math.isnan(half)
        assert all(math.isnan(value) for value in mean_interval([]))


class TestEstimate:
    def test_the_variance_is_that_of_the_mean_squares(self) -> None:
        values = table(4, 30)
        grand = values.mean()
        seeds = values.mean(axis=1, keepdims=True)
        samples = values.mean(axis=0, keepdims=True)
        ms_seeds = 30 * ((seeds - grand) ** 2).sum() / 3
        ms_samples = 4 * ((samples - grand) ** 2).sum() / 29
        ms_rest = ((values - seeds - samples + grand) ** 2).sum() / (3 * 29)
        assert ms_seeds > ms_rest  # no component is negative
        assert ms_samples > ms_rest
        found = estimate(values)
        assert found.mean == pytest.approx(grand)
        assert found.variance == pytest.approx((ms_seeds + ms_samples - ms_rest) / (4 * 30))

    def test_one_seed_is_the_t_test_over_samples(self) -> None:
        values = table(1, 25)
        reference = stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
        assert estimate(values).interval() == pytest.approx((reference.low, reference.high))

    @pytest.mark.parametrize(("right", "samples"), [(36, 36), (35, 36), (18, 36), (450, 500), (0, 50)])
    def test_one_seed_of_shares_is_wilsons_interval(self, right: int, samples: int) -> None:
        values = (np.arange(samples) < right).astype(float)[None]
        reference = stats.binomtest(right, samples).proportion_ci(method="wilson")
        assert estimate(values).share_interval() == pytest.approx((reference.low, reference.high), abs=1e-12)

    def test_seeds_that_agree_on_every_sample_add_nothing(self) -> None:
        one = (np.arange(100) < 90).astype(float)[None]
        assert estimate(np.repeat(one, 3, axis=0)).variance == pytest.approx(float(estimate(one).variance))

    def test_strata_are_weighted_and_fixed(self) -> None:
        values = np.concatenate([table(3, 20, 1), table(3, 200, 2) + 5], axis=1)
        strata = np.repeat([0, 1], [20, 200])
        found = estimate(values, strata)
        means = (values[:, :20].mean(), values[:, 20:].mean())
        assert found.mean == pytest.approx(sum(means) / 2)
        assert found.mean == pytest.approx(float(estimate_mean(values, strata, np.array([0.5, 0.5]))))
        assert found.variance < estimate(values).variance  # the strata's difference is no chance

    def test_leading_axes_are_computed_at_once(self) -> None:
        stack = np.stack([table(3, 40, seed) for seed in range(4)])
        together = estimate(stack)
        assert together.variance == pytest.approx([float(estimate(one).variance) for one in stack])
        assert together.freedom == pytest.approx([float(estimate(one).freedom) for one in stack])

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((0, 5), "An interval over samples needs a seed and two samples, but got 0 and 5."),
            ((3, 1), "An interval over samples needs a seed and two samples, but got 3 and 1."),
        ],
    )
    def test_too_little(self, shape: tuple[int, int], message: str) -> None:
        with pytest.raises(ValueError) as error:
            estimate(np.zeros(shape))
        assert str(error.value) == message

    def test_a_stratum_of_one_sample(self) -> None:
        with pytest.raises(ValueError, match=r"^A stratum needs two samples, but stratum 1 has 1\.$"):
            estimate(np.zeros((3, 4)), np.array([0, 0, 0, 1]))


class TestComparison:
    def test_equal_tables_differ_by_nothing(self) -> None:
        values = table(3, 50)
        found = estimate(paired(values, values))
        assert (found.mean, found.p_value()) == (0.0, 1.0)

    def test_a_constant_difference_is_certain(self) -> None:
        assert estimate(paired(table(3, 50) + 1, table(3, 50))).p_value() < 1e-6

    def test_p_and_interval_agree(self) -> None:
        found = estimate(table(3, 60, 5))
        low, high = found.interval(1 - float(found.p_value()))
        assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-9)

    def test_a_deterministic_row_stands_for_every_seed(self) -> None:
        values = table(3, 20)
        assert paired(values, values[:1]).shape == (3, 20)
        with pytest.raises(ValueError, match="same seeds and samples"):
            paired(values, values[:2])

    def test_holm(self) -> None:
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert holm([0.6, 0.7]) == [1.0, 1.0]
        assert holm([]) == []


class TestBootstrap:
    def test_it_agrees_with_the_normal_interval_of_many_seeds_and_samples(self) -> None:
        values = table(40, 300)
        found = estimate(values)
        half = 1.96 * math.sqrt(float(found.variance))
        low, high = bootstrap_interval(values)
        assert (low, high) == pytest.approx((found.mean - half, found.mean + half), abs=0.15 * half)

    def test_the_same_table_gives_the_same_interval(self) -> None:
        assert bootstrap_interval(table(3, 50)) == bootstrap_interval(table(3, 50))

    def test_strata_are_resampled_within(self) -> None:
        values = np.concatenate([np.zeros((3, 10)), np.ones((3, 90))], axis=1)
        assert bootstrap_interval(values, np.repeat([0, 1], [10, 90])) == (0.5, 0.5)


@pytest.mark.parametrize(("samples", "seed_points"), [(36, 1.0), (360, 0.5), (1000, 1.0)])
def test_coverage_and_false_leaders_in_simulated_studies(samples: int, seed_points: float) -> None:
    """The whole table is docs/intervals.md, from 2,000 studies a line; 500 here scatter by 0.5 points of coverage."""
    outcome = simulate(Setting(samples, (0.8,) * 5, (seed_points,) * 5, (0.5, 0.2)), studies=500)
    assert 0.92 <= outcome.coverage <= 0.985
    assert outcome.ahead <= 0.06


@pytest.mark.parametrize("correlation", [-0.3, 0.0, 0.5, 0.9])
def test_tetrachoric_correlation_of_two_medians(correlation: float) -> None:
    """Both signs are equal with probability 1/2 + arcsin(ρ)/π (Sheppard, 1899)."""
    samples = 100_000
    equal = round(samples * (0.25 + math.asin(correlation) / (2 * math.pi)))
    first = np.repeat([0.0, 1.0], samples // 2)
    other = samples // 2 - equal
    second = np.concatenate([np.repeat([0.0, 1.0], [equal, other]), np.repeat([1.0, 0.0], [equal, other])])
    assert tetrachoric(first, second) == pytest.approx(correlation, abs=1e-3)
