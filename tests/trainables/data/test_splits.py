"""Splits and the nested order, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainables.data.splits import TEST, TRAIN, VAL, fraction_size, nested_order, stratified_split


def classes(*sizes: int) -> np.ndarray:
    """Labels 0, 1, … with these counts, interleaved."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(0).permutation(labels)


def same_domain(labels: np.ndarray) -> np.ndarray:
    return np.zeros_like(labels)


class TestStratifiedSplit:
    def test_each_class_is_split_by_the_same_shares(self) -> None:
        labels = classes(100, 40, 7)
        codes = stratified_split(labels, same_domain(labels), 0.15, 0.2, seed=0)
        counts = [[int(((labels == c) & (codes == part)).sum()) for part in (TRAIN, VAL, TEST)] for c in range(3)]
        assert counts == [[65, 15, 20], [26, 6, 8], [5, 1, 1]]

    def test_a_share_of_zero_is_an_empty_split(self) -> None:
        labels = classes(10, 10)
        codes = stratified_split(labels, same_domain(labels), 0.0, 0.3, seed=0)
        assert np.bincount(codes, minlength=3).tolist() == [14, 0, 6]

    def test_three_samples_go_one_to_each_split_for_any_shares(self) -> None:
        labels = classes(3, 3)
        codes = stratified_split(labels, same_domain(labels), 0.45, 0.5, seed=1)
        assert [sorted(codes[labels == c]) for c in (0, 1)] == [[TRAIN, VAL, TEST]] * 2

    def test_domains_are_spread_evenly_over_the_splits(self) -> None:
        labels = np.zeros(400, dtype=np.int64)
        domains = np.repeat([0, 1, 2], [200, 160, 40])
        codes = stratified_split(labels, domains, 0.1, 0.1, seed=3)
        for part, expected in ((VAL, [20, 16, 4]), (TEST, [20, 16, 4])):
            assert np.abs(np.bincount(domains[codes == part], minlength=3) - expected).max() <= 1

    def test_the_split_depends_on_the_seed_and_not_on_other_classes(self) -> None:
        labels = classes(50, 50)
        first = stratified_split(labels, same_domain(labels), 0.2, 0.2, seed=0)
        assert np.array_equal(first, stratified_split(labels, same_domain(labels), 0.2, 0.2, seed=0))
        assert not np.array_equal(first, stratified_split(labels, same_domain(labels), 0.2, 0.2, seed=1))
        alone = labels[labels == 1]
        assert np.array_equal(first[labels == 1], stratified_split(alone, same_domain(alone), 0.2, 0.2, seed=0))

    def test_a_class_smaller_than_the_number_of_splits_is_refused(self) -> None:
        labels = classes(9, 2)
        with pytest.raises(ValueError) as error:
            stratified_split(labels, same_domain(labels), 0.15, 0.15, seed=0)
        assert str(error.value) == "A class to be split into 3 parts needs 3 samples, but class 1 has 2."

    def test_shares_without_training_samples_are_refused(self) -> None:
        labels = classes(9, 9)
        with pytest.raises(ValueError) as error:
            stratified_split(labels, same_domain(labels), 0.5, 0.5, seed=0)
        assert str(error.value) == (
            "The fractions for validation and test must lie in [0, 1) and their sum must be below 1, but got "
            "0.5 and 0.5."
        )


class TestNestedOrder:
    def test_it_is_a_permutation(self) -> None:
        labels = classes(13, 5, 8)
        order = nested_order(labels, same_domain(labels), seed=0)
        assert sorted(order) == list(range(26))

    @given(
        sizes=st.lists(st.integers(1, 120), min_size=1, max_size=5),
        shares=st.lists(st.floats(0.001, 1.0), min_size=2, max_size=2),
    )
    def test_a_share_is_a_prefix_of_the_samples_of_low_rank(self, sizes: list[int], shares: list[float]) -> None:
        labels = classes(*sizes)
        ordered = labels[nested_order(labels, same_domain(labels), seed=0)]
        for share in sorted(shares):
            prefix = ordered[: fraction_size(labels, share)]
            expected = [sum(rank / n < share for rank in range(n)) for n in sizes]
            assert np.bincount(prefix, minlength=len(sizes)).tolist() == expected

    def test_a_prefix_has_the_domains_in_proportion(self) -> None:
        labels = np.zeros(300, dtype=np.int64)
        domains = np.repeat([0, 1], [200, 100])
        ordered = domains[nested_order(labels, domains, seed=0)]
        for count in (30, 60, 150):
            assert abs(int((ordered[:count] == 0).sum()) - count * 2 / 3) <= 1

    def test_another_seed_selects_other_samples(self) -> None:
        labels = classes(40, 40)
        first, second = (set(nested_order(labels, same_domain(labels), seed)[:20]) for seed in (0, 1))
        assert first != second


