"""Scores of a trial's model on the splits of its data, under the metric names of the record."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainables.data.trial_data import HELD_OUT
from trainables.engine.best_weights import is_pristine
from trainables.engine.loop import predict
from trainables.models.precision import resolve_precision

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData
    from trainables.models.backbone import Classifier


Watch = Callable[[str], Callable[[Tensor], None]]
"""Split → a function that takes the pooled features (B, D) of its batches, in order and without shuffling."""


def score(
    model: Classifier, data: TrialData, split: str, pristine: bool, watch: Callable[[Tensor], None] | None = None
) -> dict[str, float]:
    """`acc`, `nll` and `ece` of the model in eval mode on one split.

    Args:
        pristine: the backbone is bit for bit the pretrained one, so that its cached features serve.
        watch: sees the features (B, D) of the pass that gives the logits.
    """
    from trainables.tasks.classification_metrics import classification_metrics

    model.eval()
    if pristine:
        # `torch.tensor` copies into aligned memory: matrix products on mapped memory may round differently.
        features = torch.tensor(data.features(split)).to(data.device)
        if watch is not None:
            watch(features)
        with torch.no_grad():
            logits: Tensor = model.head(features).float().cpu()
        labels = torch.tensor(data.labels(split))
    else:
        dtype = resolve_precision(data.spec.task.precision, data.device)
        forward = model if watch is None else _watched(model, watch)
        logits, labels = predict(forward, data.batches(split), dtype)
    return {name: float(value) for name, value in classification_metrics(logits, labels).items()}


def validation_scores(model: Classifier, data: TrialData) -> dict[str, float]:
    """`val/acc` and `val/nll`."""
    values = score(model, data, "val", is_pristine(model.backbone, data.reference))
    return {"val/acc": values["acc"], "val/nll": values["nll"]}


def training_scores(model: Classifier, data: TrialData) -> dict[str, float]:
    """`train/loss` and `train/acc` of a closed-form solution, which has no training loss of its own."""
    values = score(model, data, "train", is_pristine(model.backbone, data.reference))
    return {"train/loss": values["nll"], "train/acc": values["acc"]}


def final_scores(model: Classifier, data: TrialData, watch: Watch | None = None) -> dict[str, float]:
    """ID test, calibration, every OOD domain with mean and worst accuracy, and the held-out domain if there is one.

    Args:
        watch: sees the features on ID test and OOD domains, of the same passes.
    """
    pristine = is_pristine(model.backbone, data.reference)
    test = score(model, data, "test", pristine, watch and watch("test"))
    found = {"test/acc": test["acc"], "test/nll": test["nll"], "calib/ece": test["ece"]}
    accuracies = []
    for domain in data.ood_domains:
        values = score(model, data, f"ood/{domain}", pristine, watch and watch(f"ood/{domain}"))
        found |= {f"ood/{domain}/{name}": values[name] for name in ("acc", "nll", "ece")}
        accuracies.append(values["acc"])
    if accuracies:
        found |= {"ood/mean/acc": sum(accuracies) / len(accuracies), "ood/worst/acc": min(accuracies)}
    if data.spec.held_out is not None:
        found["held_out/acc"] = score(model, data, HELD_OUT, pristine)["acc"]
    return found


def _watched(model: Classifier, watch: Callable[[Tensor], None]) -> Callable[[Tensor], Tensor]:
    def forward(images: Tensor) -> Tensor:
        features = model.features(images)
        watch(features)
        logits: Tensor = model.head(features)
        return logits

    return forward
