"""LP-FT (Kumar et al., ICLR 2022): fine-tuning at a small rate from the linear probe's solution, BatchNorm frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainables.core.contract import Strategy, TrainingConfig
from trainables.core.head import initialise_head
from trainables.daft import convert_on_training_data

if TYPE_CHECKING:
    from trainables.core.backbone import Classifier
    from trainables.data.trial_data import TrialData


class LpFt(Strategy):
    """LP-FT; `bn_conversion: true` is the paper's "LP-FT + BN conversion" (papers/002, Table 5)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """LP-FT's row of papers/002, Table 1."""

        lr_backbone: float = 1e-4
        head_init: Literal["random", "zeros", "linear_probe"] = "linear_probe"
        bn_mode: Literal["train", "eval"] = "eval"

    def prepare(self, model: Classifier, data: TrialData) -> Mapping[str, float]:
        """Convert BatchNorm where asked to (the function, and so the probe, stays), then put the probe in the head."""
        report = convert_on_training_data(model, data) if self.config.bn_conversion else {}
        return {**report, **initialise_head(model, data, self.config.head_init)}


STRATEGY = LpFt