class TestFractionSize:
    def test_binary_fractions_round_as_in_nested_order(self) -> None:
        """0.07 · 100 is 7.000000000000001, whose ceiling is 8."""
        assert fraction_size(classes(100), 0.07) == 7

    def test_every_class_keeps_an_image(self) -> None:
        assert fraction_size(classes(1000, 3), 0.001) == 2

    def test_one_is_everything(self) -> None:
        assert fraction_size(classes(11, 7), 1.0) == 18

    @pytest.mark.parametrize("share", [0.0, -0.1, 1.01])
    def test_other_shares_are_refused(self, share: float) -> None:
        with pytest.raises(ValueError) as error:
            fraction_size(classes(3), share)
        assert str(error.value) == f"A fraction of the training data must lie in (0, 1], but got {share}."


@st.composite
def grouped_samples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Labels, domains, and disjoint groups of samples of one class each, at least three groups per class."""
    labels: list[int] = []
    groups: list[list[int]] = []
    for label in range(draw(st.integers(1, 3))):
        for size in draw(st.lists(st.integers(1, 6), min_size=3, max_size=12)):
            groups.append(list(range(len(labels), len(labels) + size)))
            labels += [label] * size
    order = draw(st.permutations(range(len(labels))))
    shuffled = [[order[position] for position in group] for group in groups if len(group) > 1]
    values = np.empty(len(labels), np.int64)
    values[list(order)] = labels
    domains = np.array(draw(st.lists(st.integers(0, 2), min_size=len(labels), max_size=len(labels))), np.int64)
    return values, domains, shuffled


def sizes(labels: np.ndarray, codes: np.ndarray) -> list[list[int]]:
    """Samples in train, val and test, per class."""
    return [np.bincount(codes[labels == label], minlength=3).tolist() for label in np.unique(labels)]


class TestGroups:
    @given(grouped_samples(), st.floats(0.05, 0.4), st.floats(0.05, 0.4), st.integers(0, 3))
    def test_no_group_is_divided_and_sizes_stay_near(
        self, data: tuple[np.ndarray, np.ndarray, list[list[int]]], val: float, test: float, seed: int
    ) -> None:
        labels, domains, groups = data
        codes = stratified_split(labels, domains, val, test, seed, groups)
        assert all(len({int(codes[position]) for position in group}) == 1 for group in groups)
        exact = stratified_split(labels, domains, val, test, seed)
        largest = max(map(len, groups), default=1)
        for got, wanted in zip(sizes(labels, codes), sizes(labels, exact), strict=True):
            assert min(got) >= 1
            assert max(abs(got[part] - wanted[part]) for part in (VAL, TEST)) < largest

    @given(grouped_samples(), st.integers(0, 3))
    def test_the_order_of_groups_and_of_their_members_does_not_matter(
        self, data: tuple[np.ndarray, np.ndarray, list[list[int]]], seed: int
    ) -> None:
        labels, domains, groups = data
        reversed_groups = [group[::-1] for group in groups[::-1]]
        one, other = (stratified_split(labels, domains, 0.2, 0.2, seed, g) for g in (groups, reversed_groups))
        assert np.array_equal(one, other)

    def test_sizes_are_exact_where_samples_outside_of_groups_suffice(self) -> None:
        labels = np.repeat([0, 1], [60, 40])
        groups = [list(range(start, start + 4)) for start in (*range(0, 24, 4), *range(60, 80, 4))]
        for seed in range(20):
            codes = stratified_split(labels, same_domain(labels), 0.15, 0.2, seed, groups)
            assert sizes(labels, codes) == [[39, 9, 12], [26, 6, 8]]

    def test_groups_are_drawn_as_often_as_other_samples(self) -> None:
        """Copies are neither kept for training nor for the test: their share of the test split is that of all."""
        labels = np.zeros(100, np.int64)
        groups = [[start, start + 1] for start in range(0, 40, 2)]
        drawn = [stratified_split(labels, same_domain(labels), 0.2, 0.2, seed, groups) for seed in range(400)]
        share = np.mean([(codes[:40] == TEST).mean() for codes in drawn])
        # Standard error of the mean of 400 draws: below 0.005.
        assert 0.18 < share < 0.22

    def test_a_group_of_two_classes_counts_in_both(self) -> None:
        labels = np.repeat([0, 1], 10)
        groups = [[0, 10], [1, 11], [2, 12]]
        for seed in range(20):
            codes = stratified_split(labels, same_domain(labels), 0.2, 0.2, seed, groups)
            assert all(codes[one] == codes[other] for one, other in groups)
            assert sizes(labels, codes) == [[6, 2, 2]] * 2

    def test_a_class_of_too_few_groups_keeps_its_training_samples(self) -> None:
        labels = np.zeros(9, np.int64)
        codes = stratified_split(labels, same_domain(labels), 0.2, 0.2, 0, [[0, 1, 2, 3], [4, 5, 6, 7, 8]])
        assert sorted(sizes(labels, codes)[0]) == [0, 4, 5]
        assert (codes == TRAIN).any()
