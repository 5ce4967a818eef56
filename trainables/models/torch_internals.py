"""Private names of torch, as read in torch 2.14; `tests/trainables/models/test_torch_internals.py` holds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a hook runs before or after the forward pass of this very module.

    torch has no public way to ask. Uses `_forward_hooks`, `_forward_pre_hooks`.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor: (n,), on the device of the tensors.

    The public `torch.linalg.vector_norm` takes one tensor at a time, on a GPU one kernel each, every step;
    `torch.nn.utils.get_total_norm`, which calls the same function, returns their total alone. Uses
    `torch._foreach_norm`.
    """
    return torch.stack(list(torch._foreach_norm(list(tensors))))
