"""LayerNorm tuning: the rates of norms and head, and λ where it is fixed for a trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import FloatDistribution

from search_spaces._law import Law, Preset


def _fixed_lambda(chosen: Mapping[str, Any]) -> bool:
    return bool(chosen.get("lam_choice", "fixed") == "fixed")


SPACE: dict[str, Law] = {
    # γ and β are of order one whatever the network, and few: they take larger steps than weight matrices.
    "lr_backbone": Law(
        default=1e-2,
        distribution=FloatDistribution(1e-4, 1.0, log=True),
        source="papers/001 sweeps 2e-3 to 1e-7 with AdamW; SGD on norms needs the decades above full fine-tuning's",
    ),
    "lr_head": Law(
        default=10.0,
        distribution=FloatDistribution(0.1, 100.0, log=True),
        source="benchmarks/head_rate.py",
    ),
    # λ < 1 where the sample resembles the pretraining data, λ > 1 where it under-represents the target (papers/000).
    "lam": Law(default=1.0, distribution=FloatDistribution(0.0, 2.0), when=_fixed_lambda, source="papers/000"),
}

PRESETS: dict[str, Preset] = {
    "lambda_grid": Preset(
        steps=({"lam": tuple(round(0.1 * k, 1) for k in range(21))},),
        source="papers/000: λ below and above 1, a trial each; `lam_choice: sweep` takes one trial for the curve",
    ),
}
