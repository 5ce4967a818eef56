"""What Optuna may choose. One public file per strategy, the same stem as in `trainables`; imports optuna only.

A file holds `SPACE`, hyperparameter → `Law` (default beside range), and `PRESETS`, name → `Preset` (the papers' own
sweeps). Keys are fields of the strategy's `Config`. The folder is the registry: a new strategy is a new file here.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Collection, Mapping
from typing import Any

from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

from search_spaces._law import Law, Preset

__all__ = ["Law", "Preset", "default_point", "names", "near_edge", "preset", "presets", "searched", "space", "suggest"]


def names() -> list[str]:
    """Names of all strategies that have a search space, sorted: the public module files of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def space(name: str) -> dict[str, Law]:
    """The laws of one strategy, in the order in which they are drawn. Raises ValueError for an unknown name."""
    found: dict[str, Law] = _module(name).SPACE
    return found


def presets(name: str) -> dict[str, Preset]:
    """The published sweeps of one strategy. Raises ValueError for an unknown name."""
    found: dict[str, Preset] = _module(name).PRESETS
    return found


def preset(name: str, which: str) -> Preset:
    """One published sweep of one strategy.

    Raises:
        ValueError: unknown strategy, or the strategy has no such preset.
    """
    known = presets(name)
    if which not in known:
        has = ", ".join(known) or "none"
        raise ValueError(f"{name} has no preset {which!r}.{_hint(which, list(known))} It has: {has}.")
    return known[which]


def searched(name: str, fixed: Mapping[str, Any] | None = None) -> list[str]:
    """Hyperparameters that are left to a search once `fixed` are decided; empty = there is one point only."""
    chosen = dict(fixed or {})
    return [key for key in default_point(name, chosen) if key not in chosen]


def default_point(name: str, fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`fixed` and the default of every other hyperparameter that exists beside them."""
    chosen = dict(fixed or {})
    for key, law in space(name).items():
        if key not in chosen and (law.when is None or law.when(chosen)):
            chosen[key] = law.default
    return chosen


def suggest(trial: BaseTrial, name: str, prefix: str = "", fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`fixed` and a drawn value of every other hyperparameter that exists beside them (define-by-run).

    Args:
        trial: an Optuna trial; its parameters are named `<prefix>.<hyperparameter>`.
        name: the strategy.
        prefix: label of the study's entry; empty = bare names.
        fixed: hyperparameters that are decided already; they are never asked for.
    """
    chosen = dict(fixed or {})
    for key, law in space(name).items():
        if key not in chosen and (law.when is None or law.when(chosen)):
            chosen[key] = law.draw(trial, f"{prefix}.{key}" if prefix else key)
    return chosen


def near_edge(
    name: str, hparams: Mapping[str, Any], fixed: Collection[str] = (), preset: str | None = None
) -> list[str]:
    """Warnings about values at an edge of what was searched: a better value may lie outside.

    Args:
        name: the strategy.
        hparams: a chosen configuration.
        fixed: hyperparameters that were not searched (no warning for them).
        preset: the sweep that the configuration comes from; its grid then takes the place of the ranges, and the edge
            is its first and last value. None = the ranges, whose edge is 5 % at either end on the range's own scale.
    """
    found = []
    for key, value in hparams.items():
        if key in fixed:
            continue
        law = space(name).get(key)
        if preset is not None:
            side, searched_in = presets(name)[preset].edge(key, value), f"the preset {preset!r}"
        elif law is not None:
            side, searched_in = law.edge(value), f"its range{_range(law)}"
        else:
            continue
        if side is not None:
            found.append(
                f"{key} = {value:.3g} lies at the {side} edge of {searched_in}: a better value may lie outside."
            )
    return found


def _range(law: Law) -> str:
    found = law.distribution
    return f" {found.low:g} to {found.high:g}" if isinstance(found, FloatDistribution | IntDistribution) else ""


def _module(name: str) -> Any:
    known = names()
    if name not in known:
        raise ValueError(f"A search space belongs to one of {', '.join(known)}, but got {name!r}.{_hint(name, known)}")
    return importlib.import_module(f"search_spaces.{name}")


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
