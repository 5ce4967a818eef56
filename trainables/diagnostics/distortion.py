"""Feature distortion: per-image change of the pooled features by fine-tuning.

Source: Ha et al. (2024), Fig. 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainables.data.square_images import to_device
from trainables.specs.measurements import Curve
from trainables.specs.metrics import DISTORTION_COSINE, DISTORTION_L2, DISTORTION_QUANTILE

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData

MEANS = {"cosine": DISTORTION_COSINE, "l2": DISTORTION_L2}
QUANTILES = (0.05, 0.5, 0.95)
"""Recorded as metrics, `cosine_q05` and so on; all in `GRID`."""
GRID = tuple(round(0.05 * i, 2) for i in range(21))
"""Quantiles of the curve."""
NOTE = (
    "Quantiles over images of cosine similarity and L2 distance between pooled features of the pretrained and of the "
    "tuned network."
)


def feature_distortion(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Per-image cosine similarity and L2 distance.

    Equal rows give exactly 1 and exactly 0: all three products are sums of the same numbers in the same order, and the
    square root of a square is exact. A cosine needs two directions; where both features are zero nothing changed (1),
    where only one is, no direction was kept (0).

    Args:
        before, after: (N, D) features of the same N images.

    Returns:
        Two tensors (N,) float64 on the device of `after`.

    Raises:
        ValueError: the shapes differ.
    """
    if before.shape != after.shape or before.ndim != 2:
        raise ValueError(
            "Distortion compares two (N, D) sets of features of the same images, but got shapes "
            f"{tuple(before.shape)} and {tuple(after.shape)}."
        )
    a = before.to(after.device, torch.float64)
    b = after.double()
    a_squared = (a * a).sum(1)
    b_squared = (b * b).sum(1)
    scale = (a_squared * b_squared).sqrt()
    # Used only where the product is zero: equal norms are both zero there.
    both_zero = (a_squared == b_squared).double()
    # √(‖a‖²‖b‖²), not ‖a‖·‖b‖: for equal rows the root of a square is exact, so that the cosine is exactly 1.
    cosine = torch.where(scale == 0, both_zero, (a * b).sum(1) / scale)
    # Rounding can leave a cosine just outside [−1, 1].
    return cosine.clamp(-1, 1), torch.linalg.vector_norm(b - a, dim=1)


class FeatureDistortion:
    """Feature distortion per split, accumulated during the evaluation pass of the tuned network.

    The features before are those of the PRETRAINED backbone, from the shared cache, also for a strategy that converts
    the network first: the conversion of DAFT leaves the function as it is. They are float32; where the tuned network
    is scored in bfloat16, rounding alone moves features by about 1 % of their norm (cosine 0.9999).

    Args:
        data: the trial's.
    """

    def __init__(self, data: TrialData) -> None:
        self._data = data
        self._distances: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def watch(self, split: str) -> Callable[[Tensor], None]:
        """Callback that accumulates the distortion over one pass of a split.

        Takes the tuned features (B, D) of each batch, in the order of `data.batches`. A second pass over a
        split replaces the first. No batch synchronises with the device.
        """
        before = self._data.features(split)
        position = 0
        distances: list[tuple[Tensor, Tensor]] = []
        self._distances[split] = distances

        def add(after: Tensor) -> None:
            nonlocal position
            # Cached features are in the order of the batches.
            rows = to_device(before[position : position + len(after)], after.device)
            distances.append(feature_distortion(rows, after.detach()))
            position += len(after)

        return add

    def report(self) -> dict[str, float | Curve]:
        """Means and quantiles of the distortion per split, and their curve.

        Metrics `distortion/<split>/cosine` and `/l2` (means), `/cosine_q05`, `_q50`, `_q95`, and the same for L2;
        splits are `test` and `ood/<domain>`. The curve `distortion` has their quantiles in steps of 5 %.
        """
        metrics: dict[str, float | Curve] = {}
        columns: dict[str, list[float | str | None]] = {"quantile": list(GRID)}
        for split, batches in self._distances.items():
            for name, parts in zip(("cosine", "l2"), zip(*batches, strict=True), strict=True):
                values = torch.cat(parts).cpu().numpy()
                quantiles = dict(zip(GRID, np.quantile(values, GRID).tolist(), strict=True))
                metrics[MEANS[name].of(split)] = float(values.mean())
                for q in QUANTILES:
                    metrics[DISTORTION_QUANTILE.of(split, name, f"{100 * q:02.0f}")] = quantiles[q]
                columns[f"{split}/{name}"] = list(quantiles.values())
        if self._distances:
            metrics["distortion"] = Curve(columns, NOTE)
        return metrics
