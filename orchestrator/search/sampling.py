"""Which Optuna sampler proposes, and which way a metric is better."""

from __future__ import annotations

import difflib
import warnings

import optuna

SAMPLERS = ("tpe", "gp", "random", "nsga2", "paper")
LEARNING = frozenset({"tpe", "gp", "nsga2"})
"""Samplers whose proposals depend on results."""
FLAT = frozenset({"gp", "nsga2"})
"""Samplers that know no conditional parameters: every trial draws the parameters of all entries, and uses those of
the entry that it chose."""
STARTUP = 10
"""Trials before a learning sampler learns; Optuna's own default."""

_MINIMISED = frozenset({"loss", "nll", "ece"})
_TEST = ("test/", "calib/", "ood/mean/", "ood/worst/")


def check_sampler(name: str, objectives: int) -> None:
    """Raise ValueError where the name is unknown or does not fit the number of objectives."""
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"A sampler is one of {', '.join(SAMPLERS)}, but got {name!r}.{hint}")
    if name == "nsga2" and objectives < 2:
        raise ValueError("nsga2 is for two or more objectives, but got 1. Use tpe, or name more metrics.")
    if name == "paper" and objectives > 1:
        raise ValueError(
            f"The papers' sweeps follow one metric, but got {objectives}. Use tpe or nsga2, or one metric."
        )


def maximised(metric: str) -> bool:
    """Whether higher is better: not so for losses, calibration errors and costs.

    Raises:
        ValueError: a metric of test data, which must never steer a search. `ood/<domain>/…` of one domain is let
            through: the study file names it as its validation domain.
    """
    if metric.startswith(_TEST):
        raise ValueError(
            f"A search never looks at test data, but got the metric {metric!r}. Use val/acc or val/nll, or name one "
            "domain for validation (search.validation_domain)."
        )
    if metric.startswith("cost/"):
        return metric.endswith("_per_second")
    return metric.rpartition("/")[2] not in _MINIMISED


def make_sampler(name: str, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """A fresh sampler; the seed must differ from proposal to proposal, since nothing of the last one is kept.

    Args:
        name: one of `SAMPLERS`.
        seed: any non-negative integer.
        trials: budget of the study, which sets NSGA-II's population.
    """
    seed %= 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=STARTUP)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP)
        if name == "nsga2":
            # Optuna's population of 50 would leave most studies without a second generation.
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=min(50, max(8, trials // 5)))
        return optuna.samplers.RandomSampler(seed=seed)
