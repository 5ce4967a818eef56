"""BitFit: the rates of biases and head."""

from __future__ import annotations

from optuna.distributions import FloatDistribution

from search_spaces import Hyperparameter, Preset
from search_spaces._segmentation import DECODER_RATE, TASK

SPACE: dict[str, Hyperparameter] = {
    # Biases are few and have gradients of the size of activations' gradients; the paper's rates for them lie one to two
    # decades above those for all weights.
    "lr_backbone": Hyperparameter(
        default=1e-2,
        distribution=FloatDistribution(1e-4, 1.0, log=True),
        source="Ben Zaken et al. (2022), appendix: bias rates one to two decades above those for all weights",
    ),
    "lr_head": Hyperparameter(
        default=10.0,
        distribution=FloatDistribution(0.1, 100.0, log=True),
        source="benchmarks/head_rate.py",
    ),
}

PRESETS: dict[str, Preset] = {}

TASK_SPACES: dict[str, dict[str, Hyperparameter]] = {TASK: {**SPACE, "lr_head": DECODER_RATE}}
