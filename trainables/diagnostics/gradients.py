"""Gradient norms per kind of layer during training (Odonnat et al., 2026), without device syncs."""

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

    Call once per step, between the backward pass and clipping. Sums stay on the device until `means`. One instance per
    unit; `state` is for a checkpoint in the middle of a unit.

    Args:
        kinds: name → trainable parameters; one without a gradient in a step counts as zero in that step.

    Raises:
        ValueError: no parameter at all.
    """

    def __init__(self, kinds: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self.kinds = [kind for kind, parameters in kinds.items() if parameters]
        self._parameters = [p for kind in self.kinds for p in kinds[kind]]
        if not self._parameters:
            raise ValueError("Gradient norms need at least one parameter that moves, but got none.")
        kind_indices = [i for i, kind in enumerate(self.kinds) for _ in kinds[kind]]
        device = self._parameters[0].device
        self._kind_index = torch.tensor(kind_indices, device=device)
        self._sums = torch.zeros(len(self.kinds), dtype=torch.float64, device=device)
        self._steps = 0

    @torch.no_grad()
    def __call__(self) -> None:
        """Accumulate the norms of the current gradients."""
        gradients = [p.grad for p in self._parameters]
        present = [g for g in gradients if g is not None]
        self._steps += 1
        if not present:
            return
        # In float64: the square of a large float32 norm overflows.
        squares = tensor_norms(present).double().square()
        kind_index = self._kind_index
        if len(present) < len(gradients):
            kind_index = kind_index[[i for i, g in enumerate(gradients) if g is not None]]
        # The root is taken per step: the mean of norms, not the norm of a mean.
        self._sums += torch.zeros_like(self._sums).index_add_(0, kind_index, squares).sqrt_()

    def means(self) -> dict[str, float]:
        """Mean norms `grad_norm/<kind>`; one device synchronisation. Empty before the first step."""
        if self._steps == 0:
            return {}
        values = (self._sums / self._steps).tolist()
        return {GRAD_NORM.of(kind): value for kind, value in zip(self.kinds, values, strict=True)}

    def state(self) -> dict[str, Tensor]:
        """Running sums and number of steps."""
        return {"sums": self._sums, "steps": torch.tensor(self._steps)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the sums that `state` returned."""
        # A copy: the sums grow in place, which would change the caller's checkpoint.
        self._sums = state["sums"].to(self._sums.device, copy=True)
        self._steps = int(state["steps"])


def moving_kinds(model: TaskModel, pretrained: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by kind: component of a transformer block, else kind of layer.

    Args:
        pretrained: the backbone before a strategy injected modules; injected parameters (LoRA) get the kind of the
            layer around them, `other` outside of any layer.
    """
    kinds = {f"backbone.{name}": kind for name, kind in fine_kinds(pretrained).items()}
    layers = {name.rpartition(".")[0]: kind for name, kind in kinds.items() if name.count(".") > 1}
    trainable: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("head."):
            kind = "head"
        elif name in kinds:
            kind = kinds[name]
        else:
            # Injected: no parameter of the pretrained network has this name, but a module around it does.
            kind = next((layers[path] for path in _enclosing_modules(name) if path in layers), "other")
        trainable.setdefault(kind, []).append(parameter)
    return trainable


def _enclosing_modules(name: str) -> Iterator[str]:
    """Paths of the modules around a parameter, innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
