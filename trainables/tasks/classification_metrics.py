"""What is measured on one split: accuracy, negative log-likelihood, calibration."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ECE_BINS = 15


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics of N predictions.

    Args:
        logits: (N, K) float.
        labels: (N,) int64.

    Returns:
        `acc` in [0, 1], `nll` in nats per sample, `ece` in [0, 1] (expected calibration error of the top class over 15
        equal bins of confidence, Guo et al. 2017).

    Raises:
        ValueError: no samples, or lengths that differ.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    if len(labels) == 0 or len(logits) != len(labels):
        raise ValueError(
            f"Metrics need one row of logits per label and at least one, but got {len(logits)} rows and "
            f"{len(labels)} labels."
        )
    finite = bool(torch.isfinite(logits).all())
    ece = multiclass_calibration_error(logits.float().softmax(1), labels, logits.shape[1], n_bins=ECE_BINS, norm="l1")
    return {
        "acc": float((logits.argmax(1) == labels).double().mean()),
        "nll": float(functional.cross_entropy(logits.double(), labels)),
        "ece": float(ece) if finite else float("nan"),
    }
