"""Gradient norms per kind of layer during training (per component in Odonnat et al., 2026), without device syncs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainables.models.layer_types import fine_kinds
from trainables.models.torch_internals import tensor_norms
from trainables.specs.metrics import GRAD_NORM

if TYPE_CHECKING:
    from trainables.models.task_model import TaskModel


class GradientNorms:
    """Mean over steps of ‖∂L/∂W_kind‖₂, all tensors of a kind as one vector.

    Call it once per step, between the backward pass and clipping. Sums stay on the device until `means`. One object
    serves one unit; `state` is for a checkpoint in the middle of it.

    Args:
        kinds: name → parameters that move; a parameter that has no gradient in a step counts as zero there.

    Raises:
        ValueError: no parameter at all.
    """

    def __init__(self, kinds: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self.kinds = [kind for kind, parameters in kinds.items() if parameters]
        self._parameters = [p for kind in self.kinds for p in kinds[kind]]
        if not self._parameters:
            raise ValueError("Gradient norms need at least one parameter that moves, but got none.")
        numbers = [i for i, kind in enumerate(self.kinds) for _ in kinds[kind]]
        device = self._parameters[0].device
        self._owner = torch.tensor(numbers, device=device)
        self._sums = torch.zeros(len(self.kinds), dtype=torch.float64, device=device)
        self._steps = 0

    @torch.no_grad()
    def __call__(self) -> None:
        """Take the norms of the gradients as they are now."""
        gradients = [p.grad for p in self._parameters]
        present = [g for g in gradients if g is not None]
        self._steps += 1
        if not present:
            return
        squares = tensor_norms(present).double().square()
        owner = self._owner
        if len(present) < len(gradients):
            owner = owner[[i for i, g in enumerate(gradients) if g is not None]]
        self._sums += torch.zeros_like(self._sums).index_add_(0, owner, squares).sqrt_()

    def means(self) -> dict[str, float]:
        """`grad_norm/<kind>`; waits for the device once. Empty before the first step."""
        if self._steps == 0:
            return {}
        values = (self._sums / self._steps).tolist()
        return {GRAD_NORM.of(kind): value for kind, value in zip(self.kinds, values, strict=True)}

    def state(self) -> dict[str, Tensor]:
        """Sums and number of steps so far."""
        return {"sums": self._sums, "steps": torch.tensor(self._steps)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self._sums = state["sums"].to(self._sums.device, copy=True)
        self._steps = int(state["steps"])


def moving_kinds(model: TaskModel, pretrained: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Kind (component of a transformer block, else kind of layer) → parameters of the classifier that need gradients.

    Args:
        pretrained: the backbone as it was before a strategy injected anything; what was injected has the kind of the
            layer that it was injected into, `other` outside of any layer.
    """
    kinds = {f"backbone.{name}": kind for name, kind in fine_kinds(pretrained).items()}
    layers = {name.rpartition(".")[0]: kind for name, kind in kinds.items() if name.count(".") > 1}
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            around = (layers[layer] for layer in _inside_out(name) if layer in layers)
            kind = "head" if name.startswith("head.") else kinds.get(name) or next(around, "other")
            found.setdefault(kind, []).append(parameter)
    return found


def _inside_out(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
