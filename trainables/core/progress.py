"""How far a unit of training has come, for a checkpoint in its middle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Progress:
    """How far a unit has come: sums over its images, which stay on the device."""

    loss_sum: Tensor
    """float64"""
    correct: Tensor
    """int64"""
    images: int = 0
    steps: int = 0

    @classmethod
    def none(cls, device: torch.device) -> Progress:
        """That of a unit which begins."""
        return cls(
            torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device)
        )

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        counts = torch.tensor([self.images, self.steps])
        return {"loss_sum": self.loss_sum, "correct": self.correct, "counts": counts}

    @classmethod
    def of(cls, state: Mapping[str, Tensor], device: torch.device) -> Progress:
        """From a checkpoint; the tensors are copied."""
        images, steps = state["counts"].tolist()
        loss_sum, correct = (state[name].to(device, copy=True) for name in ("loss_sum", "correct"))
        return cls(loss_sum, correct, images, steps)
