"""LP-FT: full fine-tuning from the linear probe's solution, at small rates."""

from __future__ import annotations

from optuna.distributions import FloatDistribution

from search_spaces import Hyperparameter, Preset

SPACE: dict[str, Hyperparameter] = {
    # Both sweeps of the paper together, without the smallest value, at which nothing changes within 20 epochs.
    "lr_backbone": Hyperparameter(
        default=3e-4,
        distribution=FloatDistribution(1e-6, 1e-2, log=True),
        source="Ha et al. (2024), hyperparameter details, LP-FT: 1e-4 … 3e-7 (MoCo, CLIP), 0.01 … 3e-6 (SWAV)",
    ),
    # Relative to the features' mean squared norm, as in full.py. The head starts at its optimum and has little to
    # learn: rates are two decades lower.
    "lr_head": Hyperparameter(
        default=0.1,
        distribution=FloatDistribution(0.001, 10.0, log=True),
        source="benchmarks/head_rate.py, two decades down",
    ),
}

PRESETS: dict[str, Preset] = {
    "paper": Preset(
        steps=({"lr_backbone": (1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7)},),
        fixed={"lr_head": None, "probe_rule": "argmax"},
        source="Ha et al. (2024), hyperparameter details, LP-FT with MoCo and CLIP backbones",
    ),
    "paper_swav": Preset(
        steps=({"lr_backbone": (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6)},),
        fixed={"lr_head": None, "probe_rule": "argmax"},
        source="Ha et al. (2024), hyperparameter details, LP-FT with SWAV backbones",
    ),
}
