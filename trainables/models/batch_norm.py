"""BatchNorm conversion of DAFT (Ha et al., 2024, eq. 3-5): target statistics, unchanged function."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainables.specs.metrics import BN_CONVERSION_LAYERS, BN_CONVERSION_RATIO, BN_CONVERSION_SHIFT

log = logging.getLogger("luthier")


BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Base classes of timm's BatchNorm layers; torch's lazy and quantised ones do not derive from these."""

CHUNK = 1 << 23
"""Activations that are converted to double precision at a time (bounds memory)."""


@dataclass(frozen=True)
class ConversionReport:
    """Result of a BatchNorm conversion."""

    layers: int
    """Converted BatchNorm layers; 0 = nothing to convert, the model is unchanged."""
    skipped: int
    """Unchanged BatchNorm layers: without γ and β of their own, without running statistics, or reached by no batch."""
    mean_shift: float
    """Mean over converted layers of ‖M_t − M_s‖₂ / ‖sqrt(Σ_s + ε)‖₂: relative distance of the target means."""
    variance_ratio: float
    """Geometric mean over channels of (Σ_t + ε) / (Σ_s + ε)."""

    def metrics(self) -> dict[str, float]:
        """Report by metric name."""
        return {
            BN_CONVERSION_LAYERS.name: float(self.layers),
            BN_CONVERSION_SHIFT.name: self.mean_shift,
            BN_CONVERSION_RATIO.name: self.variance_ratio,
        }


class _Moments:
    """Accumulated input statistics of one layer, in double precision."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.variance = torch.zeros_like(self.mean)
        self.weight = 0

    def add(self, inputs: Tensor) -> None:
        """Add a batch (N, C, …).

        Its mean, and its unbiased variance (factor m/(m−1) for its m elements).
        """
        reduced_dims = [d for d in range(inputs.ndim) if d != 1]
        count = inputs.numel() // inputs.shape[1]
        if count < 2:
            return  # one element has no variance
        width = max(1, CHUNK // count)
        # Along the channels, so that the moments of each chunk are final.
        chunks = torch.split(inputs.detach(), width, dim=1)
        moments = [torch.var_mean(chunk.to(torch.float64), reduced_dims, correction=1) for chunk in chunks]
        # Weighted by elements: a last, smaller batch must not count as much as a whole one.
        self.variance += count * torch.cat([variance for variance, _ in moments])
        self.mean += count * torch.cat([mean for _, mean in moments])
        self.weight += count


@torch.no_grad()
def convert_batch_norm(
    model: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor], object] | None = None
) -> ConversionReport:
    """Replace BatchNorm statistics by the target data's, preserving the function.

    γ and β are adapted so that the network in eval mode computes the same function as before (Ha et al., 2024, eq.
    3-5). In place; one pass over the data. A layer that is called several times in one forward pass gets the statistics
    over all its calls.

    Args:
        model: any module; its training mode is restored.
        batches: images (B, 3, H, W), already normalised, on the model's device; each batch's statistics count by its
            number of elements.
        forward: pass of images through the layers; None = the module itself. Layers that it does not reach stay.

    Returns:
        The conversion report. A model without BatchNorm (a vision transformer) is no error: nothing is converted.

    Raises:
        ValueError: there is BatchNorm but no batch of two or more elements, or activations are not finite.
    """
    batch_norms = [(name, module) for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
    layers = _convertible(batch_norms)
    if not layers:
        log.info(
            "The model has no BatchNorm layer to convert (%d with fixed form); the rest of DAFT still applies.",
            len(batch_norms),
        )
        return ConversionReport(0, len(batch_norms), 0.0, 1.0)
    moments = _collect(model, layers, batches, model if forward is None else forward)
    if not any(layer_moments.weight for layer_moments in moments.values()):
        raise ValueError("BatchNorm conversion needs at least one batch of two or more elements, but got none.")
    for name, layer_moments in moments.items():
        if not bool(torch.isfinite(layer_moments.mean).all() and torch.isfinite(layer_moments.variance).all()):
            where = name or "the model itself"
            raise ValueError(f"BatchNorm conversion needs finite activations, but the input of {where} has NaN or inf.")
    shifts = []
    ratios = []
    for name, layer in layers.items():
        if moments[name].weight:
            shift, ratio = _convert(layer, moments[name])
            shifts.append(shift)
            ratios.append(ratio)
    # By logarithms: the product over thousands of channels overflows.
    variance_ratio = float(torch.cat(ratios).log().mean().exp())
    return ConversionReport(
        layers=len(shifts),
        skipped=len(batch_norms) - len(shifts),
        mean_shift=sum(shifts) / len(shifts),
        variance_ratio=variance_ratio,
    )


def _convertible(layers: Iterable[tuple[str, BatchNorm]]) -> dict[str, BatchNorm]:
    """Layers with running statistics, and with γ and β that no other layer shares."""
    affine = {n: m for n, m in layers if m.running_mean is not None and m.weight is not None and m.bias is not None}
    # A shared γ or β cannot compensate two layers' different statistics.
    uses = Counter(id(tensor) for m in affine.values() for tensor in (m.weight, m.bias))
    return {n: m for n, m in affine.items() if uses[id(m.weight)] == uses[id(m.bias)] == 1}


def _collect(
    model: nn.Module,
    layers: Mapping[str, BatchNorm],
    batches: Iterable[Tensor],
    forward: Callable[[Tensor], object],
) -> dict[str, _Moments]:
    """Input statistics of each layer over one pass in eval mode."""
    moments = {name: _Moments(layer.num_features, layer.weight.device) for name, layer in layers.items()}

    def recorder(name: str) -> Callable[..., None]:
        return lambda module, inputs: moments[name].add(inputs[0])

    hooks = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    modes = {module: module.training for module in model.modules()}
    # In train mode the layers would normalise by the batch, so that later ones get other inputs.
    model.eval()
    try:
        for images in batches:
            forward(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return moments


def _convert(layer: BatchNorm, moments: _Moments) -> tuple[float, Tensor]:
    """Convert a layer in place; returns its mean shift and variance ratios (C,)."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    source_mean = layer.running_mean.double()
    source_variance = layer.running_var.double()
    gamma = layer.weight.double()
    beta = layer.bias.double()
    layer.running_mean.copy_(moments.mean / moments.weight)
    layer.running_var.copy_(moments.variance / moments.weight)
    # Computed from the statistics as stored, so that γ_t and β_t also compensate the rounding of M_t and Σ_t.
    mean = layer.running_mean.double()
    variance = layer.running_var.double()
    source_std = (source_variance + layer.eps).sqrt()
    std = (variance + layer.eps).sqrt()
    layer.weight.copy_(gamma * std / source_std)
    layer.bias.copy_(beta + gamma * (mean - source_mean) / source_std)
    shift = float((mean - source_mean).norm() / source_std.norm())
    return shift, (variance + layer.eps) / (source_variance + layer.eps)
