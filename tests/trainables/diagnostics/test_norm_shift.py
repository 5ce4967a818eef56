"""Shifts against plain sums; FSR; which layers count."""

from __future__ import annotations

import copy
import inspect
import math
import re
from typing import Any

import pytest
import timm
import torch
from timm.layers import GroupNorm1, RmsNorm, norm, norm_act
from timm.layers.norm import RmsNormFp32
from timm.models.metaformer import LayerNorm2dNoBias
from torch import nn

from trainables.diagnostics.norm_shift import (
    batch_norm_shift,
    fine_tuning_shift_ratio,
    layer_norm_shift,
    layer_norms,
    shift_report,
)


def vit() -> nn.Module:
    model: nn.Module = timm.create_model("test_vit", num_classes=0)
    return model


def moved(model: nn.Module, kind: type[nn.Module] = nn.LayerNorm) -> nn.Module:
    """A copy whose norms' parameters differ by seeded noise."""
    generator = torch.Generator().manual_seed(0)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for layer in tuned.modules():
            if isinstance(layer, kind):
                for parameter in layer.parameters():
                    parameter += torch.randn(parameter.shape, generator=generator)
    return tuned


def test_the_shift_is_zero_at_initialisation() -> None:
    model = vit()
    shift = layer_norm_shift(copy.deepcopy(model.state_dict()), model)
    assert (shift.gamma, shift.beta, shift.total) == (0.0, 0.0, 0.0)
    assert list(shift.per_layer) == list(layer_norms(model))


def test_the_shift_is_the_sum_over_layers_of_l2_norms() -> None:
    model = vit()
    source = model.state_dict()
    tuned = moved(model)
    shift = layer_norm_shift(source, tuned)
    gamma = beta = 0.0
    for name, value in tuned.state_dict().items():
        if "norm" in name:
            length = math.sqrt(sum((a - b) ** 2 for a, b in zip(value.tolist(), source[name].tolist(), strict=True)))
            gamma, beta = (gamma + length, beta) if name.endswith("weight") else (gamma, beta + length)
    assert gamma > 0
    assert beta > 0
    assert shift.gamma == pytest.approx(gamma, rel=1e-6)
    assert shift.beta == pytest.approx(beta, rel=1e-6)
    assert shift.total == shift.gamma + shift.beta
    assert shift.metrics("ln_shift") == {
        "ln_shift/gamma": shift.gamma,
        "ln_shift/beta": shift.beta,
        "ln_shift/total": shift.total,
    }
    columns = shift.curve().columns
    assert list(columns) == ["layer", "gamma", "beta"]
    assert math.fsum(float(v) for v in columns["gamma"] if isinstance(v, float)) == shift.gamma


def test_batch_norm_has_the_same_measure_and_other_layers_do_not_count() -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    tuned = moved(model, nn.BatchNorm2d)
    with torch.no_grad():
        for layer in tuned.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight += 1.0
    shift = batch_norm_shift(model.state_dict(), tuned)
    layers = {name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert set(shift.per_layer) == layers
    for name in layers:
        expected = (tuned.state_dict()[f"{name}.weight"] - model.state_dict()[f"{name}.weight"]).norm()
        assert shift.per_layer[name].gamma == pytest.approx(float(expected), rel=1e-5)


def test_norms_of_every_kind_count_and_those_without_parameters_do_not() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.LayerNorm(4),
            "fixed": nn.LayerNorm(4, elementwise_affine=False),
            "no_beta": nn.LayerNorm(4, bias=False),
            "rms": RmsNorm(4),
            "torch_rms": nn.RMSNorm(4),
            "one_group": GroupNorm1(4),
            "groups": nn.GroupNorm(2, 4),
            "batch": nn.BatchNorm2d(4),
        }
    )
    shift = layer_norm_shift(model.state_dict(), moved(model, nn.Module))
    assert list(shift.per_layer) == ["plain", "no_beta", "rms", "torch_rms", "one_group"]
    assert shift.per_layer["rms"].beta == shift.per_layer["no_beta"].beta == 0.0
    assert shift.per_layer["plain"].total == shift.per_layer["plain"].gamma + shift.per_layer["plain"].beta


def test_all_that_timm_calls_layer_norm_or_rms_norm_counts() -> None:
    pattern = re.compile(r"^(LayerNorm|RmsNorm|SimpleNorm|GroupNorm1)")
    kinds: list[Any] = [
        kind
        for module in (norm, norm_act)
        for kind in vars(module).values()
        if inspect.isclass(kind) and kind.__module__ == module.__name__ and pattern.match(kind.__name__)
    ]
    assert len(kinds) > 16
    assert [kind.__name__ for kind in kinds if not layer_norms(nn.Sequential(kind(8)))] == []


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("test_vit", nn.LayerNorm),
        ("test_convnext", nn.LayerNorm),
        ("poolformer_s12", GroupNorm1),
        ("caformer_s18", LayerNorm2dNoBias),
        ("deepseek_vit_412m_enc", RmsNormFp32),
        ("aimv2_large_patch14_224", RmsNorm),
    ],
)
def test_networks_of_timm(name: str, layers: type[nn.Module]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    norms = layer_norms(model)
    assert norms.keys() >= {n for n, m in model.named_modules() if isinstance(m, layers) and list(m.parameters())}
    assert norms


def test_what_cannot_be_measured_is_refused() -> None:
    model = vit()
    with pytest.raises(ValueError) as error:
        layer_norm_shift({}, model)
    name = f"{next(iter(layer_norms(model)))}.weight"
    shape = tuple(model.state_dict()[name].shape)
    assert str(error.value) == f"A shift needs the source tensor {name!r} of shape {shape}, but the source has none."
    with pytest.raises(ValueError) as error:
        layer_norm_shift({}, nn.Linear(2, 2))
    assert str(error.value) == "A shift needs a network with LayerNorm layers, but this one has none."


def test_fsr() -> None:
    assert fine_tuning_shift_ratio(1.5, 1.5) == 1.0
    assert fine_tuning_shift_ratio(0.5, 2.0) == 0.25
    model = vit()
    shift = layer_norm_shift(model.state_dict(), moved(model))
    assert fine_tuning_shift_ratio(shift, shift) == fine_tuning_shift_ratio(shift.gamma, shift.gamma) == 1.0
    assert fine_tuning_shift_ratio(shift, 2 * shift.total) == 0.5
    with pytest.raises(ValueError) as error:
        fine_tuning_shift_ratio(shift, layer_norm_shift(model.state_dict(), model))
    assert str(error.value) == (
        "FSR needs a reference whose LayerNorm parameters moved, but its shift is 0.0. Train the reference with a "
        "higher learning rate or for longer."
    )
    with pytest.raises(ValueError) as error:
        fine_tuning_shift_ratio(math.nan, 1.0)
    assert str(error.value) == "A LayerNorm shift is a finite number of at least 0, but got nan."


def test_a_trials_report_is_measured_from_where_training_starts() -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    converted, tuned = moved(model, nn.BatchNorm2d), moved(moved(model, nn.BatchNorm2d), nn.BatchNorm2d)
    start = {f"backbone.{name}": value for name, value in converted.state_dict().items()}
    kept = {f"backbone.{name}": value for name, value in tuned.state_dict().items()}
    report = shift_report(model, start, kept, start)
    expected = batch_norm_shift(converted.state_dict(), tuned)
    assert report["bn_shift/total"] == pytest.approx(expected.total)
    assert report["bn_shift/last/total"] == 0.0
    assert not [name for name in report if name.startswith("ln_shift")]
