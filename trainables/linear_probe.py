"""LP, linear probing: L2-regularised logistic regression on frozen features, C chosen on ID validation.

Reference practice (papers/002, "Training Details", after Kumar et al. 2022): 100 values of C, log-spaced from 1e-7 to
1e2; features standardised with one scalar mean and standard deviation of the training features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainables.engine.contract import ParamGroup, Phase, Strategy
from trainables.tasks.linear_probe_head import best_linear_probe, fit_linear_probe, regularisation_path, take_probe

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.backbone import Classifier

__all__ = ["LinearProbe", "best_linear_probe", "fit_linear_probe", "regularisation_path"]


class LinearProbe(Strategy):
    """LP: one trial computes the whole regularisation path."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Knobs of the probe."""

        C: float | None = None
        """scikit-learn's inverse regularisation strength; None = the best on ID validation of a path."""
        num_C: int = 100  # noqa: N815 - C is scikit-learn's name
        """Values on the path, log-spaced from 1e-7 to 1e2."""

        def __post_init__(self) -> None:
            if self.C is not None and not self.C > 0:
                raise ValueError(f"C must be positive, but got {self.C!r}.")
            if self.num_C < 2:
                raise ValueError(f"num_C must be at least 2, but got {self.num_C!r}.")

    def phases(self, units: int) -> list[Phase]:
        """One unit, whatever the budget: the solution has a closed optimum."""
        return [Phase("probe", 1, solve=self.solve)]

    def param_groups(self, model: Classifier) -> list[ParamGroup]:
        """The head; it is solved for, not trained, so its rate is never used."""
        return [ParamGroup("head", list(model.head.parameters()), 1.0)]

    def solve(self, model: Classifier, data: TrialData) -> Mapping[str, float]:
        """Put the best probe into the head."""
        config = self.config
        path = regularisation_path(config.num_C) if config.C is None else [config.C]
        return take_probe(model, best_linear_probe(data, path))


STRATEGY = LinearProbe
