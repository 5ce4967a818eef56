"""DAFT, domain-aware fine-tuning (Ha, Jeong & Lee 2024, papers/002): BatchNorm layers are converted to the statistics
of the target data, the head starts from zero, backbone and head move together at rates of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainables.core.contract import Strategy, TrainingConfig
from trainables.core.head import initialise_head

if TYPE_CHECKING:
    from trainables.core.backbone import Classifier
    from trainables.data.trial_data import TrialData

log = logging.getLogger("luthier")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did."""

    layers: int
    """Converted BatchNorm layers; 0 = the model has none and is unchanged."""
    mean_shift: float
    """Mean over layers of ‖M_t − M_s‖₂ / ‖sqrt(Σ_s + ε)‖₂: how far the target's means lie from the source's."""
    variance_ratio: float
    """Geometric mean over channels of (Σ_t + ε) / (Σ_s + ε)."""

    def metrics(self) -> dict[str, float]:
        """The report under the names of the record."""
        return {
            "bn_conversion/layers": float(self.layers),
            "bn_conversion/mean_shift": self.mean_shift,
            "bn_conversion/variance_ratio": self.variance_ratio,
        }


class _Moments:
    """Sums over batches of one layer's input statistics, in double precision."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self.variance = torch.zeros_like(self.mean)
        self.weight = 0

    def add(self, inputs: Tensor) -> None:
        """Take in one batch (N, C, …): its mean, and its variance corrected by m/(m−1) for its own m."""
        over = [d for d in range(inputs.ndim) if d != 1]
        values = inputs.detach().to(torch.float64)
        count = values.numel() // values.shape[1]
        if count < 2:
            return  # one element has no variance
        # Weighted by elements: a last, smaller batch must not count as much as a whole one.
        self.mean += count * values.mean(over)
        self.variance += count * values.var(over, correction=1)
        self.weight += count


@torch.no_grad()
def convert_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> ConversionReport:
    """Replace every BatchNorm's statistics by those of the target data, and its γ, β so that the network in eval mode
    computes the same function as before (papers/002, eq. 3-5). In place; one pass over the data.

    Args:
        model: any module; its training mode is left as it was.
        batches: images (B, 3, H, W), already normalised, on the model's device.

    Returns:
        What was converted; no BatchNorm layer is no error (a vision transformer has none).

    Raises:
        ValueError: a BatchNorm without running statistics or without γ, β, which cannot be converted; or no batch.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not layers:
        log.info("The model has no BatchNorm layer: there is nothing to convert, the rest of DAFT still applies.")
        return ConversionReport(0, 0.0, 1.0)
    for name, layer in layers.items():
        if layer.running_mean is None or layer.weight is None:
            raise ValueError(
                f"BatchNorm conversion needs running statistics, gamma and beta, but layer {name!r} lacks them. "
                "Set bn_conversion: false."
            )
    moments = _collect(model, layers, batches)
    shifts, ratios = [], []
    for name, layer in layers.items():
        if moments[name].weight:
            shift, ratio = _convert(layer, moments[name])
            shifts.append(shift)
            ratios.append(ratio)
    if not shifts:
        raise ValueError("BatchNorm conversion needs at least one batch of two or more elements, but got none.")
    return ConversionReport(len(shifts), sum(shifts) / len(shifts), float(torch.cat(ratios).log().mean().exp()))


def _collect(model: nn.Module, layers: Mapping[str, _BatchNorm], batches: Iterable[Tensor]) -> dict[str, _Moments]:
    moments = {name: _Moments(layer.num_features, layer.running_mean.device) for name, layer in layers.items()}

    def recorder(name: str) -> Callable[..., None]:
        return lambda module, args: moments[name].add(args[0])

    hooks = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        for images in batches:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return moments


def _convert(layer: _BatchNorm, moments: _Moments) -> tuple[float, Tensor]:
    mean, variance = moments.mean / moments.weight, moments.variance / moments.weight
    source_mean, source_variance = layer.running_mean.double(), layer.running_var.double()
    gamma, beta = layer.weight.double(), layer.bias.double()
    source_std, std = (source_variance + layer.eps).sqrt(), (variance + layer.eps).sqrt()
    layer.weight.copy_(gamma * std / source_std)
    layer.bias.copy_(beta + gamma * (mean - source_mean) / source_std)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)
    shift = float((mean - source_mean).norm() / source_std.norm())
    return shift, (variance + layer.eps) / (source_variance + layer.eps)


def convert_on_training_data(model: Classifier, data: TrialData) -> dict[str, float]:
    """Convert a trial's backbone on its training batches; returns the report's metrics."""
    model.backbone.eval()
    batches = (images for images, _ in data.batches("train", batch_size=data.spec.task.batch_size))
    return convert_batch_norm(model.backbone, batches).metrics()


class Daft(Strategy):
    """Integrated LP-FT with BatchNorm conversion; `bn_conversion: false` is the ablation "Integrated LP-FT"."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        """DAFT's row of papers/002, Table 1."""

        lr_head: float | None = 1.0
        head_init: Literal["random", "zeros", "linear_probe"] = "zeros"
        bn_conversion: bool = True

    def prepare(self, model: Classifier, data: TrialData) -> Mapping[str, float]:
        """Convert BatchNorm, then initialise the head."""
        report = convert_on_training_data(model, data) if self.config.bn_conversion else {}
        return {**report, **initialise_head(model, data, self.config.head_init)}


STRATEGY = Daft
