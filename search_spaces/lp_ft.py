"""LP-FT: full fine-tuning from the linear probe's solution, at small rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import FloatDistribution

from search_spaces import Hyperparameter, Preset
from search_spaces._segmentation import DECODER_RATE, TASK


def _starts_elsewhere(hparams: Mapping[str, Any]) -> bool:
    """Whether the head is not the linear probe's, so that no curvature of a solved head is there to be relative to."""
    return bool(hparams.get("head_init", "linear_probe") != "linear_probe")


def _has_no_absolute_rate(hparams: Mapping[str, Any]) -> bool:
    return "lr_backbone" not in hparams


SPACE: dict[str, Hyperparameter] = {
    # Only for an ablation of the head: the rates of full.py, an order of magnitude down.
    "lr_backbone": Hyperparameter(
        default=3e-3,
        distribution=FloatDistribution(1e-4, 1e-2, log=True),
        when=_starts_elsewhere,
        source="provisional: one EfficientNet at 64 px, where 3e-3 was best and 3e-4 moved nothing",
    ),
    # Times the solved head's curvature (trainables.lp_ft.head_curvature), 25 to 35 at the C that the rule chooses on
    # real features: 0.1 is an absolute 3e-3 there.
    "lr_backbone_relative": Hyperparameter(
        default=0.1,
        distribution=FloatDistribution(3e-3, 1.0, log=True),
        when=_has_no_absolute_rate,
        source="provisional, until measured on real networks: absolute 3e-3 and 1e-4 … 0.01 on one EfficientNet at 64 "
        "px, times its head's curvature; benchmarks/lp_ft_rate.py: stable below 0.2 (CNN) and 2 (ViT)",
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

TASK_SPACES: dict[str, dict[str, Hyperparameter]] = {
    TASK: {
        # Of encoder and decoder once both move; the probe's half of the budget trains the decoder alone.
        "lr_backbone": Hyperparameter(
            default=1e-3,
            distribution=FloatDistribution(1e-5, 3e-2, log=True),
            source="a decade below full fine-tuning, as Kumar et al. (2022); Ha et al. (2024), LP-FT: 1e-2 … 3e-7",
        ),
        "lr_probe": DECODER_RATE,
    },
}

TASK_PRESETS: dict[str, dict[str, Preset]] = {
    TASK: {
        "paper": Preset(
            steps=({"lr_backbone": (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6)},),
            fixed={"schedule": "poly"},
            source="Ha et al. (2024), hyperparameter details, LP-FT with SWAV backbones; its part on segmentation "
            "names none",
        ),
    },
}
