"""Optuna samplers, and the direction of an objective."""

from __future__ import annotations

import warnings

import optuna

from orchestrator.record.costs import COSTS
from trainables.specs.metrics import CLASSIFICATION, TOTAL_SECONDS, VAL, TaskMetrics, quantity
from trainables.specs.suggestions import did_you_mean

SAMPLERS = ("tpe", "gp", "random", "paper")
LEARNING = frozenset({"tpe", "gp"})
"""Samplers whose proposals depend on results."""
FLAT = frozenset({"gp"})
"""Samplers without conditional parameters: where one samples all entries together, every trial has the parameters of
all of them, and uses those of the entry that it chose."""
STARTUP = 10
"""Trials before a learning sampler learns; Optuna's own default."""


def check_sampler(name: str, objectives: int) -> None:
    """Raise ValueError where the name is unknown or does not fit the number of objectives."""
    if name not in SAMPLERS:
        hint = did_you_mean(name, SAMPLERS)
        raise ValueError(f"A sampler is one of {', '.join(SAMPLERS)}, but got {name!r}.{hint}")
    if objectives > 1 and name not in LEARNING:
        raise ValueError(
            f"Several objectives need a sampler that learns from results, but got {name} and {objectives} objectives. "
            f"Use {' or '.join(sorted(LEARNING, reverse=True))}, or one objective."
        )


def maximised(name: str, metrics: TaskMetrics = CLASSIFICATION) -> bool:
    """Whether a higher value of an objective is better.

    Args:
        name: one of `orchestrator.record.costs.COSTS`, or the recorded name of a metric of the task or of a quantity
            with a direction.
        metrics: of the study's task.

    Raises:
        ValueError: a metric of test data, which must never steer a search, or no objective at all. `ood/<domain>/…` of
            one domain is accepted: the study file names it as its validation domain.

    Example:
        >>> maximised("val/acc"), maximised("val/nll"), maximised("cost/images_per_second")
        (True, False, True)
    """
    if name in COSTS:
        return False
    if metrics.tests(name):
        alternatives = dict.fromkeys((metrics.validation, metrics.tie_breaker.on(VAL)))
        raise ValueError(
            f"A search never looks at test data, but got the metric {name!r}. Use {' or '.join(alternatives)}, or name "
            "one domain for validation (search.validation_domain)."
        )
    metric = metrics.named(name)
    recorded = quantity(name)
    if metric is not None:
        return metric.direction == "max"
    if recorded is not None and recorded.direction is not None:
        return recorded.direction == "max"
    raise ValueError(
        f"A search optimises a metric with a direction, but got {name!r}. Use {metrics.validation}, or a cost such as "
        f"{TOTAL_SECONDS.name} (docs/metrics.md has all names)."
    )


def make_sampler(name: str, seed: int, startup: int = STARTUP) -> optuna.samplers.BaseSampler:
    """A fresh sampler, for one objective or several.

    The seed must differ from proposal to proposal, since no sampler state is kept between them.

    Args:
        name: one of `SAMPLERS`.
        seed: any non-negative integer.
        startup: trials before a learning sampler learns.
    """
    seed %= 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=startup)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        return optuna.samplers.RandomSampler(seed=seed)
