"""Hyperparameters and presets: what a range allows, what a sweep tries, and where their edges are."""

from __future__ import annotations

import math

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial

from search_spaces import Hyperparameter, Preset


def test_a_default_outside_its_range_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"^A default must lie in its own range FloatDistribution\(.*\), but got 2\.0\.$"
    ):
        Hyperparameter(2.0, FloatDistribution(0.1, 1.0, log=True))
    with pytest.raises(ValueError, match=r"but got 'c'\.$"):
        Hyperparameter("c", CategoricalDistribution(("a", "b")))
    with pytest.raises(ValueError, match=r"but got None\.$"):
        Hyperparameter(None, FloatDistribution(0.1, 1.0))


@pytest.mark.parametrize(
    ("hyperparameter", "value"),
    [
        (Hyperparameter(0.5, FloatDistribution(0.1, 1.0, log=True)), 0.3),
        (Hyperparameter(2, IntDistribution(1, 9)), 7),
        (Hyperparameter("a", CategoricalDistribution(("a", "b"))), "b"),
    ],
)
def test_suggest_takes_the_value_from_the_trial(hyperparameter: Hyperparameter, value: object) -> None:
    trial = FixedTrial({"x": value})
    assert hyperparameter.suggest(trial, "x") == value
    assert trial.distributions == {"x": hyperparameter.distribution}


@pytest.mark.parametrize(
    ("value", "side"),
    [
        (1e-4, "lower"),
        (10 ** (-4 + 0.05 * 3) * 0.999, "lower"),  # just inside 5 % of the three decades
        (10 ** (-4 + 0.05 * 3) * 1.01, None),
        (1e-2, None),
        (10 ** (-1 - 0.05 * 3) * 0.99, None),
        (10 ** (-1 - 0.05 * 3) * 1.001, "upper"),
        (0.1, "upper"),
        (0.5, "upper"),  # a study file may fix a value outside
        (0.0, "lower"),
    ],
)
def test_the_edge_of_a_log_range_is_five_percent_of_its_decades(value: float, side: str | None) -> None:
    assert Hyperparameter(1e-3, FloatDistribution(1e-4, 0.1, log=True)).edge(value) == side


def test_the_edge_of_a_linear_range_is_five_percent_of_its_length() -> None:
    hyperparameter = Hyperparameter(50.0, FloatDistribution(0.0, 100.0))
    assert [hyperparameter.edge(v) for v in (4.9, 5.1, 94.9, 95.1)] == ["lower", None, None, "upper"]


def test_choices_and_tied_rates_have_no_edge() -> None:
    assert Hyperparameter("a", CategoricalDistribution(("a", "b"))).edge("a") is None
    assert Hyperparameter(1e-3, FloatDistribution(1e-4, 0.1, log=True)).edge(None) is None
    assert Hyperparameter(1.0, FloatDistribution(1.0, 1.0)).edge(1.0) is None


def test_the_discrete_ends_of_a_range() -> None:
    assert Hyperparameter("a", CategoricalDistribution(("a", "b"))).discrete_ends() == ("a", "b")
    assert Hyperparameter(2, IntDistribution(1, 9)).discrete_ends() == (1, 9)
    assert Hyperparameter(1.0, FloatDistribution(0.0, 2.0)).discrete_ends() == ()


def test_a_preset_counts_and_lists_its_points_in_order() -> None:
    preset = Preset(steps=({"a": (3, 1), "b": (0.1, 0.2)}, {"c": (5, 4, 3)}), fixed={"c": 9, "d": "x"})
    assert preset.size == 2 * 2 + 3
    assert preset.swept == {"a", "b", "c"}
    assert list(preset.points(0)) == [{"a": 3, "b": 0.1}, {"a": 3, "b": 0.2}, {"a": 1, "b": 0.1}, {"a": 1, "b": 0.2}]
    assert list(preset.points(1)) == [{"c": 5}, {"c": 4}, {"c": 3}]
    assert Preset(fixed={"a": 1}).size == 1


def test_the_edge_of_a_preset_is_its_first_and_last_value_with_the_fixed_one_between() -> None:
    preset = Preset(steps=({"a": (0.1, 0.01)}, {"c": (10.0, 0.1)}), fixed={"c": 20.0, "d": 1.0})
    assert [preset.edge("a", v) for v in (0.1, 0.01)] == ["upper", "lower"]
    assert [preset.edge("c", v) for v in (20.0, 10.0, 0.1)] == ["upper", None, "lower"]
    assert preset.edge("d", 1.0) is None
    assert preset.edge("a", None) is None
    assert math.isclose(preset.size, 4)
