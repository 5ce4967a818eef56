"""Low-rank updates of linear maps (LoRA, Hu et al., 2022).

The update by itself, and its merged weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankUpdate:
    """Update W + (α/r)·B·A of some linear maps of a network, before it was merged."""

    rank: int
    """r."""
    alpha: float
    targets: tuple[str, ...]
    """Paths of the maps in the trial's model, such as `backbone.blocks.0.attn.qkv`."""
    tensors: Mapping[str, Tensor]
    """`<path>.lora_A` (r, in) and `<path>.lora_B` (out, r) of every target."""

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank

    def merged(self, target: str, weight: Tensor) -> Tensor:
        """Weight of a target with its update.

        Args:
            weight: (out, in), without it.
        """
        a = self.tensors[f"{target}.lora_A"].to(weight.device)
        b = self.tensors[f"{target}.lora_B"].to(weight.device)
        return merged_weight(weight, a, b, self.scale)


@torch.no_grad()
def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale·B·A, with the same bits everywhere.

    On every device and with any number of threads.

    Args:
        weight: W (out, in).
        a: A (r, in).
        b: B (out, r).
        scale: α/r.
    """
    # Rank by rank, in elementwise operations: a matrix product sums in an order that depends on device and threads,
    # and weights that were merged on a GPU could then not be restored bit for bit elsewhere.
    update = torch.zeros_like(weight)
    for row, column in zip(a, b.T, strict=True):
        update += column[:, None] * row
    return weight + update * scale
