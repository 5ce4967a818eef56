"""Full fine-tuning: every weight moves, from a random head."""

from __future__ import annotations

from optuna.distributions import FloatDistribution

from search_spaces import Hyperparameter, Preset
from search_spaces._segmentation import ENCODER_RATE, TASK

SPACE: dict[str, Hyperparameter] = {
    # The default is the usual rate for SGD with momentum on pretrained networks, convolutional (Kornblith et al., CVPR
    # 2019) and transformers (Dosovitskiy et al., ICLR 2021, table 4) alike.
    "lr_backbone": Hyperparameter(
        default=1e-2,
        distribution=FloatDistribution(1e-4, 0.3, log=True),
        source="Ha et al. (2024), hyperparameter details, FT: 0.3, 0.1 … 3e-4, 1e-4",
    ),
    # Relative to the features' mean squared norm, so that one range serves all backbones: heads alone learn best at 10
    # to 30 and diverge above 100, whatever the network (benchmarks/head_rate.py); with the backbone moving, 3 to 30 are
    # nearly equal on the digits.
    "lr_head": Hyperparameter(
        default=10.0,
        distribution=FloatDistribution(0.1, 100.0, log=True),
        source="benchmarks/head_rate.py",
    ),
}

PRESETS: dict[str, Preset] = {
    "paper": Preset(
        steps=({"lr_backbone": (0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)},),
        fixed={"lr_head": None},
        source="Ha et al. (2024), hyperparameter details, FT; one rate for backbone and head",
    ),
}

# One rate for encoder and decoder, as Ha et al. (2024) train it; two rates are daft's.
TASK_SPACES: dict[str, dict[str, Hyperparameter]] = {TASK: {"lr_backbone": ENCODER_RATE}}

TASK_PRESETS: dict[str, dict[str, Preset]] = {
    TASK: {
        "paper": Preset(
            steps=PRESETS["paper"].steps,
            fixed={"lr_head": None, "schedule": "poly"},
            source="Ha et al. (2024), hyperparameter details, FT; its part on segmentation names no other rates",
        ),
    },
}
