"""λ (papers/000): how much of the shift that tuning gave the norms is kept, and its choice on validation data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.core.scoring import validation_scores
from trainables.core.snapshot import put_back, take
from trainables.diagnostics.norm_shift import layer_norms

if TYPE_CHECKING:
    from trainables.core.backbone import Classifier
    from trainables.data.trial_data import TrialData

GRID = tuple(round(0.1 * k, 1) for k in range(21))
"""Values of λ that a sweep looks at: 0 (the source's γ) to 2 (twice the learned shift), 1 among them."""
FIT_STEPS, FIT_RATE = 100, 0.05
"""Adam steps and rate of a learned λ; one step sees one batch of the validation split."""

Rescale = Literal["gamma", "both"]
"""What λ scales: γ alone, so that β keeps its tuned value, or both."""


@torch.no_grad()
def rescale_layer_norm(
    model: nn.Module, source_state: Mapping[str, Tensor], lam: float | Tensor, rescale: Rescale = "gamma"
) -> None:
    """γ ← γ_S + λ·(γ_T − γ_S) in every LayerNorm, in place (papers/000); with `both`, β likewise.

    λ = 1 leaves every bit as it is, λ = 0 puts the source's bits back.

    Args:
        model: the tuned network.
        source_state: source tensors by the names of `model.state_dict()`.
        lam: one λ for all layers, or a tensor (L,) of one per layer in the order of the network.

    Raises:
        ValueError: λ is not finite, the network has no LayerNorm, or the source lacks one of its tensors.
    """
    names = scaled_names(model, rescale)
    values = torch.as_tensor(lam, dtype=torch.float64).expand(len(layer_norms(model))).tolist()
    if not all(map(math.isfinite, values)):
        raise ValueError(f"λ must be finite, but got {lam!r}.")
    parameters = dict(model.named_parameters())
    for (layer, group), value in zip(names.items(), values, strict=True):
        for name in group:
            if name not in source_state:
                raise ValueError(f"Rescaling needs the source tensor {name!r} of {layer}, but the source lacks it.")
            tuned, source = parameters[name], source_state[name].to(parameters[name].device)
            if value == 0:
                tuned.copy_(source)
            elif value != 1:
                tuned.copy_(source + value * (tuned - source))


def scaled_names(model: nn.Module, rescale: Rescale) -> dict[str, list[str]]:
    """Layer → names of its parameters that λ scales.

    Raises:
        ValueError: the network has no LayerNorm.
    """
    kinds = {"gamma": ("weight",), "both": ("weight", "bias")}[rescale]
    found = {
        layer: [
            f"{layer}.{kind}" if layer else kind for kind, _ in module.named_parameters(recurse=False) if kind in kinds
        ]
        for layer, module in layer_norms(model).items()
    }
    if not found:
        raise ValueError(
            "LayerNorm tuning needs a network with LayerNorm, but this one has none. For BatchNorm networks use daft, "
            "which adapts BatchNorm to the target data."
        )
    return found


def best_on_grid(model: Classifier, data: TrialData, source: Mapping[str, Tensor], rescale: Rescale) -> float:
    """The λ of `GRID` with the highest validation accuracy; ties go to the lower NLL, then to the λ nearest to 1. The
    model is left as it was found."""
    tuned, scores = take(model, source), {}
    for lam in GRID:
        rescale_layer_norm(model, source, lam, rescale)
        found = validation_scores(model, data)
        scores[lam] = (found["val/acc"], -found["val/nll"], -abs(lam - 1))
        put_back(model, tuned)
    return max(scores, key=lambda lam: scores[lam])


def fitted(
    model: Classifier, data: TrialData, source: Mapping[str, Tensor], rescale: Rescale, per_layer: bool
) -> Tensor:
    """λ (L,) per layer by Adam on the cross-entropy of ID validation, from 1, in eval mode; nothing else moves.

    Args:
        per_layer: one λ for every layer; False = one for all, repeated.
    """
    tuned, groups = take(model, source), list(scaled_names(model, rescale).values())
    lam = torch.ones(len(groups) if per_layer else 1, device=data.device, requires_grad=True)
    optimizer = torch.optim.Adam([lam], lr=FIT_RATE)
    model.eval()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    passes = math.ceil(FIT_STEPS / math.ceil(data.size("val") / data.spec.task.eval_batch_size))
    batches = (batch for _ in range(passes) for batch in data.batches("val"))
    for images, labels in islice(batches, FIT_STEPS):
        values = lam.expand(len(groups))
        scaled = {
            name: source[name] + values[i] * (tuned[name] - source[name])
            for i, names in enumerate(groups)
            for name in names
        }
        logits = torch.func.functional_call(model, {**state, **scaled}, (images,))
        loss = functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss, inputs=[lam])
        optimizer.step()
    return lam.detach().expand(len(groups)).double().cpu()
