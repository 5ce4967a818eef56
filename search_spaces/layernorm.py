"""LayerNorm tuning: the rates of norms and head, and λ.

λ where it is fixed for a trial. The number of cycles is not searched: a cycle takes at least two units, and the budget
may have fewer. Fix `cycles`, or use the preset `cyclic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import FloatDistribution

from search_spaces import Hyperparameter, Preset
from search_spaces._segmentation import DECODER_RATE, TASK


def _has_fixed_lambda(hparams: Mapping[str, Any]) -> bool:
    """Whether λ is a single value per trial, and has an effect.

    It has where a trained parameter is scaled by it.
    """
    has_no_effect = hparams.get("train") == "beta" and hparams.get("rescale", "gamma") == "gamma"
    return hparams.get("lam_choice", "fixed") == "fixed" and not has_no_effect


_LAMBDAS = tuple(round(0.1 * k, 1) for k in range(21))

SPACE: dict[str, Hyperparameter] = {
    # γ and β are few and of order one in every network: they tolerate larger steps than weight matrices.
    "lr_backbone": Hyperparameter(
        default=0.1,
        distribution=FloatDistribution(1e-3, 1.0, log=True),
        source="digits ViT at 10 and 100 % of the images: validation best at 0.1 to 1, OOD falls from 1 on; Zhao et "
        "al. (2024) sweep 2e-3 to 1e-7, with AdamW",
    ),
    # Relative to the features' mean squared norm, as in full.py.
    "lr_head": Hyperparameter(
        default=10.0,
        distribution=FloatDistribution(0.1, 100.0, log=True),
        source="benchmarks/head_rate.py",
    ),
    # λ < 1 where the sample resembles the pretraining data, λ > 1 where it under-represents the target.
    "lam": Hyperparameter(
        default=1.0,
        distribution=FloatDistribution(0.0, 2.0),
        when=_has_fixed_lambda,
        source="Tan et al. (2025) have λ on both sides of 1 and no range; LAMBDA_GRID of trainables.engine",
    ),
}

_RATES = {"lr_backbone": 0.1, "lr_head": 10.0}

PRESETS: dict[str, Preset] = {
    "lambda_grid": Preset(
        steps=({"lam": _LAMBDAS},),
        fixed={**_RATES, "lam_choice": "fixed", "cycles": 0},
        source="Tan et al. (2025): λ below and above 1, a trial each; `sweep` takes one trial for the same curve",
    ),
    "sweep": Preset(
        steps=({"lr_backbone": (0.03, 0.1, 0.3)},),
        fixed={"lr_head": 10.0, "lam_choice": "sweep", "cycles": 0},
        source="Tan et al. (2025): the whole curve of λ by evaluation alone, of the tuned network of every rate",
    ),
    "cyclic": Preset(
        steps=({"cycles": (1, 2, 3)},),
        fixed={**_RATES, "lam_choice": "sweep"},
        source="Tan et al. (2025), cyclic framework: head, norms and λ in turns",
    ),
}

TASK_SPACES: dict[str, dict[str, Hyperparameter]] = {TASK: {**SPACE, "lr_head": DECODER_RATE}}
