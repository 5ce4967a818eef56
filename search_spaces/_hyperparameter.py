"""One hyperparameter of a search space (`Hyperparameter`) and one published sweep (`Preset`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import BaseTrial

EDGE = 0.05
"""Share of a range, on its own (log or linear) scale, that counts as its edge."""

Side = Literal["lower", "upper"]


@dataclass(frozen=True)
class Hyperparameter:
    """A hyperparameter: recommended default, search distribution, and the source of both.

    Raises:
        ValueError: the default lies outside the range.

    >>> from optuna.distributions import FloatDistribution
    >>> rate = Hyperparameter(default=0.01, distribution=FloatDistribution(1e-4, 1.0, log=True))
    >>> rate.edge(0.9), rate.edge(0.01)
    ('upper', None)
    """

    default: Any
    distribution: BaseDistribution
    when: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether the hyperparameter exists, given the values decided before it (fixed ones first, then in the order of
    `SPACE`); None = always."""
    source: str = ""
    """Where the range comes from: paper and section, or the measurement."""

    def __post_init__(self) -> None:
        if not _contains(self.distribution, self.default):
            raise ValueError(f"A default must lie in its own range {self.distribution}, but got {self.default!r}.")

    def suggest(self, trial: BaseTrial, name: str) -> Any:
        """Sample a value from an Optuna trial, under the given parameter name."""
        distribution = self.distribution
        if isinstance(distribution, FloatDistribution):
            return trial.suggest_float(
                name, distribution.low, distribution.high, log=distribution.log, step=distribution.step
            )
        if isinstance(distribution, IntDistribution):
            return trial.suggest_int(
                name, distribution.low, distribution.high, log=distribution.log, step=distribution.step
            )
        assert isinstance(distribution, CategoricalDistribution)
        return trial.suggest_categorical(name, distribution.choices)

    def discrete_ends(self) -> tuple[Any, ...]:
        """All choices, or the smallest and largest integer; empty for a continuous range."""
        if isinstance(self.distribution, CategoricalDistribution):
            return tuple(self.distribution.choices)
        if isinstance(self.distribution, IntDistribution):
            return self.distribution.low, self.distribution.high
        return ()

    def edge(self, value: Any) -> Side | None:
        """The end of the range that `value` is within `EDGE` of, or None.

        Choices have no edges; nor do values of another type than the range, such as None (a tied rate).
        """
        distribution = self.distribution
        if isinstance(distribution, CategoricalDistribution) or not isinstance(value, int | float):
            return None
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        if distribution.log and value <= 0:
            return "lower"
        scale = math.log if distribution.log else float
        low = scale(distribution.low)
        high = scale(distribution.high)
        if high == low:
            return None
        position = (scale(value) - low) / (high - low)
        if position <= EDGE:
            return "lower"
        if position >= 1 - EDGE:
            return "upper"
        return None


@dataclass(frozen=True)
class Preset:
    """A published sweep: one or several grids.

    Each is run at the best point of the grids before it: with two or more the sweep is sequential, because the second
    grid needs the results of the first.

    >>> preset = Preset(steps=({"lr_backbone": (0.1, 0.01)}, {"lr_head": (1.0, 10.0, 100.0)}))
    >>> preset.size
    5
    >>> list(preset.points(0))
    [{'lr_backbone': 0.1}, {'lr_backbone': 0.01}]
    """

    steps: tuple[Mapping[str, tuple[Any, ...]], ...] = ()
    """One mapping per grid: hyperparameter → values in the paper's order; several keys form their product. Empty = a
    single point."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters that the sweep keeps fixed (a later step may sweep one of them)."""
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
        """The values of one step, in order; the caller adds the rest of the configuration."""
        grid = self.steps[step]
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))

    def edge(self, key: str, value: Any) -> Side | None:
        """The end of the swept values that `value` lies at, or None."""
        tried = {swept for step in self.steps for swept in step.get(key, ())}
        tried.add(self.fixed.get(key))
        numbers = sorted(number for number in tried if isinstance(number, int | float))
        if key not in self.swept or len(numbers) < 2 or not isinstance(value, int | float):
            return None
        if value <= numbers[0]:
            return "lower"
        if value >= numbers[-1]:
            return "upper"
        return None


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a distribution can take `value`.

    A choice, or a number within the bounds and on the step grid.
    """
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not distribution.low <= value <= distribution.high:
        return False
    if distribution.step is None:
        return True
    steps = (value - distribution.low) / distribution.step
    return math.isclose(steps, round(steps), abs_tol=1e-8)
