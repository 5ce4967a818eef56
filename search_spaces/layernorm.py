"""LayerNorm tuning: the rates of norms and head, and λ where it is fixed for a trial.

How many cycles is no part of the search, since a cycle takes two units at least and a study may have fewer: fix
`cycles`, or take the preset `cyclic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import FloatDistribution

from search_spaces._law import Law, Preset


def _one_lambda(chosen: Mapping[str, Any]) -> bool:
    """λ is a number of the trial's own, and there is something that it scales."""
    unscaled = chosen.get("train") == "beta" and chosen.get("rescale", "gamma") == "gamma"
    return bool(chosen.get("lam_choice", "fixed") == "fixed") and not unscaled


_LAMBDAS = tuple(round(0.1 * k, 1) for k in range(21))

SPACE: dict[str, Law] = {
    # γ and β are of order one whatever the network, and few: they take larger steps than weight matrices.
    "lr_backbone": Law(
        default=0.1,
        distribution=FloatDistribution(1e-3, 1.0, log=True),
        source="digits ViT at 10 and 100 % of the images: validation best at 0.1 to 1, OOD falls from 1 on; papers/001 "
        "sweeps 2e-3 to 1e-7, with AdamW",
    ),
    # Relative, as in full.py.
    "lr_head": Law(
        default=10.0,
        distribution=FloatDistribution(0.1, 100.0, log=True),
        source="benchmarks/head_rate.py",
    ),
    # λ < 1 where the sample resembles the pretraining data, λ > 1 where it under-represents the target.
    "lam": Law(
        default=1.0,
        distribution=FloatDistribution(0.0, 2.0),
        when=_one_lambda,
        source="papers/000 has λ on both sides of 1 and no range; LAMBDA_GRID of trainables.engine",
    ),
}

_RATES = {"lr_backbone": 0.1, "lr_head": 10.0}

PRESETS: dict[str, Preset] = {
    "lambda_grid": Preset(
        steps=({"lam": _LAMBDAS},),
        fixed={**_RATES, "lam_choice": "fixed", "cycles": 0},
        source="papers/000: λ below and above 1, a trial each; `sweep` takes one trial for the same curve",
    ),
    "sweep": Preset(
        steps=({"lr_backbone": (0.03, 0.1, 0.3)},),
        fixed={"lr_head": 10.0, "lam_choice": "sweep", "cycles": 0},
        source="papers/000: the whole curve of λ by evaluation alone, of the tuned network of every rate",
    ),
    "cyclic": Preset(
        steps=({"cycles": (1, 2, 3)},),
        fixed={**_RATES, "lam_choice": "sweep"},
        source="papers/000, cyclic framework: head, norms and λ in turns",
    ),
}
