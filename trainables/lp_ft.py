"""LP-FT (Kumar et al., 2022): fine-tuning from the linear probe's solution.
At a small rate, BatchNorm frozen. Of a task without a closed form (segmentation) the probe is a phase of its own, in
which the head trains by gradient: `TrainedLpFt`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainables.engine.contract import ParamGroup, Phase, Prepared, Strategy, TrainingConfig
from trainables.specs.metrics import HEAD_CURVATURE

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.task_model import TaskModel
    from trainables.tasks.base import Task

SAMPLES = 1024
"""Training images over which the head's curvature is averaged; their order is stratified."""


class LpFt(Strategy):
    """Fine-tuning from the linear probe's solution.

    `bn_conversion: true` is the paper's "LP-FT + BN conversion" (Ha et al., 2024, Table 5).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """LP-FT's row of Ha et al. (2024), Table 1."""

        lr_backbone: float = 1e-4
        lr_backbone_relative: float | None = None
        """In place of `lr_backbone`: the rate times the solved head's curvature (`head_curvature`), so that one range
        fits heads of different scale."""
        head_init: Literal["random", "zeros", "linear_probe"] = "linear_probe"
        bn_mode: Literal["train", "eval"] = "eval"

        def __post_init__(self) -> None:
            super().__post_init__()
            relative = self.lr_backbone_relative
            if relative is None:
                return
            if not relative > 0:
                raise ValueError(f"lr_backbone_relative must be positive, but got {relative!r}.")
            if self.head_init != "linear_probe":
                raise ValueError(
                    f"lr_backbone_relative is relative to a solved head, but head_init is {self.head_init!r}. "
                    "Use lr_backbone."
                )

    @classmethod
    def for_task(cls, task: type[Task]) -> type[Strategy]:
        """`TrainedLpFt` where the task has its probe trained."""
        return TrainedLpFt if task.trains_probe else cls

    def prepare(self, model: TaskModel, data: TrialData) -> Prepared:
        """The default, and the curvature of the solved head as state."""
        prepared = super().prepare(model, data)
        if self.config.lr_backbone_relative is None:
            return prepared
        features = np.asarray(data.features("train")[:SAMPLES], dtype=np.float64)
        weight = model.head.weight.detach().double().cpu().numpy()
        bias = model.head.bias.detach().double().cpu().numpy()
        curvature = head_curvature(features, weight, bias)
        if not (math.isfinite(curvature) and curvature > 0):
            raise ValueError(
                f"lr_backbone_relative needs a solved head of positive curvature, but got {curvature!r}. "
                "Use lr_backbone."
            )
        return Prepared({**prepared.report, HEAD_CURVATURE.name: curvature}, curvature)

    def param_groups(self, model: TaskModel, prepared: Any = None) -> list[ParamGroup]:
        """Backbone and head; a relative rate of the backbone is divided by the curvature in `prepared`."""
        relative = self.config.lr_backbone_relative
        if relative is None or prepared is None:
            return super().param_groups(model, prepared)
        absolute = dataclasses.replace(self.config, lr_backbone=relative / prepared, lr_backbone_relative=None)
        return LpFt(absolute).param_groups(model)


class TrainedLpFt(Strategy):
    """Linear probing by gradient for a share of the budget, then everything moves at a small rate.

    The backbone is frozen and its BatchNorm in eval mode at first; then its weights move, and its BatchNorm stays in
    eval mode. The head's BatchNorm, which is not pretrained, is in train mode throughout. Either phase has an optimiser
    and a whole schedule of its own.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """LP-FT's row of Ha et al. (2024), Table 1, with a probe by gradient."""

        lr_backbone: float = 1e-3
        lr_probe: float = 3e-2
        """Rate of the head while it trains alone."""
        probe_share: float = 0.5
        """Share of the units that the head trains alone (at least one)."""
        bn_mode: Literal["train", "eval"] = "eval"

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.lr_probe > 0:
                raise ValueError(f"lr_probe must be positive, but got {self.lr_probe!r}.")
            if not 0 < self.probe_share < 1:
                raise ValueError(f"0 < probe_share < 1 must hold, but got {self.probe_share!r}.")

    def phases(self, units: int) -> list[Phase]:
        """`probe`, then `tune`.

        Raises:
            ValueError: fewer than two units.
        """
        if units < 2:
            raise ValueError(
                f"Probing and tuning take at least 2 units, but the trial has {units}. Give it more epochs, or shorter "
                "units (search.steps_per_unit)."
            )
        probe = min(units - 1, max(1, round(units * self.config.probe_share)))
        return [
            Phase("probe", probe, groups=frozenset({"head probe"})),
            Phase("tune", units - probe, groups=frozenset({"backbone", "head"})),
        ]

    def param_groups(self, model: TaskModel, prepared: Any = None) -> list[ParamGroup]:
        """Backbone and head of the tuning, and the head at the probe's rate."""
        relative = self.config.head_rate == "relative"
        probe = ParamGroup("head probe", list(model.head.parameters()), self.config.lr_probe, relative)
        return [*super().param_groups(model, prepared), probe]


def head_curvature(features: NDArray[np.float64], weight: NDArray[np.float64], bias: NDArray[np.float64]) -> float:
    """Curvature of the cross-entropy in the features under a linear head, times the features' variance.

    Mean over images of the trace Σₖ pₖ ‖wₖ − Σⱼ pⱼwⱼ‖² of WᵀHW, H = diag(p) − ppᵀ, times E‖φ − E φ‖². The
    Gauss-Newton curvature in the backbone's weights is proportional to it, and with it the inverse of the largest
    stable rate, as 1/E‖φ‖² is for the head. The product does not change with the features' scale, to which a solved
    head is inverse (benchmarks/lp_ft_rate.py).

    Args:
        features: (N, D).
        weight: (K, D).
        bias: (K,).
    """
    logits = features @ weight.T + bias
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    mean_row = probability @ weight
    trace = probability @ np.square(weight).sum(1) - np.square(mean_row).sum(1)
    variance = np.square(features - features.mean(0)).sum(1).mean()
    return float(trace.mean() * variance)


STRATEGY = LpFt
