"""How a head starts: as drawn, at zero, or at the linear probe's solution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainables.core.probe import Probe, best_linear_probe

if TYPE_CHECKING:
    from trainables.core.backbone import Classifier
    from trainables.data.trial_data import TrialData


@torch.no_grad()
def initialise_head(model: Classifier, data: TrialData, how: str) -> dict[str, float]:
    """Set the head's weight (K, D) and bias (K,) in place; returns metrics to record (of the probe, else none).

    Args:
        how: `random` (left as drawn from the trial's seed), `zeros`, or `linear_probe`.
    """
    if how == "random":
        return {}
    if how == "zeros":
        model.head.weight.zero_()
        model.head.bias.zero_()
        return {}
    return take_probe(model, best_linear_probe(data))


@torch.no_grad()
def take_probe(model: Classifier, probe: Probe) -> dict[str, float]:
    """Copy a linear probe's solution into the head; returns the metrics that name it."""
    model.head.weight.copy_(torch.as_tensor(probe.weight))
    model.head.bias.copy_(torch.as_tensor(probe.bias))
    return {"linear_probe/C": probe.C, "linear_probe/val_acc": probe.val_accuracy}
