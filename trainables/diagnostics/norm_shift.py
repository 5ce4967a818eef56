"""Shift of norm layers, and the Fine-tuning Shift Ratio (FSR).

Of the scale γ and the offset β. LayerNorm shift and FSR: Tan et al. (2025). The same measure of BatchNorm is Luthier's
addition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from timm.layers import (
    RmsNorm,
    RmsNorm2d,
    RmsNorm2dFp32,
    RmsNormFp32,
    SimpleNorm,
    SimpleNorm2d,
    SimpleNorm2dFp32,
    SimpleNormFp32,
)
from torch import Tensor, nn

from trainables.models.batch_norm import BATCH_NORMS
from trainables.models.task_model import TaskModel
from trainables.specs.measurements import Curve
from trainables.specs.metrics import BN_SHIFT, LN_SHIFT

LAYER_NORMS = (
    nn.LayerNorm,
    *(nn.RMSNorm, RmsNorm, RmsNormFp32, RmsNorm2d, RmsNorm2dFp32),
    *(SimpleNorm, SimpleNormFp32, SimpleNorm2d, SimpleNorm2dFp32),
)
"""Layers that normalise each sample (or token) over its channels, with their subclasses: all that timm calls LayerNorm
(on maps, in float32, with an activation behind it, without bias), and norms that only divide, by the root mean square
or the standard deviation: these have γ alone, so their shift of β is 0. A GroupNorm of a single group counts as well
(MetaFormer's "modified LayerNorm"); one of several groups, and EvoNorm, FRN and GRN, do not."""


@dataclass(frozen=True)
class LayerShift:
    """Shift of one norm layer."""

    gamma: float
    """‖γ_T − γ_S‖₂"""
    beta: float
    """‖β_T − β_S‖₂; 0 where the layer has no β."""

    @property
    def total(self) -> float:
        """γ shift + β shift."""
        return self.gamma + self.beta


@dataclass(frozen=True)
class NormShift:
    """Shift of a network's norm layers (Tan et al., 2025).

    Σ over layers of ‖p_T − p_S‖₂ for p in γ, β.
    """

    per_layer: Mapping[str, LayerShift]

    @property
    def gamma(self) -> float:
        """Σ ‖γ_T − γ_S‖₂"""
        # `fsum` rounds once, so that the sum does not depend on the order of the layers.
        return math.fsum(layer.gamma for layer in self.per_layer.values())

    @property
    def beta(self) -> float:
        """Σ ‖β_T − β_S‖₂"""
        return math.fsum(layer.beta for layer in self.per_layer.values())

    @property
    def total(self) -> float:
        """γ shift + β shift."""
        return self.gamma + self.beta

    def metrics(self, prefix: str) -> dict[str, float]:
        """Metrics `<prefix>/gamma`, `/beta` and `/total`."""
        return {f"{prefix}/{name}": getattr(self, name) for name in ("gamma", "beta", "total")}

    def curve(self) -> Curve:
        """Curve of both shifts per layer, in network order."""
        layers = self.per_layer
        return Curve(
            {
                "layer": list(layers),
                "gamma": [layer.gamma for layer in layers.values()],
                "beta": [layer.beta for layer in layers.values()],
            },
            "L2 norm of the change of γ and β.",
        )


def layer_norms(model: nn.Module) -> dict[str, nn.Module]:
    """LayerNorm-like layers with parameters, by name, in network order.

    Of a `TaskModel`, those of its backbone: norms in a task's head are new, so that no pretrained ones exist to be
    compared with.
    """
    layers = {n: m for n, m in model.named_modules() if _is_layer_norm(m) and _has_parameters(m)}
    if isinstance(model, TaskModel):
        layers = {name: layer for name, layer in layers.items() if name.startswith("backbone")}
    return layers


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """BatchNorm layers with parameters, by name, in network order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BATCH_NORMS) and _has_parameters(m)}


def norm_parameters(reference: nn.Module) -> set[str]:
    """Names of the parameters that `shift_report` compares, as in a task's model.

    Args:
        reference: the pretrained network.
    """
    layers = layer_norms(reference) | batch_norms(reference)
    return {
        f"backbone.{layer}.{name}" if layer else f"backbone.{name}"
        for layer, module in layers.items()
        for name, _ in module.named_parameters(recurse=False)
    }


def layer_norm_shift(source_state: Mapping[str, Tensor], tuned_model: nn.Module) -> NormShift:
    """LayerNorm shift of `tuned_model` from its source parameters.

    Args:
        source_state: source tensors by the names of `tuned_model.state_dict()`.

    Raises:
        ValueError: the model has no LayerNorm with parameters, or `source_state` lacks one or has it in another shape.
    """
    return _model_shift(source_state, tuned_model, layer_norms(tuned_model), "LayerNorm")


def batch_norm_shift(source_state: Mapping[str, Tensor], tuned_model: nn.Module) -> NormShift:
    """BatchNorm shift; arguments and errors as for `layer_norm_shift`."""
    return _model_shift(source_state, tuned_model, batch_norms(tuned_model), "BatchNorm")


def fine_tuning_shift_ratio(shift: float | NormShift, reference_shift: float | NormShift) -> float:
    """Fine-tuning Shift Ratio, FSR = Shift(T, S) / Shift(T*, S) (Tan et al., 2025).

    1 is ideal; below 1 the sample under-represents the target.

    Args:
        shift: shift of the model tuned on the sample: γ, β or their sum. A `NormShift` counts as its sum.
        reference_shift: shift of the reference, after the same number of steps of the same recipe.

    Raises:
        ValueError: the reference is zero, negative or not finite, or the shift is negative or not finite.
    """
    if isinstance(shift, NormShift):
        shift = shift.total
    if isinstance(reference_shift, NormShift):
        reference_shift = reference_shift.total
    if not (math.isfinite(reference_shift) and reference_shift > 0):
        raise ValueError(
            f"FSR needs a reference whose LayerNorm parameters moved, but its shift is {reference_shift!r}. Train the "
            "reference with a higher learning rate or for longer."
        )
    if not (math.isfinite(shift) and shift >= 0):
        raise ValueError(f"A LayerNorm shift is a finite number of at least 0, but got {shift!r}.")
    return shift / reference_shift


def shift_report(
    reference: nn.Module, start: Mapping[str, Tensor], kept: Mapping[str, Tensor], last: Mapping[str, Tensor]
) -> dict[str, float | Curve]:
    """Shift metrics and curves of a trial, for LayerNorm and BatchNorm.

    `<kind>/gamma`, `/beta` and `/total` belong to the best weights, before λ and WiSE-FT; those under `<kind>/last/` to
    the last unit, whichever unit was best: FSR compares these, at equal numbers of steps.

    Args:
        reference: the pretrained network.
        start: tensors that differ from it when training starts: of a converted BatchNorm the converted γ and β count.
        kept, last: tensors that training may have changed (best weights, last unit), by the classifier's names.
    """
    source = {f"backbone.{name}": value for name, value in reference.state_dict().items()} | dict(start)
    report: dict[str, float | Curve] = {}
    for prefix, layers in ((LN_SHIFT.group, layer_norms(reference)), (BN_SHIFT.group, batch_norms(reference))):
        if not layers:
            continue
        best_shift = _shift(source, {**source, **kept}, layers, "backbone.")
        last_shift = _shift(source, {**source, **last}, layers, "backbone.")
        report |= best_shift.metrics(prefix)
        report |= last_shift.metrics(f"{prefix}/last")
        report[prefix] = best_shift.curve()
    return report


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, LAYER_NORMS) or (isinstance(module, nn.GroupNorm) and module.num_groups == 1)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _model_shift(
    source: Mapping[str, Tensor], tuned: nn.Module, layers: Mapping[str, nn.Module], kind: str
) -> NormShift:
    if not layers:
        raise ValueError(f"A shift needs a network with {kind} layers, but this one has none.")
    return _shift(source, tuned.state_dict(), layers)


def _shift(
    source: Mapping[str, Tensor], tuned: Mapping[str, Tensor], layers: Mapping[str, nn.Module], prefix: str = ""
) -> NormShift:
    """Shift per layer; `prefix` precedes the layers' names in both states."""
    shifts = {}
    for name, layer in layers.items():
        norms = {"weight": 0.0, "bias": 0.0}  # RMS norms have no bias: their shift of β is 0
        for parameter, value in layer.named_parameters(recurse=False):
            key = f"{prefix}{name}.{parameter}" if name else f"{prefix}{parameter}"
            before = source.get(key)
            after = tuned[key]
            if before is None or before.shape != value.shape:
                got = "none" if before is None else f"one of shape {tuple(before.shape)}"
                raise ValueError(
                    f"A shift needs the source tensor {key!r} of shape {tuple(value.shape)}, but the source has {got}."
                )
            norms[parameter] = float((after.detach().double() - before.to(after.device).double()).norm())
        shifts[name] = LayerShift(norms["weight"], norms["bias"])
    return NormShift(shifts)
