"""Linear probing: an empty search space, because one trial computes the whole regularisation path."""

from __future__ import annotations

from search_spaces import Hyperparameter, Preset
from search_spaces._segmentation import DECODER_RATE, TASK

# C is chosen inside the trial, on ID validation, from 100 values spaced evenly in the logarithm between 1e-7 and 1e2
# (Kumar et al., 2022; Ha et al., 2024, "Implementation Details"). A search over C would only repeat that slowly.
SPACE: dict[str, Hyperparameter] = {}

PRESETS: dict[str, Preset] = {
    "paper": Preset(
        fixed={"rule": "argmax"},
        source="Ha et al. (2024): the most accurate C on ID validation, 100 values from 1e-7 to 1e2, within one trial",
    ),
    # The same values with a trial each: shows how accuracy, also out of distribution, depends on C.
    "grid": Preset(
        steps=({"C": tuple(10.0 ** (-7 + 9 * i / 99) for i in range(100))},),
        source="Ha et al. (2024): 100 values of C from 1e-7 to 1e2, evenly spaced in the logarithm",
    ),
}

# The decoder trains by gradient on the frozen encoder.
TASK_SPACES: dict[str, dict[str, Hyperparameter]] = {TASK: {"lr_head": DECODER_RATE}}

TASK_PRESETS: dict[str, dict[str, Preset]] = {
    TASK: {
        "paper": Preset(
            steps=({"lr_head": (0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3)},),
            fixed={"schedule": "poly"},
            source="Ha et al. (2024), hyperparameter details: upper rates of FT; its part on segmentation names none",
        ),
    },
}
