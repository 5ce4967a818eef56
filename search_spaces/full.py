"""Full fine-tuning: every weight moves, from a random head."""

from __future__ import annotations

from optuna.distributions import FloatDistribution

from search_spaces._law import Law, Preset

SPACE: dict[str, Law] = {
    "lr_backbone": Law(
        default=3e-3,
        distribution=FloatDistribution(1e-4, 0.3, log=True),
        source="papers/002, hyperparameter details, FT: 0.3, 0.1 … 3e-4, 1e-4",
    ),
    # Relative to the features' mean squared norm, so that one range serves all backbones (benchmarks/head_rate.py).
    "lr_head": Law(
        default=10.0,
        distribution=FloatDistribution(0.1, 100.0, log=True),
        source="benchmarks/head_rate.py",
    ),
}

PRESETS: dict[str, Preset] = {
    "paper": Preset(
        steps=({"lr_backbone": (0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)},),
        fixed={"lr_head": None},
        source="papers/002, hyperparameter details, FT; one rate for backbone and head",
    ),
}
