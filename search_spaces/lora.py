"""LoRA: the rates of adapters and head, and the rank."""

from __future__ import annotations

from optuna.distributions import CategoricalDistribution, FloatDistribution

from search_spaces import Hyperparameter, Preset
from search_spaces._segmentation import DECODER_RATE, TASK

SPACE: dict[str, Hyperparameter] = {
    # With B = 0 at the start the first steps of A have no gradient: adapters take larger steps than the weights do.
    "lr_backbone": Hyperparameter(
        default=3e-2,
        distribution=FloatDistribution(1e-3, 1.0, log=True),
        source="Hu et al. (2022) train at ten to a hundred times the rate of full fine-tuning",
    ),
    "lr_head": Hyperparameter(
        default=10.0,
        distribution=FloatDistribution(0.1, 100.0, log=True),
        source="benchmarks/head_rate.py",
    ),
    "rank": Hyperparameter(
        default=8,
        distribution=CategoricalDistribution((2, 4, 8, 16, 32)),
        source="Hu et al. (2022), table 6: ranks 1 to 64 do alike; Zhao et al. (2024) use 32",
    ),
}

PRESETS: dict[str, Preset] = {
    "ranks": Preset(
        steps=({"rank": (2, 4, 8, 16, 32)},),
        source="Hu et al. (2022), table 6: accuracy over the rank",
    ),
}

TASK_SPACES: dict[str, dict[str, Hyperparameter]] = {TASK: {**SPACE, "lr_head": DECODER_RATE}}
