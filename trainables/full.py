"""FT, full fine-tuning: a random head, everything moves (Ha et al., 2024, Table 1)."""

from __future__ import annotations

from dataclasses import dataclass

from trainables.engine.contract import Strategy, TrainingConfig


class Full(Strategy):
    """FT; `bn_conversion: true` is the paper's "FT + BN conversion" (Table 5)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """FT's row of Ha et al. (2024), Table 1.

        One rate for backbone and head unless `lr_head` is given.
        """


STRATEGY = Full
