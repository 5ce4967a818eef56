"""Feature maps of timm's networks: their strides, dilation of the last stage, and what they do not depend on."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from trainables.models.dense_features import (
    Dilation,
    MapReader,
    feature_maps,
    is_pyramid,
    planned_dilation,
    structure_of,
    unused_parameters,
)


def network(name: str) -> nn.Module:
    """Random weights; BatchNorm with statistics and weights of its own, as in a trained network."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "side", "strides"),
    [
        ("test_resnet", 64, [2, 4, 8, 16, 32]),
        ("test_efficientnet", 64, [2, 4, 8, 16, 32]),
        ("test_convnext", 64, [4, 8, 16, 32]),
        ("test_vit", 160, [16] * 6),
    ],
)
def test_strides_are_those_of_the_maps(name: str, side: int, strides: list[int]) -> None:
    model = network(name)
    maps = feature_maps(structure_of(model), side)
    assert [one.stride for one in maps] == strides
    assert is_pyramid(maps) is (len(set(strides)) > 1)
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        computed = MapReader(tuple(one.index for one in maps), norm=False)(model, images)
    assert [values.shape[-1] for values in computed] == [side // stride for stride in strides]
    assert [values.shape[1] for values in computed] == [one.channels for one in maps]


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("test_resnet", 0),
        ("test_convnext", 0),  # even kernels
        ("resnet10t", 0),  # average pooling in its shortcuts
        ("mobilenetv2_035", 0),
        ("tf_mobilenetv3_small_minimal_100", 1),  # TensorFlow's padding is on the other side
    ],
)
def test_a_dilated_network_has_its_values_at_every_second_position(name: str, offset: int) -> None:
    """And the same tensors by the same names."""
    model = network(name)
    dilated = copy.deepcopy(model)
    index = feature_maps(structure_of(model), 64)[-1].index
    planned_dilation(structure_of(model), [index]).apply(dilated)
    assert {k: v.shape for k, v in dilated.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    reader = MapReader((index,), norm=False)
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = reader(model, images)[0]
        after = reader(dilated, images)[0]
    assert after.shape[-2:] == (8, 8)
    assert before.shape[-2:] == (4, 4)
    difference = (after[..., offset::2, offset::2] - before).abs().max()
    assert float(difference) <= 1e-4 * float(before.abs().max())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnetblur18", "the stride of layer4.0.aa, a BlurPool2d, cannot be taken away"),
        ("swin_tiny_patch4_window7_224", "Input height (256) doesn't match model (224)"),
    ],
)
def test_a_network_that_cannot_be_dilated_is_refused_with_the_way_out(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    with pytest.raises(ValueError) as error:
        planned_dilation(model, [feature_maps(model, 224)[-1].index])
    assert str(error.value) == (
        f"The decoder deeplabv3plus dilates the last stage of a convolutional encoder, but that of "
        f"{type(model).__name__} cannot be: {reason}. Choose model.decoder: unet or fpn."
    )


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("test_resnet", 64, []),
        ("test_vit", 160, []),
        ("test_efficientnet", 64, ["conv_head.weight", "bn2.weight", "bn2.bias"]),
        ("test_convnext", 64, ["head.norm.weight", "head.norm.bias"]),
    ],
)
def test_parameters_behind_the_last_map_are_unused(name: str, side: int, expected: list[str]) -> None:
    model = network(name)
    structure = structure_of(model)
    maps = feature_maps(structure, side)
    reader = MapReader(tuple(one.index for one in maps), norm=not is_pyramid(maps))
    assert unused_parameters(structure, reader, side) == expected


def test_a_structure_has_no_values_and_leaves_the_network_as_it_is() -> None:
    model = network("test_resnet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    structure = structure_of(model)
    assert all(tensor.is_meta for tensor in structure.state_dict().values())
    Dilation(("layer4.0.conv1",), ()).apply(structure)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.get_submodule("layer4.0.conv1").stride != (1, 1)


def test_a_network_without_maps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"timm's Linear gives none .* Choose another model\."):
        feature_maps(nn.Linear(2, 2), 8)
