"""Search spaces: one public file per strategy.

With the same stem as in `trainables`; imports optuna only.

A file holds `SPACE`, name → `Hyperparameter` (default beside range), and `PRESETS`, name → `Preset` (the papers' own
sweeps). Keys are fields of the strategy's `Config`. The folder is the registry: a new strategy is a new file here.

A task whose rates mean something else has spaces of its own: `TASK_SPACES` and `TASK_PRESETS`, task → what `SPACE` and
`PRESETS` are for the others. It has no presets but these.

Terms: a hyperparameter is *fixed* (by the study file or a preset), or *sampled* by the search; both together are the
`hparams` of a trial.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Collection, Mapping
from typing import Any

from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from search_spaces._hyperparameter import Hyperparameter, Preset

CLASSIFICATION = "classification"

__all__ = [
    "Hyperparameter",
    "Preset",
    "default_point",
    "names",
    "near_edge",
    "preset",
    "presets",
    "searched",
    "space",
    "suggest",
]


def names() -> list[str]:
    """Names of all strategies that have a search space, sorted.

    The public modules of this package.

    >>> "full" in names()
    True
    """
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def space(name: str, task: str = CLASSIFICATION) -> dict[str, Hyperparameter]:
    """The hyperparameters of one strategy for a task, in the order in which they are sampled.

    Raises:
        ValueError: unknown strategy.

    >>> space("full")["lr_backbone"].default
    0.01
    >>> space("full")["lr_backbone"].distribution
    FloatDistribution(high=0.3, log=True, low=0.0001, step=None)
    """
    module = _module(name)
    hyperparameters: dict[str, Hyperparameter] = getattr(module, "TASK_SPACES", {}).get(task, module.SPACE)
    return hyperparameters


def presets(name: str, task: str = CLASSIFICATION) -> dict[str, Preset]:
    """The published sweeps of one strategy for a task, by name.

    Raises:
        ValueError: unknown strategy.
    """
    module = _module(name)
    by_name: dict[str, Preset] = module.PRESETS
    if task in getattr(module, "TASK_SPACES", {}):
        by_name = getattr(module, "TASK_PRESETS", {}).get(task, {})
    return by_name


def preset(name: str, which: str, task: str = CLASSIFICATION) -> Preset:
    """One published sweep of one strategy.

    Raises:
        ValueError: unknown strategy, or the strategy has no such preset.
    """
    by_name = presets(name, task)
    if which not in by_name:
        listed = ", ".join(by_name) or "none"
        raise ValueError(f"{name} has no preset {which!r}.{_did_you_mean(which, list(by_name))} It has: {listed}.")
    return by_name[which]


def searched(name: str, fixed: Mapping[str, Any] | None = None, task: str = CLASSIFICATION) -> list[str]:
    """Names of the hyperparameters that are sampled beside the `fixed` ones.

    Empty = there is a single point.

    >>> searched("full", {"lr_head": 10.0})
    ['lr_backbone']
    """
    return [key for key in default_point(name, fixed, task) if key not in (fixed or {})]


def default_point(name: str, fixed: Mapping[str, Any] | None = None, task: str = CLASSIFICATION) -> dict[str, Any]:
    """The `fixed` hyperparameters, and the default of every other one that exists beside them.

    >>> default_point("full", {"lr_head": 1.0})
    {'lr_head': 1.0, 'lr_backbone': 0.01}
    """
    hparams = dict(fixed or {})
    for key, hyperparameter in space(name, task).items():
        if _is_free(key, hyperparameter, hparams):
            hparams[key] = hyperparameter.default
    return hparams


def suggest(
    trial: BaseTrial,
    name: str,
    prefix: str = "",
    fixed: Mapping[str, Any] | None = None,
    task: str = CLASSIFICATION,
) -> dict[str, Any]:
    """The `fixed` hyperparameters, and a sampled value of every other one.

    Of those that exist beside the decided ones (define-by-run).

    Args:
        trial: an Optuna trial; its parameters are named `<prefix>.<hyperparameter>`.
        name: the strategy.
        prefix: label of the study's entry; empty = bare names.
        fixed: hyperparameters that are not sampled.
        task: what is learned.

    >>> import optuna
    >>> trial = optuna.trial.FixedTrial({"full.lr_backbone": 0.02})
    >>> suggest(trial, "full", prefix="full", fixed={"lr_head": 1.0})
    {'lr_head': 1.0, 'lr_backbone': 0.02}
    """
    hparams = dict(fixed or {})
    for key, hyperparameter in space(name, task).items():
        if _is_free(key, hyperparameter, hparams):
            hparams[key] = hyperparameter.suggest(trial, f"{prefix}.{key}" if prefix else key)
    return hparams


def near_edge(
    name: str,
    hparams: Mapping[str, Any],
    fixed: Collection[str] = (),
    preset: str | None = None,
    task: str = CLASSIFICATION,
) -> list[str]:
    """Warnings about values at an edge of what was searched.

    A better value may lie outside.

    Args:
        name: the strategy.
        hparams: a selected configuration.
        fixed: hyperparameters that were not searched (no warning for them).
        preset: the sweep that the configuration comes from; its grid then replaces the ranges, and its edge is its
            first and last value. None = the ranges, whose edge is 5 % at either end on the range's own scale.
        task: what was learned.
    """
    warnings = []
    for key, value in hparams.items():
        if key in fixed:
            continue
        hyperparameter = space(name, task).get(key)
        if preset is not None:
            side = presets(name, task)[preset].edge(key, value)
            searched_values = f"the preset {preset!r}"
        elif hyperparameter is not None:
            side = hyperparameter.edge(value)
            searched_values = f"its range{_range_in_words(hyperparameter)}"
        else:
            continue
        if side is not None:
            warnings.append(
                f"{key} = {value:.3g} lies at the {side} edge of {searched_values}: a better value may lie outside."
            )
    return warnings


def _is_free(key: str, hyperparameter: Hyperparameter, hparams: Mapping[str, Any]) -> bool:
    """Whether a hyperparameter is still undecided and exists beside those that are decided."""
    if key in hparams:
        return False
    return hyperparameter.when is None or hyperparameter.when(hparams)


def _range_in_words(hyperparameter: Hyperparameter) -> str:
    distribution = hyperparameter.distribution
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        return ""
    return f" {distribution.low:g} to {distribution.high:g}"


def _module(name: str) -> Any:
    strategies = names()
    if name not in strategies:
        raise ValueError(
            f"A search space belongs to one of {', '.join(strategies)}, but got {name!r}."
            f"{_did_you_mean(name, strategies)}"
        )
    return importlib.import_module(f"search_spaces.{name}")


def _did_you_mean(name: str, options: list[str]) -> str:
    matches = difflib.get_close_matches(name, options, n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
