"""Short LayerNorm trials on the tiny networks, and what changed in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.synthetic import shapes
from trainables.engine.trial import Run
from trainables.specs.trial_spec import ModelSpec, Task, TrialSpec

RATES = {"lr_backbone": 0.1, "lr_head": 3.0}
Trial = Callable[..., Run]
"""`trial(kind="vit", epochs=2, **hparams)`"""


def trials(network: Callable[[str], str], folder: Path) -> Trial:
    """Trials whose caches lie in `folder`; `network` is the fixture."""

    def make(kind: str = "vit", epochs: int = 2, **hparams: Any) -> Run:
        task = Task(store="m", model=ModelSpec(name=network(kind)), epochs=epochs, batch_size=16, cache=str(folder))
        spec = TrialSpec(task=task, strategy="layernorm", hparams={**RATES, **hparams})
        return Run(spec, store=shapes(), device="cpu")

    return make


def finish(run: Run) -> dict[str, Any]:
    """Metrics of the last unit."""
    metrics: dict[str, Any] = {}
    while not run.finished:
        metrics = run.step()
    return metrics


def changed(before: Mapping[str, Tensor], run: Run) -> set[str]:
    """Names of the tensors that are no longer the same bits."""
    return {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def source_of(run: Run) -> dict[str, Tensor]:
    """The pretrained tensors by the classifier's names."""
    return {f"backbone.{name}": value for name, value in run.data.reference.state_dict().items()}
