"""Relative change of parameters and BatchNorm statistics, ‖W̃ − W‖₂ / ‖W‖₂.

Source: Ha et al. (2024), eq. 6 and Fig. 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainables.models.layer_types import layer_kinds, stages, statistics
from trainables.specs.measurements import Curve
from trainables.specs.metrics import CHANGE

NOTE = (
    "Relative change ‖W̃ − W‖₂ / ‖W‖₂ of each tensor, W its value before training (after a conversion); where absolute "
    "is 1, W was zero and the value is ‖W̃‖₂."
)
BY_STAGE_NOTE = "Mean relative change ‖W̃ − W‖₂ / ‖W‖₂ of the tensors of a stage, by kind of layer."


@dataclass(frozen=True)
class TensorChange:
    """Change of one tensor during training."""

    name: str
    kind: str
    """One of `trainables.models.layer_types.KINDS`, or `bn_mean`, `bn_var` for running statistics."""
    stage: str
    distance: float
    """‖W̃ − W‖₂."""
    reference: float
    """‖W‖₂."""

    @property
    def absolute(self) -> bool:
        """Whether `value` is the distance itself, because W is zero."""
        return self.reference == 0

    @property
    def value(self) -> float:
        """‖W̃ − W‖₂ / ‖W‖₂, or ‖W̃‖₂ where W is zero."""
        return self.distance if self.absolute else self.distance / self.reference


@torch.no_grad()
def parameter_change(backbone: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> list[TensorChange]:
    """Change of every parameter and of BatchNorm's running statistics, in network order.

    Args:
        backbone: the pretrained network: its structure names kinds and stages, and its values are W of every tensor
            that `start` lacks.
        start: tensors (by the classifier's names) that were not the pretrained ones when training began: the head, and
            whatever a strategy converted or initialised. W of DAFT is thus the value after its conversion.
        end: state dict of the tuned classifier, of the pretrained network's structure.

    Raises:
        ValueError: `end` lacks a tensor, or has one of another shape.
    """
    kinds = layer_kinds(backbone) | statistics(backbone)
    pretrained = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    # (name, kind, stage) of each tensor
    tensors = [(f"backbone.{name}", kinds[name], stage) for name, stage in stages(backbone).items() if name in kinds]
    # A task's head may count in integers (BatchNorm's batches): they have no relative change.
    head = [name for name, value in start.items() if name.startswith("head.") and value.is_floating_point()]
    tensors += [(name, "head", "head") for name in head]
    norms = []
    for name, _, _ in tensors:
        before = start[name] if name in start else pretrained[name]
        if name not in end or end[name].shape != before.shape:
            got = f"shape {tuple(end[name].shape)}" if name in end else "none of that name"
            raise ValueError(
                f"The tuned network must have the pretrained one's tensors, {name} of shape {tuple(before.shape)} "
                f"among them, but it has {got}. A strategy's finalize puts the structure back."
            )
        after = end[name]
        before = before.to(after.device)
        norms.append(torch.stack([_norm(after - before), _norm(before)]))
    # One transfer for all tensors: a `.tolist()` in the loop would synchronise with the device once per tensor.
    values = torch.stack(norms).tolist() if norms else []
    return [
        TensorChange(name, kind, stage, distance, reference)
        for (name, kind, stage), (distance, reference) in zip(tensors, values, strict=True)
    ]


def change_report(changes: list[TensorChange]) -> dict[str, float | Curve]:
    """Mean relative change by kind of layer, total change, and their curves.

    `change/<kind>`: mean over the kind's tensors of their relative change; tensors with W = 0 count only where the kind
    has no other (DAFT's head), as mean ‖W̃‖₂. `change/total`: ‖θ̃ − θ‖₂ / ‖θ‖₂ over all parameters of the backbone
    together. Curves: `change` (every tensor) and `change_by_stage`.
    """
    metrics: dict[str, float | Curve] = {}
    kinds = list(dict.fromkeys(change.kind for change in changes))
    for kind in kinds:
        metrics[CHANGE.of(kind)] = _mean(change for change in changes if change.kind == kind)
    backbone = [change for change in changes if change.kind not in ("head", "bn_mean", "bn_var")]
    # Norms of the tensors combine to the norm of all of them as one vector; `hypot` cannot overflow on the way.
    moved = math.hypot(*(change.distance for change in backbone))
    reference = math.hypot(*(change.reference for change in backbone))
    metrics[CHANGE.of("total")] = moved / reference if reference else moved
    metrics["change"] = Curve(
        {
            "tensor": [change.name for change in changes],
            "stage": [change.stage for change in changes],
            "kind": [change.kind for change in changes],
            "change": [change.value for change in changes],
            "absolute": [float(change.absolute) for change in changes],
        },
        NOTE,
    )
    cells: dict[tuple[str, str], list[TensorChange]] = {}
    for change in changes:
        cells.setdefault((change.stage, change.kind), []).append(change)
    rows = list(dict.fromkeys(change.stage for change in changes))
    by_kind = {kind: [_mean(cells[s, kind]) if (s, kind) in cells else None for s in rows] for kind in kinds}
    metrics["change_by_stage"] = Curve({"stage": rows, **by_kind}, BY_STAGE_NOTE)
    return metrics


def _norm(tensor: Tensor) -> Tensor:
    # Summed in float64: a sum of millions of squares loses digits in float32.
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm


def _mean(changes: Iterable[TensorChange]) -> float:
    group = list(changes)
    # Norms of tensors that were zero are no ratios: they count only where there is nothing else to average.
    relative = [change for change in group if not change.absolute] or group
    return sum(change.value for change in relative) / len(relative)
