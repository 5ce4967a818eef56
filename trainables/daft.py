"""DAFT, domain-aware fine-tuning (Ha, Jeong and Lee, 2024).
BatchNorm layers are converted to the statistics of the target data, the head starts from zero, backbone and head move
together at rates of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainables.engine.contract import Strategy, TrainingConfig
from trainables.models.batch_norm import ConversionReport, convert_batch_norm

__all__ = ["ConversionReport", "Daft", "convert_batch_norm"]


class Daft(Strategy):
    """Integrated LP-FT with BatchNorm conversion; `bn_conversion: false` is the ablation "Integrated LP-FT"."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """DAFT's row of Ha et al. (2024), Table 1."""

        lr_head: float | None = 1.0
        head_init: Literal["auto", "random", "zeros", "linear_probe"] = "auto"
        bn_conversion: bool = True


STRATEGY = Daft
