"""Component tuning: which components of the transformer blocks are trained, and at which rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces import Hyperparameter, Preset
from search_spaces._segmentation import DECODER_RATE, TASK

_KINDS = ("ln1", "mha", "ln2", "fc1", "fc2")
_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def _is_auto(hparams: Mapping[str, Any]) -> bool:
    return hparams.get("kinds") in ("auto", ["auto"])


SPACE: dict[str, Hyperparameter] = {
    # Single components as in the paper's experiments; the two and the three that it finds most plastic; and auto: the
    # most plastic ones as measured on this network.
    "kinds": Hyperparameter(
        default="auto",
        distribution=CategoricalDistribution(("auto", *_KINDS, "mha+fc1", "mha+fc1+fc2")),
        source="Odonnat et al. (2026), finetuning: each component alone, with final norm and head",
    ),
    # All five together would train everything but embedding and scales: use `full` for that.
    "k": Hyperparameter(
        default=2,
        distribution=IntDistribution(1, 4),
        when=_is_auto,
        source="Odonnat et al. (2026), contributions: attention and the first feed-forward layer are the components "
        "to choose",
    ),
    # Half a decade beyond the paper's rates at either end.
    "lr_backbone": Hyperparameter(
        default=1e-2,
        distribution=FloatDistribution(3e-4, 0.1, log=True),
        source="Odonnat et al. (2026), finetuning: 1e-3, 3e-3, 1e-2, 3e-2",
    ),
    # Relative to the features' mean squared norm, as in full.py.
    "lr_head": Hyperparameter(
        default=10.0,
        distribution=FloatDistribution(0.1, 100.0, log=True),
        source="benchmarks/head_rate.py",
    ),
}

PRESETS: dict[str, Preset] = {
    "paper": Preset(
        steps=({"lr_backbone": _RATES},),
        fixed={"lr_head": None},
        source="Odonnat et al. (2026), finetuning: one rate for component, final norm and head; SGD with momentum "
        "0.9, clipped at 1, cosine. Which components: those of the entry, else auto",
    ),
    "paper_each": Preset(
        steps=({"kinds": _KINDS, "lr_backbone": _RATES},),
        fixed={"lr_head": None},
        source="Odonnat et al. (2026), finetuning: each component alone at each rate",
    ),
}

TASK_SPACES: dict[str, dict[str, Hyperparameter]] = {TASK: {**SPACE, "lr_head": DECODER_RATE}}
