"""Plasticity of transformer components: rate of change of the output with the input.

Definition 1 of Odonnat et al. (2026):

    P(f) = E ‖f(x) − f(y)‖_F / ‖x − y‖_F

x: tokens (n × d) of an image like those of the pretraining, y: of a target image; Frobenius norm over tokens and
channels, mean over pairs. The probe determines x and y:

- `embedding`, as the paper's reference code measures: every component of every block is applied directly to the token
  embeddings, that is to the tokens which enter the first block (with class and register tokens); FC2, whose input is
  wider, to the embeddings padded with zeros. Where tokens change their shape on the way (stages of Swin, class
  attention of CaiT), the tokens that enter the first block of a shape are the embeddings of all blocks of that shape.
- `in_situ`: the activations that enter the component in the forward pass.

Attention in windows is measured as a function of all tokens of the image: windows are cut (and shifted) and put back.
One forward pass serves both: a batch holds the x and the y of its pairs, and each component's rates are computed when
the pass reaches it, so that no activations are stored and memory does not grow with the number of pairs.

On a trial's data, the pretrained network's plasticity is measured once and cached; the tuned network's is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainables.diagnostics.probing import Probes
from trainables.models.transformer_blocks import COMPONENTS, find_blocks
from trainables.specs.measurements import Curve
from trainables.specs.metrics import PLASTICITY, ood
from trainables.storage.atomic_files import write_text
from trainables.storage.compute_once import compute_once

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData


PROBES = ("embedding", "in_situ")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NOTE = "Plasticity: mean rate of change of a component's output with its input. More plastic = adapts more."


@dataclass(frozen=True)
class PlasticityReport:
    """Measured plasticity of the components `ln1, mha, ln2, fc1, fc2`."""

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
        """Curve of P per block: columns `block` and the components."""
        return Curve({"block": self.blocks, **self.per_block}, NOTE)

    def distribution_curve(self) -> Curve:
        """Curve of the rates' quantiles: columns `component`, `q05` … `q95`; components by rank."""
        names = list(self.distribution[self.rank[0]])
        columns = {name: [self.distribution[kind][name] for kind in self.rank] for name in names}
        return Curve({"component": self.rank, **columns}, NOTE)

    def metrics(self) -> dict[str, float]:
        """Metrics `plasticity/<component>`, means over blocks and pairs."""
        return {PLASTICITY.of(kind): self.mean[kind] for kind in COMPONENTS}

    def record(self) -> dict[str, float | Curve]:
        """Metrics and the curves `plasticity` and `plasticity_distribution`."""
        return {
            **self.metrics(),
            "plasticity": self.curve(),
            "plasticity_distribution": self.distribution_curve(),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable values; `PlasticityReport(**values)` is the inverse."""
        return asdict(self)


def measure_plasticity(
    model: nn.Module,
    source_images: Tensor,
    target_images: Tensor,
    probe: Literal["embedding", "in_situ"] = "embedding",
    batch_size: int = 64,
) -> PlasticityReport:
    """Measure plasticity over the pairs (source_images[i], target_images[i]).

    Args:
        model: any network of `trainables.models.transformer_blocks.find_blocks`, or a `TaskModel`; measured in
            eval mode without gradients, and left unchanged.
        source_images: (N, 3, H, W), normalised; images like those of the pretraining.
        target_images: (N, 3, H, W), normalised; images of the target.
        probe: choice of x and y, see the module.
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
    """Measure plasticity over a stream of batches of pairs; see `measure_plasticity`.

    Args:
        pairs: batches (x, y) of (B, 3, H, W) each, B may differ from batch to batch.
    """
    if probe not in PROBES:
        raise ValueError(f"probe must be one of {', '.join(map(repr, PROBES))}, but got {probe!r}.")
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    rates: list[NDArray[np.float64]] = []  # (components, blocks, pairs) of each batch
    with _evaluation(model), Probes(blocks, embedding=probe == "embedding") as probes:
        for x, y in pairs:
            images = torch.cat([x, y]).to(device)
            rates.append(probes.rates(lambda images=images: model(images), len(x)))  # type: ignore[misc]
    if not rates:
        raise ValueError("Plasticity needs at least one pair of images, but got none.")
    return _report(probe, [block.name for block in blocks], np.concatenate(rates, axis=2))


def _report(probe: str, blocks: Sequence[str], rates: NDArray[np.float64]) -> PlasticityReport:
    """Summary of rates (components, blocks, pairs), NaN where x and y were equal."""
    if np.isnan(rates).all(axis=2).any():
        raise ValueError(
            "Plasticity needs pairs of different images, but source and target images give the same tokens in every "
            "pair. Take them from different samples."
        )
    # Without the pairs of equal tokens, which have no rate of change.
    mean = {kind: float(np.nanmean(rates[i])) for i, kind in enumerate(COMPONENTS)}
    per_block = {kind: [float(v) for v in np.nanmean(rates[i], axis=1)] for i, kind in enumerate(COMPONENTS)}
    distribution = {
        kind: {f"q{round(100 * q):02d}": float(np.nanquantile(rates[i], q)) for q in QUANTILES}
        for i, kind in enumerate(COMPONENTS)
    }
    # `sorted` is stable: ties keep the order of `COMPONENTS`, so the ranking is deterministic.
    rank = sorted(COMPONENTS, key=lambda kind: -mean[kind])
    return PlasticityReport(probe, rates.shape[2], list(blocks), mean, per_block, distribution, rank)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode in full float32 (no autocast, no TF32); restored on exit."""
    # By module: `train()` afterwards would wake modules that were in eval mode before.
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


log = logging.getLogger("luthier")

FORMAT = 2
"""Version of the measurement; increase on any change, so that older cached files are ignored."""
BATCH = 64
"""Pairs per forward pass."""


def plasticity_of(data: TrialData) -> PlasticityReport:
    """Plasticity of the pretrained network on the trial's images, cached.

    Probe, source and number of pairs are those of the trial's settings. Measured once per weights, data and settings,
    and kept in `data.solution_folder`.

    Raises:
        ValueError: the components are not defined for this network, the source is no OOD domain, or there are not
            enough images for a pair.
    """
    shared = data.spec.shared
    # The type of device belongs to the key: CPU and GPU kernels round differently.
    settings = [FORMAT, shared.plasticity_probe, shared.plasticity_source, shared.plasticity_pairs, data.device.type]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    file = data.solution_folder / f"plasticity-{name}.json"
    return compute_once(file, _load, lambda: plasticity_after(data.reference, data), _save)


def plasticity_after(model: nn.Module, data: TrialData) -> PlasticityReport:
    """Plasticity of a (tuned) network on the trial's pairs of images; not cached.

    Raises:
        ValueError: as `plasticity_of`.
    """
    return measure_pairs(model, image_pairs(data), data.spec.shared.plasticity_probe)


def image_pairs(data: TrialData) -> Iterator[tuple[Tensor, Tensor]]:
    """Lazy batches (x, y) of at most `BATCH` pairs of images (B, 3, H, W).

    `plasticity_pairs` in all, or as many as there are images for. y are training images of the trial. x are images of
    the domain `plasticity_source`, which should resemble the pretraining data, or, where it is None, other training
    images: no image is in two pairs.

    Raises:
        ValueError: the source is no OOD domain, or there are not enough images for a pair.
    """
    source = data.spec.shared.plasticity_source
    requested = data.spec.shared.plasticity_pairs
    if source is not None and source not in data.ood_domains:
        domains = ", ".join(data.ood_domains) or "none"
        raise ValueError(f"plasticity_source must be one of the OOD domains ({domains}), but got {source!r}.")
    if source is None:
        available = data.train_size // 2  # x and y both come from the training split
    else:
        available = min(data.train_size, data.size(ood(source)))
    if available == 0:
        raise ValueError(f"Plasticity needs two different images for a pair, but there are {data.train_size} to train.")
    # A generator of its own, so that the errors above are raised at the call and not at the first pair.
    return _batches(data, source, min(requested, available))


def _batches(data: TrialData, source: str | None, total: int) -> Iterator[tuple[Tensor, Tensor]]:
    if source is None:
        # The training split is stored in nested stratified order, so that neighbours are of different classes.
        neighbours = (images for images, _ in data.batches("train", batch_size=2 * BATCH))
        pairs = ((images[0::2], images[1::2]) for images in neighbours)
    else:
        source_batches = data.batches(ood(source), batch_size=BATCH)
        target_batches = data.batches("train", batch_size=BATCH)
        # Not strict: the shorter split ends the pairs.
        pairs = ((x, y) for (x, _), (y, _) in zip(source_batches, target_batches, strict=False))
    remaining = total
    for x, y in pairs:
        count = min(remaining, len(x), len(y))
        yield x[:count], y[:count]
        remaining -= count
        if remaining == 0:
            return


def _load(file: Path) -> PlasticityReport | None:
    try:
        return PlasticityReport(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    # TypeError: valid JSON with other fields.
    except (OSError, ValueError, TypeError) as error:
        log.warning("The stored plasticity %s is damaged (%s) and is measured again.", file, error)
        return None


def _save(report: PlasticityReport, file: Path) -> None:
    write_text(file, json.dumps(report.to_dict()))
