"""Short trials of the tiny networks on the synthetic images, and comparisons of what they did.

The engine's class names stand here and nowhere else in the helpers: a test asks the fixture `make_trial` for a trial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.support.synthetic import MemoryStore, shapes
from trainables.engine.trial import Trial
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec

MakeLayerNormTrial = Callable[..., Trial]
"""`trial(kind="vit", epochs=2, **hparams)`"""

CLOCK = (
    "cost/unit_seconds", "cost/images_per_second", "cost/total_seconds", "cost/first_batch_seconds",
    "cost/peak_host_bytes", "cost/peak_gpu_bytes", "cost/cpu_use", "cost/host_bytes", "cost/gpu_use", "cost/gpu_bytes",
)  # fmt: skip
"""Metrics that measure time and memory: the only ones that may differ between two runs of one trial."""

LAYERNORM_RATES = {"lr_backbone": 0.1, "lr_head": 3.0}
"""Rates at which LayerNorm tuning learns the synthetic images within two units."""


class MakeTrial(Protocol):
    """The fixture `make_trial`."""

    def __call__(
        self,
        strategy: str,
        kind: str = "vit",
        *,
        seed: int = 0,
        held_out: str | None = None,
        store: MemoryStore | None = None,
        task: Mapping[str, Any] | None = None,
        **hparams: Any,
    ) -> Trial:
        """A trial that has not started.

        Args:
            strategy: name of a strategy.
            kind: `vit`, `cnn` or `hybrid`.
            seed: of the trial.
            held_out: OOD domain that is left out.
            store: images; the synthetic ones by default.
            task: settings shared by all trials that differ from two epochs in batches of 16.
            hparams: hyperparameters of the strategy.
        """


def trial_maker(network: Callable[[str], str], folder: Path) -> MakeTrial:
    """Trials on the CPU, whose caches lie in `folder`; `network` is the fixture.

    The device is the CPU on every machine: these tests compare bits, closed forms and float32 references, and a
    GPU computes in bfloat16 by default, in another order.
    """

    def make(
        strategy: str,
        kind: str = "vit",
        *,
        seed: int = 0,
        held_out: str | None = None,
        store: MemoryStore | None = None,
        task: Mapping[str, Any] | None = None,
        **hparams: Any,
    ) -> Trial:
        settings = {"store": "memory", "epochs": 2, "batch_size": 16, "cache": str(folder / "cache"), **(task or {})}
        shared = SharedTrialSettings(model=ModelSpec(name=network(kind)), **settings)
        spec = TrialSpec(shared=shared, strategy=strategy, hparams=hparams, seed=seed, held_out=held_out)
        return Trial(spec, store=store or shapes(), device="cpu")

    return make


def layernorm_trials(make_trial: MakeTrial) -> MakeLayerNormTrial:
    """Trials of LayerNorm tuning at rates that learn."""

    def make(kind: str = "vit", epochs: int = 2, **hparams: Any) -> Trial:
        return make_trial("layernorm", kind, task={"epochs": epochs}, **{**LAYERNORM_RATES, **hparams})

    return make


def history_of(run: Trial) -> list[dict[str, Any]]:
    """Metrics of every remaining unit."""
    history = []
    while not run.finished:
        history.append(run.step())
    return history


def finish(run: Trial) -> dict[str, Any]:
    """Metrics of the last unit."""
    return history_of(run)[-1]


def same_numbers(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    """Bit equality of two histories, clocks and peaks of memory aside."""
    return _without_clocks(a) == _without_clocks(b)


def _without_clocks(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in unit.items() if name not in CLOCK} for unit in history]


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit equality of two state dicts."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(before: Mapping[str, Tensor], run: Trial) -> set[str]:
    """Names of the tensors that are no longer the same bits, buffers included."""
    return {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}


def copies(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, detached from the network."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def source_of(run: Trial) -> dict[str, Tensor]:
    """The pretrained tensors by the classifier's names."""
    return {f"backbone.{name}": value for name, value in run.data.reference.state_dict().items()}
