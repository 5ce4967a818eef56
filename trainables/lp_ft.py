"""LP-FT (Kumar et al., 2022): fine-tuning from the linear probe's solution.
At a small rate, BatchNorm frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainables.engine.contract import Strategy, TrainingConfig


class LpFt(Strategy):
    """Fine-tuning from the linear probe's solution.

    `bn_conversion: true` is the paper's "LP-FT + BN conversion" (Ha et al., 2024, Table 5).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """LP-FT's row of Ha et al. (2024), Table 1."""

        lr_backbone: float = 1e-4
        head_init: Literal["random", "zeros", "linear_probe"] = "linear_probe"
        bn_mode: Literal["train", "eval"] = "eval"


STRATEGY = LpFt
