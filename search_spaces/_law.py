"""What one hyperparameter may be (`Law`) and what a published sweep tried (`Preset`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

EDGE = 0.05
"""Share of a range, counted on its own (log or linear) scale, that is called its edge."""


@dataclass(frozen=True)
class Law:
    """One hyperparameter: the recommended value beside the range that a search may draw from.

    Raises:
        ValueError: the default lies outside the range.
    """

    default: Any
    distribution: BaseDistribution
    when: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether the hyperparameter exists, given those decided before it (in the order of `SPACE`, fixed ones
    first); None = always."""
    source: str = ""
    """Where the range comes from: paper and section, or the measurement."""

    def __post_init__(self) -> None:
        try:
            inside = self.distribution._contains(self.distribution.to_internal_repr(self.default))
        except (TypeError, ValueError):
            inside = False
        if not inside:
            raise ValueError(f"A default must lie in its own range {self.distribution}, but got {self.default!r}.")

    def draw(self, trial: BaseTrial, name: str) -> Any:
        """Ask an Optuna trial for a value under the given parameter name."""
        law = self.distribution
        if isinstance(law, FloatDistribution):
            return trial.suggest_float(name, law.low, law.high, log=law.log, step=law.step)
        if isinstance(law, IntDistribution):
            return trial.suggest_int(name, law.low, law.high, log=law.log, step=law.step)
        assert isinstance(law, CategoricalDistribution)
        return trial.suggest_categorical(name, law.choices)

    def discrete_ends(self) -> tuple[Any, ...]:
        """All choices, or the least and the greatest whole number; nothing of a continuous range."""
        law = self.distribution
        if isinstance(law, CategoricalDistribution):
            return tuple(law.choices)
        return (law.low, law.high) if isinstance(law, IntDistribution) else ()

    def edge(self, value: Any) -> str | None:
        """ "lower" or "upper" where `value` lies within `EDGE` of that end of the range, else None.

        Choices have no edges; neither have values of another type than the range (such as None = tied)."""
        law = self.distribution
        if isinstance(law, CategoricalDistribution) or not isinstance(value, int | float):
            return None
        assert isinstance(law, FloatDistribution | IntDistribution)
        scale = math.log if law.log else float
        if law.log and value <= 0:
            return "lower"
        low, high, at = scale(law.low), scale(law.high), scale(value)
        if high == low:
            return None
        share = (at - low) / (high - low)
        return "lower" if share <= EDGE else "upper" if share >= 1 - EDGE else None


@dataclass(frozen=True)
class Preset:
    """A sweep as a paper ran it: one or several grids, each at the best point of the grids before it.

    Two grids make a *sequential* sweep: the second needs the results of the first.
    """

    steps: tuple[Mapping[str, tuple[Any, ...]], ...] = ()
    """One mapping per step: hyperparameter → values in the paper's order; several keys make their product. No step
    = one single point."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters that the sweep holds fixed (a later step may sweep one of them)."""
    source: str = ""

    @property
    def size(self) -> int:
        """Number of trials of the whole sweep."""
        return sum(math.prod(len(values) for values in step.values()) for step in self.steps) or 1

    @property
    def swept(self) -> frozenset[str]:
        """Names of all hyperparameters that some step sweeps."""
        return frozenset(key for step in self.steps for key in step)

    def points(self, step: int) -> Iterator[dict[str, Any]]:
        """The values of one step, in order; the rest of a configuration comes from the caller."""
        grid = self.steps[step]
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))

    def edge(self, key: str, value: Any) -> str | None:
        """ "lower" or "upper" where `value` is the smallest or largest number that the sweep tried, else None."""
        tried = {v for step in self.steps for v in step.get(key, ())} | {self.fixed.get(key)}
        numbers = sorted(v for v in tried if isinstance(v, int | float))
        if key not in self.swept or len(numbers) < 2 or not isinstance(value, int | float):
            return None
        return "lower" if value <= numbers[0] else "upper" if value >= numbers[-1] else None
