"""Where a tensor stands in a network: its kind of layer, its stage, and the blocks; by module walk, for any timm
network."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from trainables.models.batch_norm import BATCH_NORMS
from trainables.models.transformer_blocks import COMPONENTS, component_kinds

KINDS = ("embed", "attention", "mlp", "conv", "linear", "norm", "scale", "other", "head")
"""Kinds of layers: patch, position and token embeddings; attention (projections, position bias); the feed-forward part
of a block; other convolutions; other linear maps; normalisation (γ and β of any norm layer); learned scales such as
LayerScale; what is none of these; the classifier."""

CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_WEIGHTED = (*CONVOLUTIONS, nn.Linear)
_NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm, nn.GroupNorm)
_SCALE = re.compile(r"^(gamma(_?\d)?|ls\d?|layer_?scale\w*|skipinit_gain)$")
_CHANNEL_GATE = re.compile(r"^(se(module)?|squeezeexcite\w*|effectivesemodule|c?ecamodule|cbam\w*|gather\w*)$")
"""Gates over channels, which timm keeps under the name `attn` although they are no attention over tokens."""
_AROUND = (
    ("attention", re.compile(r"attn|attention|cpb|rel_pos")),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|swiglu")),
)
_EMBED = re.compile(r"embed|(^|_)(tokens?|pos)$")


def layer_kinds(backbone: nn.Module) -> dict[str, str]:
    """Parameter name → one of `KINDS` (never `head`), by the module that owns the parameter and those around it."""
    modules = dict(backbone.named_modules())
    return {name: _kind(name, modules) for name, _ in backbone.named_parameters()}


def fine_kinds(backbone: nn.Module) -> dict[str, str]:
    """As `layer_kinds`, but with the transformer's components by their own names (`ln1`, `mha`, `ln2`, `fc1`, `fc2`,
    `final_norm`) where they are defined."""
    kinds = layer_kinds(backbone)
    try:
        components = component_kinds(backbone)
    except ValueError:  # no transformer, or one whose blocks are made otherwise
        return kinds
    named = (*COMPONENTS, "final_norm")
    return {name: components[name] if components[name] in named else kind for name, kind in kinds.items()}


def statistics(backbone: nn.Module) -> dict[str, str]:
    """Name of every running statistic of BatchNorm → `bn_mean` or `bn_var`."""
    found: dict[str, str] = {}
    for prefix, module in backbone.named_modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
            start = f"{prefix}." if prefix else ""
            found |= {f"{start}running_mean": "bn_mean", f"{start}running_var": "bn_var"}
    return found


def blocks(backbone: nn.Module) -> dict[str, nn.Module]:
    """Name → block, in the order of the network: the innermost elements of its containers that hold two or more
    convolutions or linear maps (transformer blocks, residual blocks, dense blocks). A network that has none gives its
    children of that size (Inception), and one that has none of these either its convolutions and linear maps (VGG)."""
    found = _inner_blocks("", backbone, element=False)
    if not found:
        children = backbone.named_children()
        found = {name: child for name, child in children if _weighted(child) >= 2 and not _is_container(child)}
        if len(found) < 2:
            found = {name: module for name, module in backbone.named_modules() if isinstance(module, _WEIGHTED)}
    return found


def stages(backbone: nn.Module) -> dict[str, str]:
    """Name of every parameter and buffer → stage, in the order of the network: `stem`, the parts of the trunk by the
    network's own names (`blocks.3`, `layer1`, `stages.0`), and what follows it by its own name (`norm`)."""
    trunk = {name.partition(".")[0] for name in blocks(backbone)} - {"stem"}
    children = [name for name, _ in backbone.named_children()]
    stem = set(children[: min((i for i, name in enumerate(children) if name in trunk), default=0)])
    order = {name: i for i, name in enumerate(children)}
    names = [*dict(backbone.named_parameters()), *dict(backbone.named_buffers())]
    found = {}
    for name in sorted(names, key=lambda name: order.get(name.partition(".")[0], -1)):
        path = name.split(".")
        if len(path) == 1 or path[0] in stem:
            found[name] = "stem"
        elif trunk == {path[0]} and len(path) > 2:
            found[name] = f"{path[0]}.{path[1]}"  # one container: its elements are the stages
        else:
            found[name] = path[0]
    return found


def _is_container(module: nn.Module) -> bool:
    """Whether a module only strings others together, also where it is no `nn.Sequential` (the stages of RegNet)."""
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return True
    children = dict(module.named_children())
    numbered = len({type(child) for child in children.values()}) == 1 and all(name[-1].isdigit() for name in children)
    return numbered and not isinstance(module, nn.ModuleDict) and all(_weighted(c) >= 2 for c in children.values())


def _inner_blocks(name: str, module: nn.Module, element: bool) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    container = _is_container(module)
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        found |= _inner_blocks(path, child, element=container)
    if not found and element and not container and _weighted(module) >= 2:
        found[name] = module
    return found


def _weighted(module: nn.Module) -> int:
    return sum(isinstance(inner, _WEIGHTED) for inner in module.modules())


def _is_norm(module: nn.Module, attribute: str) -> bool:
    if isinstance(module, _WEIGHTED):
        return False
    named = type(module).__name__.lower()
    return isinstance(module, _NORMS) or ("norm" in named and "free" not in named) or attribute.startswith("norm")


def _kind(name: str, modules: Mapping[str, nn.Module]) -> str:
    *path, own = name.split(".")
    owner = modules[".".join(path)]
    if _is_norm(owner, path[-1] if path else ""):
        return "norm"
    if _SCALE.match(own) or type(owner).__name__ == "LayerScale":
        return "scale"
    around = [(part.lower(), type(modules[".".join(path[: i + 1])]).__name__.lower()) for i, part in enumerate(path)]
    if not any(_CHANNEL_GATE.match(kind) for _, kind in around):
        for attribute, kind in reversed(around):  # the innermost says most: an attention block may hold an MLP
            for found, pattern in _AROUND:
                if pattern.search(attribute) or pattern.search(kind):
                    return found
    if _EMBED.search(own) or any("embed" in attribute or "embed" in kind for attribute, kind in around):
        return "embed"
    if isinstance(owner, CONVOLUTIONS):
        return "conv"
    return "linear" if isinstance(owner, nn.Linear) else "other"
