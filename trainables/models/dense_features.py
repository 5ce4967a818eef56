"""Feature maps of pretrained networks, for heads that predict at every pixel.

Maps are read through timm's `forward_intermediates`, from the network as it was loaded: names and shapes of its tensors
stay what they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor, nn

from trainables.models.timm_internals import map_strides

OUTPUT_STRIDE = 16
"""Stride of the deepest map of a dilated encoder (Chen et al., 2018)."""
_PROBE_SIDE = 256
"""Side at which strides 16 and 32 have maps of different and exact size."""


@dataclass(frozen=True)
class FeatureMap:
    """One map of a network."""

    index: int
    """Its number for `forward_intermediates`."""
    stride: int
    """Pixels of the image per pixel of the map."""
    channels: int


@dataclass(frozen=True)
class MapReader:
    """Which maps of a network are read, and how."""

    indices: tuple[int, ...]
    """Ascending, for `forward_intermediates`."""
    norm: bool
    """Apply the network's final norm to the maps."""

    def __call__(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) → maps (B, C, h, w), from fine to coarse."""
        maps: list[Tensor] = network.forward_intermediates(  # type: ignore[operator]
            images, indices=list(self.indices), norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )
        return maps


@torch.no_grad()
def feature_maps(network: nn.Module, side: int) -> list[FeatureMap]:
    """All maps that a network offers, from fine to coarse.

    Args:
        network: of timm, in eval mode; see `structure_of`.
        side: of its images, in pixels.

    Raises:
        ValueError: it offers none.
    """
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(
            f"Segmentation needs an encoder with feature maps, but timm's {type(network).__name__} gives none "
            "(it has no forward_intermediates). Choose another model."
        )
    strides = map_strides(network)
    maps = MapReader(tuple(range(len(strides))), norm=False)(network, _blank(network, side))
    return [
        FeatureMap(index, stride, int(values.shape[1]))
        for index, (stride, values) in enumerate(zip(strides, maps, strict=True))
    ]


def is_pyramid(maps: Sequence[FeatureMap]) -> bool:
    """Whether maps have several strides, as those of convolutional and hierarchical networks.

    All blocks of a plain transformer have the stride of its patches.
    """
    return len({one.stride for one in maps}) > 1


def unused_parameters(network: nn.Module, reader: MapReader, side: int) -> list[str]:
    """Names of the parameters that the maps do not depend on, such as a classifier's last convolution.

    Args:
        network: in eval mode; see `structure_of`.
        reader: of the maps.
        side: of the images, in pixels.
    """
    names, parameters = zip(*network.named_parameters(), strict=True)
    with torch.enable_grad():
        total = torch.stack([values.sum() for values in reader(network, _blank(network, side))]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]


@dataclass(frozen=True)
class Dilation:
    """Layers that replace the last stride of a convolutional network by dilation (Chen et al., 2018)."""

    strided: tuple[str, ...]
    """Names of convolutions and poolings that lose their stride."""
    dilated: tuple[str, ...]
    """Names of the convolutions behind them."""

    def apply(self, network: nn.Module) -> None:
        """Dilate a network in place.

        Its deepest map then has stride 16 rather than 32, from the same weights: at every second row and column it has
        the values of the map before, as long as no layer pools over the whole picture.
        """
        for name in self.strided:
            _without_stride(network, name)
        for name in self.dilated:
            _dilate(network, name)


@torch.no_grad()
def planned_dilation(structure: nn.Module, indices: Sequence[int]) -> Dilation:
    """Which layers of a network must change for the deepest map to have stride 16.

    Args:
        structure: see `structure_of`; it is dilated.
        indices: of the maps that are read.

    Raises:
        ValueError: its last stage is not made of convolutions and poolings, or does not take images of any side.
    """
    reader = MapReader(tuple(indices), norm=False)
    before = _PROBE_SIDE // OUTPUT_STRIDE
    after = before // 2
    try:
        calls = _spatial_calls(structure, reader)
        plan = Dilation(
            tuple(call.name for call in calls if call.input_side == before and call.output_side == after),
            tuple(call.name for call in calls if call.input_side == call.output_side == after and call.is_wide),
        )
        plan.apply(structure)
        side = reader(structure, _blank(structure, _PROBE_SIDE))[-1].shape[-1]
    # timm refuses a side by `assert` where it embeds patches.
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(_not_dilated(structure, str(error).rstrip("."))) from error
    if side != before:
        raise ValueError(_not_dilated(structure, f"its last map has a side of {side} at {_PROBE_SIDE} pixels"))
    return plan


def structure_of(network: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors are on the meta device: shapes without values."""
    tensors: dict[int, Tensor] = {id(b): b.to("meta") for b in network.buffers()}
    tensors |= {id(p): nn.Parameter(p.detach().to("meta")) for p in network.parameters()}
    # By `memo`: the copy takes these in place of copies of the values.
    return copy.deepcopy(network, tensors).eval()


@dataclass(frozen=True)
class _Call:
    """Call of a module without children on a map."""

    name: str
    module: nn.Module
    input_side: int
    output_side: int

    @property
    def is_wide(self) -> bool:
        """Whether it reads more than one position of its input at a time."""
        kernel = getattr(self.module, "kernel_size", 1)
        return (max(kernel) if isinstance(kernel, tuple) else int(kernel)) > 1


def _spatial_calls(network: nn.Module, reader: MapReader) -> list[_Call]:
    """Calls on maps (B, C, h, w), in the order of execution, each module once."""
    calls: dict[str, _Call] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            given = inputs[0] if inputs else None
            if not (isinstance(given, Tensor) and isinstance(output, Tensor)) or name in calls:
                return
            if given.ndim == output.ndim == 4:
                calls[name] = _Call(name, module, int(given.shape[-1]), int(output.shape[-1]))

        return record

    leaves = [(name, module) for name, module in network.named_modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(recorder(name)) for name, module in leaves]
    try:
        reader(network, _blank(network, _PROBE_SIDE))
    finally:
        for hook in hooks:
            hook.remove()
    return list(calls.values())


def _without_stride(network: nn.Module, name: str) -> None:
    module = network.get_submodule(name)
    if isinstance(module, nn.Conv2d):
        module.stride = (1, 1)
        if any(size % 2 == 0 for size in module.kernel_size):
            # Symmetric padding would lose a row and a column.
            module.padding = "same"
        return
    same = {nn.AvgPool2d: AvgPool2dSame, nn.MaxPool2d: MaxPool2dSame}.get(type(module))
    if same is None:
        raise ValueError(f"the stride of {name}, a {type(module).__name__}, cannot be taken away")
    # timm's own choice where it dilates such a layer; it has no tensors that would change their names.
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, same(module.kernel_size, stride=1))


def _dilate(network: nn.Module, name: str) -> None:
    module = network.get_submodule(name)
    if not isinstance(module, nn.Conv2d):
        raise ValueError(f"{name}, a {type(module).__name__}, cannot be dilated")
    module.dilation = tuple(2 * step for step in module.dilation)
    if not isinstance(module.padding, str):
        module.padding = tuple(2 * width for width in module.padding)


def _not_dilated(network: nn.Module, reason: str) -> str:
    return (
        f"The decoder deeplabv3plus dilates the last stage of a convolutional encoder, but that of "
        f"{type(network).__name__} cannot be: {reason}. Choose model.decoder: unet or fpn."
    )


def _blank(network: nn.Module, side: int) -> Tensor:
    parameter = next(network.parameters())
    return torch.zeros(1, 3, side, side, device=parameter.device, dtype=parameter.dtype)
