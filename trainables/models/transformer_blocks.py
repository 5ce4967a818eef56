"""Components of transformer blocks: LN1, MHA, LN2, FC1 and FC2 of every block (Odonnat et al., 2026), by module walk.

A block is a module that holds attention and a feed-forward part of linear maps side by side, each with a LayerNorm of
its own, whatever they are called: before it (pre-norm) or, where there is none, after it (post-norm). That finds the
blocks of every ViT-like family of timm. Where the components are not defined – attention and feed-forward fused in one
projection, BatchNorm in place of LayerNorm, a norm inside the attention, attention without a feed-forward part – it is
a ValueError that says so; a network is never resolved in part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from trainables.models.batch_norm import BATCH_NORMS
from trainables.models.task_model import TaskModel
from trainables.models.timm_internals import is_attention, is_attention_pooling, is_fused_block, windowed_attention

COMPONENTS = ("ln1", "mha", "ln2", "fc1", "fc2")
"""Attention norm, attention with its projections, feed-forward norm, first and second linear layer."""
KINDS = (*COMPONENTS, "final_norm", "embed", "head", "other")
"""What `component_kinds` calls a parameter: a component; the LayerNorm after the last block; what comes before the
first block; the classifier; the rest (LayerScale, sub-norms, downsampling, convolutional stages)."""


@dataclass(frozen=True)
class Block:
    """One transformer block; tokens are (B, n, d), (B, H, W, d), or (B, d, H, W) where the maps are 1x1 convolutions.

    Blocks with several attentions side by side (parallel ViTs, TNT) count as several.
    """

    name: str
    """Dotted path in the network; several blocks of one module share it up to `[i]`."""
    module: nn.Module
    """What the forward pass calls."""
    ln1: nn.Module
    mha: nn.Module
    ln2: nn.Module
    fc1: tuple[nn.Module, ...]
    """All maps into the hidden width: one, or gate and value where a gated unit keeps them apart."""
    fc2: nn.Module

    def component(self, kind: str) -> tuple[nn.Module, ...]:
        """The modules of one of `COMPONENTS`."""
        found = getattr(self, kind)
        return found if isinstance(found, tuple) else (found,)

    def attention(self) -> tuple[nn.Module, str]:
        """Owner and name of the function from an image's tokens to the output of its attention: `mha.forward`, or the
        block's own method that cuts windows (and shifts them) around it."""
        windowed = windowed_attention(self.module)
        return (self.mha, "forward") if windowed is None else (self.module, windowed)


def find_blocks(network: nn.Module) -> list[Block]:
    """All transformer blocks in the order of the network.

    Args:
        network: a timm network or a `TaskModel`; names are paths in it.

    Raises:
        ValueError: no transformer block, or a block whose components are not defined.
    """
    found: list[Block] = []
    reasons: dict[int, str] = {}
    for name, module in network.named_modules():
        parts = list(_parts(module))
        attentions = [i for i, part in enumerate(parts) if is_attention(part)]
        if not attentions:
            continue
        blocks = _blocks_of(name, module, parts, attentions)
        if isinstance(blocks, str):
            reasons |= {id(parts[i]): blocks for i in attentions}
        else:
            found += blocks
    resolved = {id(block.mha) for block in found}
    for name, module in network.named_modules():
        if is_attention(module) and id(module) not in resolved:
            why = reasons.get(id(module), "it is part of no block")
            raise ValueError(_undefined(network, f"at {name} ({type(module).__name__}) {why}"))
        if not found and is_fused_block(module):
            why = f"at {name} ({type(module).__name__}) one projection serves both attention and feed-forward"
            raise ValueError(_undefined(network, why))
    if not found:
        raise ValueError(_undefined(network, "it has no block of attention and feed-forward"))
    return found


def final_norms(network: nn.Module, blocks: Sequence[Block] | None = None) -> dict[str, nn.Module]:
    """Name → LayerNorm with parameters after the last block and outside of attention pooling; mostly one. None where
    the network normalises after its last block in another way, or not at all.

    Args:
        blocks: `find_blocks(network)`, if it is known.
    """
    blocks = find_blocks(network) if blocks is None else blocks
    inside = {id(inner) for block in blocks for inner in block.module.modules()}
    found: dict[str, nn.Module] = {}
    pooling: set[int] = set()
    for name, module in network.named_modules():
        if id(module) in inside:
            found = {}
        elif is_attention_pooling(module):
            pooling |= {id(inner) for inner in module.modules()}
        elif _is_norm(module) and id(module) not in pooling and any(True for _ in module.parameters(recurse=False)):
            found[name] = module
    return found


