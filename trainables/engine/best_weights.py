"""Weights of a trial's network kept in memory.

The best unit's, and snapshots to restore from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainables.engine.contract import ParamGroup
from trainables.models.torch_internals import has_forward_hooks
from trainables.specs.metrics import TaskMetrics
from trainables.storage.checkpoint_format import bitwise_equal


@dataclass
class Best:
    """The unit with the best validation score so far.

    Ties go to the better tie-breaker, then to the earlier unit.
    """

    unit: int = 0
    """1-based; 0 = no unit is done."""
    value: float = math.nan
    """Selection metric on ID validation after `unit`, as recorded."""
    tie_breaker: float = math.nan
    """Tie-breaker on ID validation after `unit`, as recorded."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the movable tensors as they were after `unit`, by state-dict name."""

    def improved_by(self, value: float, tie_breaker: float, metrics: TaskMetrics) -> bool:
        """Whether a later unit with these scores replaces this one.

        Example:
            >>> from trainables.specs.metrics import CLASSIFICATION
            >>> Best(unit=1, value=0.9, tie_breaker=0.5).improved_by(0.9, 0.4, CLASSIFICATION)
            True
        """
        if self.unit == 0:
            return True
        # Strictly better: at a tie the earlier unit stays.
        return metrics.order(value, tie_breaker) > metrics.order(self.value, self.tie_breaker)


@dataclass(frozen=True)
class Snapshot:
    """A network's state, restorable bit for bit after a change.

    Keeps copies of the tensors that differ from the pretrained ones only, and of the modules references. So it costs
    what moved: nothing for a frozen network, a few hundred kB for LayerNorm tuning, once the weights for full
    fine-tuning.
    """

    modules: Mapping[nn.Module, Mapping[str, nn.Module]]
    """Module → its children by name."""
    tensors: Mapping[str, Tensor]
    """By state-dict name; all of them, those that nothing moved as the pretrained tensors themselves."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, pristine: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Snapshot:
        """Take the state of `model`.

        Args:
            pristine: the pretrained tensors by the model's names; never changed.
            kept: tensors that are kept anyhow, such as the best unit's: where one has the same bits it is not copied.
        """
        tensors: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            copies = (source[name] for source in (pristine, kept) if bitwise_equal(value, source.get(name)))
            copy = next(copies, None)
            tensors[name] = value.clone() if copy is None else copy
        return cls({module: dict(module.named_children()) for module in model.modules()}, tensors)

    def restore_modules(self) -> None:
        """Put every module back that was replaced by another one."""
        for module, children in self.modules.items():
            for name, child in children.items():
                if getattr(module, name) is not child:
                    setattr(module, name, child)

    def restore_tensors(self, model: nn.Module) -> None:
        """Write every tensor back, in place, once the modules are back."""
        put_back(model, self.tensors)


def movable_names(model: nn.Module, groups: Iterable[ParamGroup]) -> set[str]:
    """State-dict names of everything that training may change.

    Parameters of any group, all buffers, the head.

    Raises:
        ValueError: a group holds a parameter that is not the model's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # All buffers: BatchNorm's statistics move at every forward pass in train mode, though no group holds them.
    movable = {name for name, _ in model.named_buffers()} | {n for n in names.values() if n.startswith("head.")}
    for group in groups:
        for parameter in group.parameters:
            if id(parameter) not in names:
                raise ValueError(
                    f"Parameter groups must hold parameters of the model, but {group.name!r} has a foreign one of "
                    f"shape {tuple(parameter.shape)}."
                )
            movable.add(names[id(parameter)])
    # Buffers registered with `persistent=False` are in no state dict, and in no checkpoint.
    return movable & set(model.state_dict())


@torch.no_grad()
def take(model: nn.Module, names: Iterable[str], former: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Copies of the named tensors.

    Args:
        former: copies that are no longer needed, of the same tensors: they are written over.
    """
    state = model.state_dict()
    copies = {}
    # A set's order differs from process to process.
    for name in sorted(names):
        reusable = (former or {}).get(name)
        copies[name] = state[name].clone() if reusable is None else reusable.copy_(state[name])
    return copies


@torch.no_grad()
def changed_start(model: nn.Module, pristine: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what `prepare` changed of the pretrained network, and of the head.

    With `pristine` for all others, these are the weights that training starts from. Tensors that a strategy adds are no
    part of it.

    Args:
        pristine: the pretrained tensors by the classifier's names.
    """
    state = {k: v for k, v in model.state_dict().items() if k in pristine or k.startswith("head.")}
    return {name: value.clone() for name, value in state.items() if not bitwise_equal(value, pristine.get(name))}


@torch.no_grad()
def put_back(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into the model in place; the others stay.

    A name that the model lacks is a KeyError.
    """
    state = model.state_dict()
    for name, tensor in tensors.items():
        # The tensors of a state dict share the module's memory: writing into them changes the network.
        state[name].copy_(tensor)


def is_pristine(module: nn.Module, reference: nn.Module) -> bool:
    """Whether `module` still computes what `reference` does.

    Same layers in the same order, same bits, no hooks.
    """
    kinds = [(name, type(child)) for name, child in module.named_modules()]
    if kinds != [(name, type(child)) for name, child in reference.named_modules()]:
        return False
    # A hook changes what a module computes without changing its type or a tensor.
    if any(has_forward_hooks(child) for child in module.modules()):
        return False
    state, pristine = module.state_dict(), reference.state_dict()
    return state.keys() == pristine.keys() and all(bitwise_equal(state[name], pristine[name]) for name in state)
