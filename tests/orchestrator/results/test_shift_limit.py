"""The limit of a growing shift: known curves, curves without a limit, and how often the interval holds the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from orchestrator.results.fsr import EXPONENTS, Floats, ShiftLimit

SIZES = np.array([25.0, 50.0, 100.0])


def curve(limit: float, slope: float, exponent: float, images: Floats = SIZES) -> Floats:
    return np.asarray(limit - slope * images**-exponent)


class TestFit:
    @pytest.mark.parametrize(
        ("limit", "slope", "exponent"), [(5.0, 20.0, 0.5), (2.0, 3.0, 1.0), (1.0, -4.0, 0.7), (3.0, 30.0, 2.0)]
    )
    def test_known_curves(self, limit: float, slope: float, exponent: float) -> None:
        images = np.array([25.0, 50.0, 100.0, 400.0, 1600.0])
        fit = ShiftLimit(images).fit(curve(limit, slope, exponent, images))
        assert fit.limit == pytest.approx(limit, rel=0.005)
        assert fit.exponent == pytest.approx(exponent, rel=0.02)  # the grid's step
        assert fit.slope == pytest.approx(slope, rel=0.06)
        assert fit.at(images) == pytest.approx(curve(limit, slope, exponent, images), rel=0.005)

    def test_noisy_shifts_against_a_general_least_squares_solver(self) -> None:
        images = np.array([10.0, 20.0, 40.0, 80.0, 160.0, 320.0])
        shifts = curve(4, 9, 0.6, images) + 0.05 * np.random.default_rng(0).normal(size=6)
        (limit, slope, exponent), _ = curve_fit(
            lambda n, a, b, c: a - b * n**-c, images, shifts, p0=(4, 9, 0.6), maxfev=10_000
        )
        fit = ShiftLimit(images).fit(shifts)
        assert fit.limit == pytest.approx(limit, rel=3e-3)
        assert fit.exponent == pytest.approx(exponent, rel=0.02)
        assert fit.slope == pytest.approx(slope, rel=0.03)

    def test_a_constant_shift_is_its_own_limit(self) -> None:
        limit = ShiftLimit(SIZES)
        assert limit.fit(np.full(3, 2.0)).limit == pytest.approx(2.0)
        assert limit.share(np.full((1, 3), 2.0), 2) == pytest.approx([1.0])

    def test_three_sizes_at_least(self) -> None:
        with pytest.raises(ValueError) as error:
            ShiftLimit(np.array([10.0, 5.0, 10.0]))
        assert str(error.value) == (
            "an extrapolation needs samples of three different sizes, but they have 5, 10 images."
        )


class TestShare:
    def test_of_the_limit(self) -> None:
        shifts = np.stack([curve(4, 10, 0.5), curve(1, -4, 0.7)])
        assert ShiftLimit(SIZES).share(shifts, 2) == pytest.approx([0.75, 1 + 4 * 100**-0.7], rel=0.01)

    def test_of_any_sample(self) -> None:
        order = np.array([2, 0, 1])
        shifts = curve(4, 10, 0.5)[None]
        assert ShiftLimit(SIZES[order]).share(shifts[:, order], 0) == pytest.approx([0.75], rel=0.01)

    def test_without_a_limit_it_is_nothing_or_without_bound(self) -> None:
        logarithm = np.log(SIZES)
        linear = SIZES
        falling = -0.9 * np.log(SIZES) + 5
        assert ShiftLimit(SIZES).share(np.stack([logarithm, linear, falling]), 2).tolist() == [0, 0, math.inf]
        assert ShiftLimit(SIZES).fit(logarithm).exponent == EXPONENTS[0]


class TestInterval:
    def test_no_spread_no_width(self) -> None:
        shifts = np.repeat(curve(4, 10, 0.5)[:, None], 3, axis=1)
        assert ShiftLimit(SIZES).interval(shifts, 2, 0.95) == pytest.approx((0.75, 0.75), abs=0.01)

    def test_one_seed_has_none(self) -> None:
        assert all(map(math.isnan, ShiftLimit(SIZES).interval(curve(4, 10, 0.5)[:, None], 2, 0.95)))

    def test_what_a_seed_does_to_all_samples_cancels(self) -> None:
        shifts = curve(4, 10, 0.5)[:, None] * np.array([0.5, 1.0, 2.0])
        low, high = ShiftLimit(SIZES).interval(shifts, 2, 0.95)
        assert (low, high) == pytest.approx((0.75, 0.75), abs=0.01)

    def test_an_end_is_open_where_some_seeds_have_no_limit(self) -> None:
        low, high = ShiftLimit(SIZES).interval(np.stack([curve(4, 10, 0.5), curve(4, 10, 0.5), SIZES], axis=1), 2, 0.95)
        assert low == 0
        assert 0 < high < math.inf

    @pytest.mark.parametrize(("seeds", "noise"), [(3, 0.005), (3, 0.02), (5, 0.02)])
    def test_it_covers_the_truth_as_often_as_it_states(self, seeds: int, noise: float) -> None:
        """The bare percentiles, which this fails with, hold it in 71 to 85 of 100."""
        generator = np.random.default_rng(0)
        limit = ShiftLimit(SIZES)
        times = 200
        held = 0
        for _ in range(times):
            common, own = generator.normal(size=(1, seeds)), generator.normal(size=(3, seeds))
            shifts = curve(4, 10, 0.5)[:, None] * (1 + 0.05 * common) * (1 + noise * own)
            low, high = limit.interval(shifts, 2, 0.95)
            held += low <= 0.75 <= high
        assert 0.88 <= held / times <= 0.99

    def test_many_seeds_draw_the_same_every_time(self) -> None:
        shifts = curve(4, 10, 0.5)[:, None] + 0.05 * np.random.default_rng(0).normal(size=(3, 8))
        limit = ShiftLimit(SIZES)
        assert limit.interval(shifts, 2, 0.95) == limit.interval(shifts, 2, 0.95)