def component_kinds(model: nn.Module) -> dict[str, str]:
    """Parameter name → one of `KINDS`, for every parameter of the network.

    Raises:
        ValueError: the components are not defined for this network, see `find_blocks`.
    """
    blocks = find_blocks(model)
    owners: dict[int, str] = {}
    for block in blocks:
        for kind in COMPONENTS:
            owners |= {id(inner): kind for part in block.component(kind) for inner in part.modules()}
    owners |= {id(norm): "final_norm" for norm in final_norms(model, blocks).values()}
    if isinstance(model, TaskModel):
        owners |= {id(inner): "head" for inner in model.head.modules()}
    modules = dict(model.named_modules())
    inside = {id(inner) for block in blocks for inner in block.module.modules()}
    found: dict[str, str] = {}
    before_blocks = True
    for name, _ in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        before_blocks = before_blocks and id(owner) not in inside
        found[name] = owners.get(id(owner), "embed" if before_blocks else "other")
    return found


def linear_width(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear map over tokens: `nn.Linear`, a 1x1 convolution, or a wrapper of one (Gemma's
    clipped linear layers, adapters of peft around their `base_layer`); None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        plain = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
        return (module.in_channels, module.out_channels) if plain else None
    if isinstance(base := getattr(module, "base_layer", None), nn.Module):
        return linear_width(base)
    children = list(module.children())
    wraps = len(children) == 1 and isinstance(children[0], nn.Linear)
    return linear_width(children[0]) if wraps else None


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Children in the order of their definition, plain containers taken apart."""
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _parts(child)
        else:
            yield child


def _blocks_of(name: str, module: nn.Module, parts: Sequence[nn.Module], attentions: list[int]) -> list[Block] | str:
    """The blocks that a module with attention holds, or why its components are not defined."""
    maps = {i: linears for i, part in enumerate(parts) if (linears := _feed_forward(part))}
    if len(maps) != len(attentions):
        return (
            f"attentions and feed-forward parts of two linear layers do not pair up ({len(attentions)} and {len(maps)})"
        )
    anchors = sorted([*attentions, *maps])
    norms: dict[int, nn.Module] = {}
    for place, anchor in enumerate(anchors):
        start = anchors[place - 1] + 1 if place else 0
        end = anchors[place + 1] if place + 1 < len(anchors) else len(parts)
        taken = {id(norm) for norm in norms.values()}
        free = [i for i in range(start, end) if _is_norm(parts[i]) and id(parts[i]) not in taken]
        before, after = [i for i in free if i < anchor], [i for i in free if i > anchor]
        if not free:
            role = "attention" if anchor in attentions else "feed-forward part"
            batch = any(isinstance(inner, BATCH_NORMS) for part in parts for inner in part.modules())
            return f"the {role} has no LayerNorm of its own beside it" + (" (but BatchNorm)" if batch else "")
        norms[anchor] = parts[before[-1] if before else after[0]]
    pairs = list(zip(attentions, maps, strict=True))
    return [
        Block(
            f"{name}[{i}]" if len(pairs) > 1 else name,
            module,
            ln1=norms[attention],
            mha=parts[attention],
            ln2=norms[feed_forward],
            fc1=maps[feed_forward][:-1],
            fc2=maps[feed_forward][-1],
        )
        for i, (attention, feed_forward) in enumerate(pairs)
    ]


def _feed_forward(part: nn.Module) -> tuple[nn.Module, ...]:
    """The linear maps of a feed-forward part in their order, the last one back to the token width; empty for anything
    else."""
    if is_attention(part) or linear_width(part) is not None:
        return ()
    linears = tuple(child for child in part.children() if linear_width(child) is not None)
    entering = {width[0] for linear in linears[:-1] if (width := linear_width(linear))}
    return linears if len(linears) >= 2 and len(entering) == 1 else ()


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm and its relatives over channels (RMS norm, LayerNorm without bias, GroupNorm with one group)."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1
    name = type(module).__name__.lower()
    return ("layernorm" in name or "rmsnorm" in name) and not isinstance(module, BATCH_NORMS)


def _undefined(network: nn.Module, why: str) -> str:
    inner = network.backbone if isinstance(network, TaskModel) else network
    config = getattr(inner, "pretrained_cfg", None) or {}
    name = config.get("architecture") or type(inner).__name__
    return (
        f"The components ln1, mha, ln2, fc1 and fc2 need transformer blocks of LayerNorm, attention, LayerNorm and "
        f"two linear layers, but in {name} {why}. Choose another strategy, or a network such as a ViT, DeiT or Swin."
    )
