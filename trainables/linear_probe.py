"""LP, linear probing: L2-regularised logistic regression on frozen features, C chosen on ID validation.

Of a task without a closed form (segmentation) the head trains by gradient on the frozen backbone: `TrainedProbe`.

Reference practice (Ha et al., 2024, "Training Details", after Kumar et al., 2022): 100 values of C, log-spaced from
1e-7 to 1e2, of which the most accurate on validation; features standardised with one scalar mean and standard deviation
of the training features. On small validation sets that choice is noise (`rule: argmax`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainables.engine.contract import ParamGroup, Phase, Strategy, TrainingConfig, check_choices
from trainables.tasks.base import PROBE_RULE, ProbeRule
from trainables.tasks.linear_probe_head import best_linear_probe, fit_linear_probe, regularisation_path
from trainables.tasks.registry import task_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel
    from trainables.specs.measurements import Report
    from trainables.tasks.base import Task

__all__ = ["LinearProbe", "best_linear_probe", "fit_linear_probe", "regularisation_path"]


class LinearProbe(Strategy):
    """LP: one trial computes the whole regularisation path."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Hyperparameters of the probe."""

        C: float | None = None
        """scikit-learn's inverse regularisation strength; None = chosen on ID validation along a path."""
        num_C: int = 100  # noqa: N815 - C is scikit-learn's name
        """Values on the path, log-spaced from 1e-7 to 1e2."""
        rule: ProbeRule = PROBE_RULE
        """By which C is chosen on ID validation, see `trainables.tasks.base.ProbeRule`."""

        def __post_init__(self) -> None:
            if self.C is not None and not self.C > 0:
                raise ValueError(f"C must be positive, but got {self.C!r}.")
            if self.num_C < 2:
                raise ValueError(f"num_C must be at least 2, but got {self.num_C!r}.")
            check_choices(self)

    @classmethod
    def for_task(cls, task: type[Task]) -> type[Strategy]:
        """`TrainedProbe` where the task has it trained."""
        return TrainedProbe if task.trains_probe else cls

    def phases(self, units: int) -> list[Phase]:
        """One unit, whatever the budget: the solution has a closed optimum."""
        return [Phase("probe", 1, solve=self.solve)]

    def solves_in_closed_form(self) -> str:
        """Always: the probe is solved, not trained."""
        return self.name()

    def param_groups(self, model: TaskModel, prepared: Any = None) -> list[ParamGroup]:
        """The head; it is solved for, not trained, so its rate is never used."""
        return [ParamGroup("head", list(model.head.parameters()), 1.0)]

    def solve(self, model: TaskModel, data: TrialData) -> Report:
        """Put the probe of the chosen C into the head."""
        probe = task_of(data).closed_form_probe()
        assert probe is not None, "a task without a closed-form probe is refused before compute"
        path = regularisation_path(self.config.num_C) if self.config.C is None else [self.config.C]
        return probe.fit(model, data, path, self.config.rule)


class TrainedProbe(Strategy):
    """LP by gradient: the backbone is frozen, its BatchNorm in eval mode; the head trains."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """The common recipe for the head alone."""

        lr_head: float | None = 3e-2
        bn_mode: Literal["train", "eval"] = "eval"

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.lr_head is None:
                raise ValueError("Linear probing trains the head alone, at lr_head, but got None. Give a number.")
            if self.bn_mode != "eval":
                raise ValueError("Linear probing leaves the backbone as it is: bn_mode must be 'eval'. Leave it out.")

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> Strategy:
        """As every strategy, but that nothing has the backbone's rate.

        Raises:
            ValueError: it is given, or as of every strategy.
        """
        if "lr_backbone" in hparams:
            raise ValueError(
                f"Linear probing leaves the backbone as it is, but got lr_backbone {hparams['lr_backbone']!r}. Leave "
                "it out; the head's rate is lr_head."
            )
        return super().from_hparams(hparams)

    def param_groups(self, model: TaskModel, prepared: Any = None) -> list[ParamGroup]:
        """The head at η_w."""
        return [self.head_group(model)]


STRATEGY = LinearProbe
