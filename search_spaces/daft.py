"""DAFT: BatchNorm conversion, a head from zero, and two rates.

Backbone and head have a rate of their own.
"""

from __future__ import annotations

from optuna.distributions import FloatDistribution

from search_spaces import Hyperparameter, Preset
from search_spaces._segmentation import DECODER_RATE, TASK

SPACE: dict[str, Hyperparameter] = {
    # The default is that of full fine-tuning.
    "lr_backbone": Hyperparameter(
        default=1e-2,
        distribution=FloatDistribution(3e-6, 0.1, log=True),
        source="Ha et al. (2024), hyperparameter details, DAFT: 0.1, 0.03 … 3e-6",
    ),
    # The paper sweeps absolute rates around 1. Relative to the features' mean squared norm one range serves all
    # backbones: a head from zero learns best at 10 to 30 and diverges above 100, whatever the network
    # (benchmarks/head_rate.py). With the backbone moving, the best rate depends on that of the backbone.
    "lr_head": Hyperparameter(
        default=10.0,
        distribution=FloatDistribution(0.1, 100.0, log=True),
        source="benchmarks/head_rate.py",
    ),
}

PRESETS: dict[str, Preset] = {
    "paper": Preset(
        steps=(
            {"lr_backbone": (0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6)},
            {"lr_head": (10.0, 3.0, 0.3, 0.1)},
        ),
        fixed={"head_rate": "absolute", "lr_head": 1.0},
        source="Ha et al. (2024), hyperparameter details, DAFT: backbone rates at a head rate of 1.0, then head rates "
        "at the best of them",
    ),
}

TASK_SPACES: dict[str, dict[str, Hyperparameter]] = {
    TASK: {"lr_backbone": SPACE["lr_backbone"], "lr_head": DECODER_RATE}
}

TASK_PRESETS: dict[str, dict[str, Preset]] = {
    TASK: {
        "paper": Preset(
            steps=(PRESETS["paper"].steps[0], {"lr_head": (1.0, 0.3, 3e-2, 1e-2)}),
            fixed={"lr_head": 0.1, "schedule": "poly"},
            source="Ha et al. (2024), hyperparameter details, DAFT: the sweep's two steps. The head rates are a decade "
            "below its 10 … 0.1, which are of a linear head from zero: the part on segmentation names none",
        ),
    },
}
