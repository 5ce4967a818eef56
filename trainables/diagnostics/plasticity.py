"""Plasticity of the components of transformer blocks (papers/003, definition 1): how much a component's output changes
with its input.

    P(f) = E ‖f(x) − f(y)‖_F / ‖x − y‖_F

x: tokens (n × d) of an image like those of the pretraining, y: of a target image; Frobenius norm over tokens and
channels, mean over pairs. What x and y are is said by the probe:

- `embedding`, as the paper's reference code measures: every component of every block is applied directly to the token
  embeddings, that is to the tokens which enter the first block (with class and register tokens); FC2, whose input is
  wider, to the embeddings padded with zeros. Where tokens change their shape on the way (stages of Swin, class
  attention of CaiT), the tokens that enter the first block of a shape are the embeddings of all blocks of that shape.
- `in_situ`: the activations that really enter the component in the forward pass.

Attention in windows is measured as a function of all tokens of the image: windows are cut (and shifted) and put back.
Both networks' passes are one: a batch holds the x and the y of its pairs, and each component's rates are taken as the
forward pass reaches it, so that no activations are kept and memory does not grow with the number of pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainables.core.contract import Curve
from trainables.core.vit_blocks import COMPONENTS, find_blocks
from trainables.diagnostics.probing import Probes

PROBES = ("embedding", "in_situ")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NOTE = "Plasticity: mean rate of change of a component's output with its input. More plastic = adapts more."


@dataclass(frozen=True)
class PlasticityReport:
    """What was measured; components are `ln1, mha, ln2, fc1, fc2`."""

    probe: str
    pairs: int
    """Number of pairs of images."""
    blocks: list[str]
    """Names of the blocks, in the order of the network."""
    mean: dict[str, float]
    """Component → P, mean over blocks and pairs."""
    per_block: dict[str, list[float]]
    """Component → P of each block, mean over pairs."""
    distribution: dict[str, dict[str, float]]
    """Component → quantiles `q05, q25, q50, q75, q95` of the rates of change over blocks and pairs."""
    rank: list[str]
    """Components, the most plastic first."""

    def curve(self) -> Curve:
        """P per block: columns `block` and the components."""
        return Curve({"block": self.blocks, **self.per_block}, NOTE)

    def distribution_curve(self) -> Curve:
        """Quantiles of the rates: columns `component`, `q05` … `q95`; components by rank."""
        names = list(self.distribution[self.rank[0]])
        columns = {name: [self.distribution[kind][name] for kind in self.rank] for name in names}
        return Curve({"component": self.rank, **columns}, NOTE)

    def metrics(self) -> dict[str, float]:
        """`plasticity/<component>`, the mean over blocks and pairs."""
        return {f"plasticity/{kind}": self.mean[kind] for kind in COMPONENTS}

    def record(self) -> dict[str, float | Curve]:
        """Metrics, and the curves `plasticity` and `plasticity_distribution`, as a strategy's hooks return them."""
        return {
            **self.metrics(),
            "plasticity": self.curve(),
            "plasticity_distribution": self.distribution_curve(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `PlasticityReport(**values)` is the inverse."""
        return asdict(self)


def measure_plasticity(
    model: nn.Module,
    source_images: Tensor,
    target_images: Tensor,
    probe: Literal["embedding", "in_situ"] = "embedding",
    batch_size: int = 64,
) -> PlasticityReport:
    """Plasticity of a network over the pairs (source_images[i], target_images[i]).

    Args:
        model: any network of `trainables.core.vit_blocks.find_blocks`, or a `Classifier`; measured in eval mode without
            gradients, and left as it was.
        source_images: (N, 3, H, W), normalised; images like those of the pretraining.
        target_images: (N, 3, H, W), normalised; images of the target.
        probe: what x and y are, see the module.
        batch_size: pairs at a time; the result does not depend on it (to rounding).

    Raises:
        ValueError: no or unequally many images, images that do not differ, or a component is not defined.
    """
    if len(source_images) != len(target_images) or len(source_images) == 0:
        raise ValueError(
            "Plasticity is measured on pairs, so it needs as many source as target images and at least one of each, "
            f"but got {len(source_images)} and {len(target_images)}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but got {batch_size!r}.")
    starts = range(0, len(source_images), batch_size)
    pairs = ((source_images[i : i + batch_size], target_images[i : i + batch_size]) for i in starts)
    return measure_pairs(model, pairs, probe)


@torch.no_grad()
def measure_pairs(
    model: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], probe: Literal["embedding", "in_situ"] = "embedding"
) -> PlasticityReport:
    """As `measure_plasticity`, over batches of pairs that are made as they are needed.

    Args:
        pairs: batches (x, y) of (B, 3, H, W) each, B may differ from batch to batch.
    """
    if probe not in PROBES:
        raise ValueError(f"probe must be one of {', '.join(map(repr, PROBES))}, but got {probe!r}.")
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    found: list[NDArray[np.float64]] = []
    with _evaluation(model), Probes(blocks, embedding=probe == "embedding") as probes:
        for x, y in pairs:
            images = torch.cat([x, y]).to(device)
            found.append(probes.rates(lambda images=images: model(images), len(x)))  # type: ignore[misc]
    if not found:
        raise ValueError("Plasticity needs at least one pair of images, but got none.")
    return _report(probe, [block.name for block in blocks], np.concatenate(found, axis=2))


def _report(probe: str, blocks: Sequence[str], rates: NDArray[np.float64]) -> PlasticityReport:
    """Summary of rates (components, blocks, pairs), NaN where x and y were equal."""
    if np.isnan(rates).all(axis=2).any():
        raise ValueError(
            "Plasticity needs pairs of different images, but source and target images give the same tokens in every "
            "pair. Take them from different samples."
        )
    mean = {kind: float(np.nanmean(rates[i])) for i, kind in enumerate(COMPONENTS)}
    per_block = {kind: [float(v) for v in np.nanmean(rates[i], axis=1)] for i, kind in enumerate(COMPONENTS)}
    distribution = {
        kind: {f"q{round(100 * q):02d}": float(np.nanquantile(rates[i], q)) for q in QUANTILES}
        for i, kind in enumerate(COMPONENTS)
    }
    rank = sorted(COMPONENTS, key=lambda kind: -mean[kind])
    return PlasticityReport(probe, rates.shape[2], list(blocks), mean, per_block, distribution, rank)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode in full float32, undone at the end."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with (
            torch.autocast(device, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        for module in training:
            module.training = True
