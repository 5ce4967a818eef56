"""The best unit of a trial, kept in memory as the tensors that may have moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainables.engine.contract import ParamGroup
from trainables.storage.checkpoint_format import bitwise_equal


@dataclass
class Best:
    """The unit with the highest validation accuracy; ties go to the lower NLL, then to the earlier unit."""

    unit: int = 0
    accuracy: float = float("-inf")
    nll: float = float("inf")
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the movable tensors as they were after `unit`, by state-dict name."""

    def improved_by(self, accuracy: float, nll: float) -> bool:
        """Whether a later unit with these figures takes the place of this one."""
        return (accuracy, -nll) > (self.accuracy, -self.nll)


def movable_names(model: nn.Module, groups: Iterable[ParamGroup]) -> set[str]:
    """State-dict names of everything that training may change: parameters of any group, all buffers, the head.

    Raises:
        ValueError: a group holds a parameter that is not the model's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    movable = {name for name, _ in model.named_buffers()} | {n for n in names.values() if n.startswith("head.")}
    for group in groups:
        for parameter in group.parameters:
            if id(parameter) not in names:
                raise ValueError(
                    f"Parameter groups must hold parameters of the model, but {group.name!r} has a foreign one of "
                    f"shape {tuple(parameter.shape)}."
                )
            movable.add(names[id(parameter)])
    return movable & set(model.state_dict())


@torch.no_grad()
def take(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the named tensors."""
    state = model.state_dict()
    return {name: state[name].clone() for name in sorted(names)}


@torch.no_grad()
def changed_start(model: nn.Module, pristine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the head's tensors, and of those of the pretrained network that a strategy's `prepare` changed: with
    `pristine` for all others, the weights that training starts from. Tensors that a strategy adds are no part of it.

    Args:
        pristine: the pretrained tensors by the classifier's names.
    """
    state = {k: v for k, v in model.state_dict().items() if k in pristine or k.startswith("head.")}
    return {name: value.clone() for name, value in state.items() if not bitwise_equal(value, pristine.get(name))}


@torch.no_grad()
def put_back(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into the model in place; the others stay. A name that the model lacks is a KeyError."""
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


def is_pristine(module: nn.Module, reference: nn.Module) -> bool:
    """Whether `module` still computes what `reference` does: same layers in the same order, same bits, no hooks."""
    kinds = [(name, type(child)) for name, child in module.named_modules()]
    if kinds != [(name, type(child)) for name, child in reference.named_modules()]:
        return False
    if any(child._forward_hooks or child._forward_pre_hooks for child in module.modules()):
        return False
    state, pristine = module.state_dict(), reference.state_dict()
    return state.keys() == pristine.keys() and all(bitwise_equal(state[name], pristine[name]) for name in state)
