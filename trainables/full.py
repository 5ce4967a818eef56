"""FT, full fine-tuning: a random head, everything moves (papers/002, Table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainables.core.contract import Strategy, TrainingConfig
from trainables.core.head import initialise_head
from trainables.daft import convert_on_training_data

if TYPE_CHECKING:
    from trainables.core.backbone import Classifier
    from trainables.data.trial_data import TrialData


class Full(Strategy):
    """FT; `bn_conversion: true` is the paper's "FT + BN conversion" (Table 5)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """FT's row of papers/002, Table 1: one rate for backbone and head unless `lr_head` is given."""

    def prepare(self, model: Classifier, data: TrialData) -> Mapping[str, float]:
        """Convert BatchNorm where asked to, then initialise the head."""
        report = convert_on_training_data(model, data) if self.config.bn_conversion else {}
        return {**report, **initialise_head(model, data, self.config.head_init)}


STRATEGY = Full
