"""What the search spaces of segmentation share: rates of a decoder that starts from random weights.

They are absolute: a decoder has no pooled feature that they could be relative to.
"""

from __future__ import annotations

from optuna.distributions import FloatDistribution

from search_spaces._hyperparameter import Hyperparameter

TASK = "segmentation"

ENCODER_RATE = Hyperparameter(
    default=1e-2,
    distribution=FloatDistribution(1e-4, 0.3, log=True),
    source="SGD with momentum 0.9: 0.007 in Chen et al. (2018), 0.01 in mmsegmentation, 0.02 in torchvision's "
    "references; Ha et al. (2024), FT: 0.3, 0.1 … 3e-4, 1e-4",
)
"""Of a pretrained encoder of which every weight moves."""

DECODER_RATE = Hyperparameter(
    default=3e-2,
    distribution=FloatDistribution(1e-3, 1.0, log=True),
    source="up to ten times the encoder's rate, as in DeepLab (Chen et al., 2018) and mmsegmentation, where the "
    "encoder's is 0.01",
)
"""Of a decoder beside an encoder of which a part moves, or nothing."""
