"""Component tuning: which components of the transformer blocks move, and at which rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces._law import Law, Preset

_KINDS = ("ln1", "mha", "ln2", "fc1", "fc2")
_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def _is_auto(chosen: Mapping[str, Any]) -> bool:
    return chosen.get("kinds") in ("auto", ["auto"])


SPACE: dict[str, Law] = {
    # Single components as in the paper's experiments, the two and the three that it finds the most plastic together,
    # and those that this network's own plasticity names.
    "kinds": Law(
        default="auto",
        distribution=CategoricalDistribution(("auto", *_KINDS, "mha+fc1", "mha+fc1+fc2")),
        source="papers/003, finetuning: each component alone, with final norm and head",
    ),
    # All five together are everything but embedding and scales, which `full` is for.
    "k": Law(
        default=2,
        distribution=IntDistribution(1, 4),
        when=_is_auto,
        source="papers/003, contributions: attention and the first feed-forward layer are the components to choose",
    ),
    # Half a decade beyond the paper's rates at either end.
    "lr_backbone": Law(
        default=1e-2,
        distribution=FloatDistribution(3e-4, 0.1, log=True),
        source="papers/003, finetuning: 1e-3, 3e-3, 1e-2, 3e-2",
    ),
    # Relative, as in full.py.
    "lr_head": Law(
        default=10.0,
        distribution=FloatDistribution(0.1, 100.0, log=True),
        source="benchmarks/head_rate.py",
    ),
}

PRESETS: dict[str, Preset] = {
    "paper": Preset(
        steps=({"lr_backbone": _RATES},),
        fixed={"lr_head": None},
        source="papers/003, finetuning: one rate for component, final norm and head; SGD with momentum 0.9, clipped at "
        "1, cosine. Which components: those of the entry, else auto",
    ),
    "paper_each": Preset(
        steps=({"kinds": _KINDS, "lr_backbone": _RATES},),
        fixed={"lr_head": None},
        source="papers/003, finetuning: each component alone at each rate",
    ),
}
