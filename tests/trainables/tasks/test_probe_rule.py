"""Which C the rules take, on paths of predictions made for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trainables.specs.metrics import task_metrics
from trainables.tasks.base import ProbeRule
from trainables.tasks.probe_rule import PathChoice, ValidationPath

IMAGES = 100
TARGETS = np.arange(IMAGES) % 2


def logits(wrong: int, margin: float, first_wrong: int = 0) -> NDArray[np.float64]:
    """Logits (100, 2) of one margin, for the wrong class on some images in a row."""
    sign = np.where(TARGETS == 1, 1.0, -1.0)
    sign[first_wrong : first_wrong + wrong] *= -1
    return np.stack([-sign, sign], 1) * margin / 2


def choose(rule: ProbeRule, *path: NDArray[np.float64], metric: str | None = None, **options: Any) -> PathChoice:
    validation = ValidationPath(TARGETS, task_metrics("classification").selecting(metric), **options)
    for solution in path:
        validation.add(solution)
    return validation.choose(rule)


def test_one_se_is_of_the_paired_difference() -> None:
    # The best has 10 wrong. Paired with it, the first differs on 3 images, all to its disadvantage: a mean of .03 with
    # a standard error of .0171. The second differs on 5, three of them to its disadvantage: .01 with .0225.
    best = logits(10, 1.0)
    first = logits(13, 1.0)
    second = best.copy()
    second[[0, 1, 20, 21, 22]] *= -1
    choice = choose("one_se", first, second, best)
    assert choice.within == (False, True, True)
    assert choice.index == 1
    # Unpaired, the difference of 3 % would be within its standard error of 4.5 %.
    assert math.sqrt(0.1 * 0.9 / 100 + 0.13 * 0.87 / 100) > 0.03


def test_nll_takes_the_likeliest_and_argmax_the_most_accurate() -> None:
    accurate_but_overconfident = logits(8, 30.0)
    path = (logits(12, 0.5), logits(10, 2.0), accurate_but_overconfident)
    assert choose("nll", *path).index == 1
    assert choose("argmax", *path).index == 2


def test_nll_one_se_takes_the_strongest_regularisation_that_is_as_likely() -> None:
    rng = np.random.default_rng(0)
    likeliest = logits(10, 2.0)
    # Each image differs by noise of deviation .5: the standard error of the mean is .05.
    near = likeliest + np.stack([np.zeros(IMAGES), rng.normal(0, 0.3, IMAGES)], 1)
    far = logits(30, 2.0)
    assert choose("nll_one_se", far, near, likeliest).index == 1
    assert choose("nll_one_se", far, likeliest, near).index == 1


def test_equal_accuracies_go_to_the_lower_nll_then_to_the_smaller_c() -> None:
    path = (logits(0, 1.0), logits(0, 3.0), logits(0, 3.0), logits(90, 3.0))
    assert choose("argmax", *path).index == 1
    assert choose("one_se", *path).index == 0


def test_weights_of_the_training_loss_weight_the_likelihood() -> None:
    right_on_zeros = logits(0, 1.0)
    right_on_zeros[TARGETS == 1] *= -2
    right_on_ones = logits(0, 1.0)
    right_on_ones[TARGETS == 0] *= -2.2
    path = (right_on_zeros, right_on_ones)
    assert choose("nll", *path).index == 0
    assert choose("nll", *path, class_weights=np.array([0.2, 1.8])).index == 1


@pytest.mark.parametrize("metric", ["balanced_acc", "macro_f1", "auroc", "ap", "nll", "brier"])
@pytest.mark.parametrize("rule", ["one_se", "nll_one_se", "nll", "argmax"])
def test_every_rule_works_with_every_metric(metric: str, rule: ProbeRule) -> None:
    generator = np.random.default_rng(0)
    signal = np.where(TARGETS == 1, 1.0, -1.0)
    path = []
    for noise in (9.0, 2.0, 1.0, 1.01):
        scores = (signal + generator.normal(0, noise, IMAGES)) / noise**2
        path.append(np.stack([-scores, scores], 1))
    choice = choose(rule, *path, metric=metric)
    assert not choice.within[0]
    assert choice.index > 0
    best = np.argmin(choice.values) if metric in ("nll", "brier") else np.argmax(choice.values)
    assert choice.within[int(best)]
    if rule == "argmax":
        assert choice.index == best


def test_the_bootstrap_of_balanced_accuracy_agrees_with_the_paired_error_of_accuracy() -> None:
    """With classes of equal size the two are nearly the same statistic."""
    best = logits(10, 1.0)
    path = [*(logits(wrong, 1.0) for wrong in (18, 14)), *(logits(wrong, 1.0) for wrong in (10,))]
    paired = choose("one_se", *path, best)
    bootstrap = choose("one_se", *path, best, metric="balanced_acc")
    assert paired.within == bootstrap.within


def test_a_class_that_is_missing_on_validation_is_no_error() -> None:
    validation = ValidationPath(np.zeros(5, dtype=np.int64), task_metrics("classification").selecting("auroc"))
    validation.add(np.zeros((5, 2)))
    validation.add(np.ones((5, 2)))
    choice = validation.choose("one_se")
    assert choice.within == (True, False)
