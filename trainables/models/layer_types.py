"""Layer kinds, stages and blocks of any timm network, determined by module walk."""

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
_ENCLOSING_KINDS = (
    ("attention", re.compile(r"attn|attention|cpb|rel_pos")),
    ("mlp", re.compile(r"mlp|ffn|feed_?forward|swiglu")),
)
_EMBED = re.compile(r"embed|(^|_)(tokens?|pos)$")


def layer_kinds(backbone: nn.Module) -> dict[str, str]:
    """Layer kind of each parameter: name → one of `KINDS` (never `head`).

    Decided by the module that owns the parameter and those around it.
    """
    modules = dict(backbone.named_modules())
    return {name: _kind(name, modules) for name, _ in backbone.named_parameters()}


def fine_kinds(backbone: nn.Module) -> dict[str, str]:
    """Layer kinds, refined to transformer components where these are defined.

    The components are `ln1`, `mha`, `ln2`, `fc1`, `fc2` and `final_norm`; all else is as in `layer_kinds`.
    """
    kinds = layer_kinds(backbone)
    try:
        components = component_kinds(backbone)
    except ValueError:  # no transformer, or one without separable components (fused blocks, BatchNorm)
        return kinds
    refined = (*COMPONENTS, "final_norm")
    return {name: components[name] if components[name] in refined else kind for name, kind in kinds.items()}


def statistics(backbone: nn.Module) -> dict[str, str]:
    """Running statistics of BatchNorm: name → `bn_mean` or `bn_var`."""
    kinds: dict[str, str] = {}
    for prefix, module in backbone.named_modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
            start = f"{prefix}." if prefix else ""
            kinds[f"{start}running_mean"] = "bn_mean"
            kinds[f"{start}running_var"] = "bn_var"
    return kinds


def blocks(backbone: nn.Module) -> dict[str, nn.Module]:
    """Blocks by name, in network order.

    The innermost elements of containers that hold two or more convolutions or linear maps (transformer blocks, residual
    blocks, dense blocks). Without any, the children of that size (Inception); without these either, the convolutions
    and linear maps themselves (VGG).
    """
    inner_blocks = _inner_blocks("", backbone, element=False)
    if inner_blocks:
        return inner_blocks
    children = {
        name: child for name, child in backbone.named_children() if _weighted(child) >= 2 and not _is_container(child)
    }
    if len(children) >= 2:
        return children
    return {name: module for name, module in backbone.named_modules() if isinstance(module, _WEIGHTED)}


def stages(backbone: nn.Module) -> dict[str, str]:
    """Stage of every parameter and buffer, in network order.

    `stem`, the parts of the trunk under the network's names (`blocks.3`, `layer1`, `stages.0`), and the modules behind
    it under theirs (`norm`).
    """
    trunk = {name.partition(".")[0] for name in blocks(backbone)} - {"stem"}
    children = [name for name, _ in backbone.named_children()]
    first_trunk = min((i for i, name in enumerate(children) if name in trunk), default=0)
    stem = set(children[:first_trunk])
    order = {name: i for i, name in enumerate(children)}
    names = [*dict(backbone.named_parameters()), *dict(backbone.named_buffers())]
    stage_by_name = {}
    # Parameters of the network itself (class token, position embeddings) are no child's: they sort first.
    for name in sorted(names, key=lambda name: order.get(name.partition(".")[0], -1)):
        path = name.split(".")
        if len(path) == 1 or path[0] in stem:
            stage_by_name[name] = "stem"
        elif trunk == {path[0]} and len(path) > 2:
            stage_by_name[name] = f"{path[0]}.{path[1]}"  # one container: its elements are the stages
        else:
            stage_by_name[name] = path[0]
    return stage_by_name


def _is_container(module: nn.Module) -> bool:
    """Whether a module only chains others, also without being an `nn.Sequential` (the stages of RegNet)."""
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return True
    children = dict(module.named_children())
    numbered = len({type(child) for child in children.values()}) == 1 and all(name[-1].isdigit() for name in children)
    return numbered and not isinstance(module, nn.ModuleDict) and all(_weighted(c) >= 2 for c in children.values())


def _inner_blocks(name: str, module: nn.Module, element: bool) -> dict[str, nn.Module]:
    inner: dict[str, nn.Module] = {}
    container = _is_container(module)
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        inner |= _inner_blocks(path, child, element=container)
    if not inner and element and not container and _weighted(module) >= 2:
        inner[name] = module
    return inner


def _weighted(module: nn.Module) -> int:
    """Number of convolutions and linear maps in a module."""
    return sum(isinstance(inner, _WEIGHTED) for inner in module.modules())


def _is_norm(module: nn.Module, attribute: str) -> bool:
    if isinstance(module, _WEIGHTED):
        return False
    class_name = type(module).__name__.lower()
    # "Normalization-free" networks (NFNet) have "norm" in class names that do not normalise.
    named_norm = "norm" in class_name and "free" not in class_name
    return isinstance(module, _NORMS) or named_norm or attribute.startswith("norm")


def _kind(name: str, modules: Mapping[str, nn.Module]) -> str:
    *path, leaf = name.split(".")
    owner = modules[".".join(path)]
    if _is_norm(owner, path[-1] if path else ""):
        return "norm"
    if _SCALE.match(leaf) or type(owner).__name__ == "LayerScale":
        return "scale"
    # (attribute, class name) of the modules around the parameter, outermost first, in lower case
    enclosing = []
    for depth, attribute in enumerate(path, start=1):
        module = modules[".".join(path[:depth])]
        enclosing.append((attribute.lower(), type(module).__name__.lower()))
    if not any(_CHANNEL_GATE.match(class_name) for _, class_name in enclosing):
        for attribute, class_name in reversed(enclosing):  # innermost first: an attention block may hold an MLP
            for kind, pattern in _ENCLOSING_KINDS:
                if pattern.search(attribute) or pattern.search(class_name):
                    return kind
    if _EMBED.search(leaf) or any("embed" in attribute or "embed" in class_name for attribute, class_name in enclosing):
        return "embed"
    if isinstance(owner, CONVOLUTIONS):
        return "conv"
    return "linear" if isinstance(owner, nn.Linear) else "other"
