"""A pretrained backbone under the head that a task builds."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn


class TaskModel(nn.Module):
    """Backbone and head, apart for every family: tensors are named `backbone.*` and `head.*`.

    A task that reads dense features, or whose head sees the targets while it trains (teacher forcing), overrides
    `features` and `outputs`. Everything that it adds to the pretrained network belongs to `head`.

    Args:
        backbone: images (B, 3, H, W) → pooled features (B, D).
        head: features → outputs.
    """

    pooled: ClassVar[bool] = True
    """Whether `features` are the backbone's pooled output (B, D) and nothing else. Cached pretrained features, feature
    distortion and closed-form probes need it."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        # Any: a strategy or a probe may know more of its task's head (weight, bias) than nn.Module declares.
        self.head: Any = head

    @property
    def unused(self) -> frozenset[str]:
        """Names of parameters that outputs do not depend on; they neither train nor count."""
        return frozenset()

    def features(self, images: Tensor) -> Any:
        """Images (B, 3, H, W) → features: (B, D) where `pooled`, else what `outputs` takes."""
        return self.backbone(images)

    def outputs(self, features: Any, targets: Tensor | None = None) -> Tensor:
        """Features → what the task's loss takes.

        Args:
            targets: those of the batch while training, for heads that need them; None in an evaluation.
        """
        outputs: Tensor = self.head(features)
        return outputs

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) → what the task's loss takes; `targets` as for `outputs`."""
        return self.outputs(self.features(images), targets)
