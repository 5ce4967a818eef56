"""Transformer components LN1, MHA, LN2, FC1 and FC2 (Odonnat et al., 2026), by module walk.

A block is a module that holds attention and a feed-forward part of linear maps side by side, each with a LayerNorm of
its own, under any attribute names: before it (pre-norm) or, where there is none, after it (post-norm). This finds the
blocks of every ViT-like family of timm. Where the components are not defined – attention and feed-forward fused in one
projection, BatchNorm instead of LayerNorm, a norm inside the attention, attention without a feed-forward part – a
ValueError names the reason; a network is never resolved in part.
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
"""Values of `component_kinds`: a component; the LayerNorm after the last block; the modules before the
first block; the classifier; the rest (LayerScale, sub-norms, downsampling, convolutional stages)."""


@dataclass(frozen=True)
class Block:
    """One transformer block and its components.

    Tokens are (B, n, d), (B, H, W, d), or (B, d, H, W) where the maps are 1x1 convolutions. Blocks with
    several attentions side by side (parallel ViTs, TNT) count as several.
    """

    name: str
    """Dotted path in the network; several blocks of one module share it up to `[i]`."""
    module: nn.Module
    """The module that the network's forward pass calls."""
    ln1: nn.Module
    mha: nn.Module
    ln2: nn.Module
    fc1: tuple[nn.Module, ...]
    """All maps into the hidden width: one, or gate and value where a gated unit keeps them apart."""
    fc2: nn.Module

    def component(self, kind: str) -> tuple[nn.Module, ...]:
        """The modules of one of `COMPONENTS`."""
        modules = getattr(self, kind)
        return modules if isinstance(modules, tuple) else (modules,)

    def attention(self) -> tuple[nn.Module, str]:
        """Owner and method name of the block's attention.

        As a function of all tokens of an image: `mha.forward`, or the block's method that partitions (and shifts)
        windows around it.
        """
        windowed = windowed_attention(self.module)
        return (self.mha, "forward") if windowed is None else (self.module, windowed)


def find_blocks(network: nn.Module) -> list[Block]:
    """All transformer blocks, in network order.

    Args:
        network: a timm network or a `TaskModel`; names are paths in it.

    Raises:
        ValueError: no transformer block, or a block whose components are not defined.
    """
    resolved: list[Block] = []
    reasons: dict[int, str] = {}  # by id of an attention: why its components are not defined
    for name, module in network.named_modules():
        parts = list(_parts(module))
        attentions = [i for i, part in enumerate(parts) if is_attention(part)]
        if not attentions:
            continue
        blocks = _blocks_of(name, module, parts, attentions)
        if isinstance(blocks, str):
            reasons |= {id(parts[i]): blocks for i in attentions}
        else:
            resolved += blocks
    resolved_attentions = {id(block.mha) for block in resolved}
    for name, module in network.named_modules():
        # An error rather than a gap: a component would otherwise move in some of the blocks only.
        if is_attention(module) and id(module) not in resolved_attentions:
            why = reasons.get(id(module), "it is part of no block")
            raise ValueError(_undefined(network, f"at {name} ({type(module).__name__}) {why}"))
        if not resolved and is_fused_block(module):
            why = f"at {name} ({type(module).__name__}) one projection serves both attention and feed-forward"
            raise ValueError(_undefined(network, why))
    if not resolved:
        raise ValueError(_undefined(network, "it has no block of attention and feed-forward"))
    return resolved


def final_norms(network: nn.Module, blocks: Sequence[Block] | None = None) -> dict[str, nn.Module]:
    """Final LayerNorms with parameters, by name: after the last block, outside of attention pooling.

    Usually one; empty where the network normalises after its last block in another way, or not at all.

    Args:
        blocks: `find_blocks(network)`, if already computed.
    """
    blocks = find_blocks(network) if blocks is None else blocks
    inside = {id(inner) for block in blocks for inner in block.module.modules()}
    norms: dict[str, nn.Module] = {}
    pooling: set[int] = set()
    for name, module in network.named_modules():
        if id(module) in inside:
            norms = {}  # a later block follows: the norms so far are not final
        elif is_attention_pooling(module):
            pooling |= {id(inner) for inner in module.modules()}
        elif _is_norm(module) and id(module) not in pooling and any(True for _ in module.parameters(recurse=False)):
            norms[name] = module
    return norms


def component_kinds(model: nn.Module) -> dict[str, str]:
    """Component of every parameter: name → one of `KINDS`.

    Raises:
        ValueError: the components are not defined for this network, see `find_blocks`.
    """
    blocks = find_blocks(model)
    kind_by_module: dict[int, str] = {}
    for block in blocks:
        for kind in COMPONENTS:
            kind_by_module |= {id(inner): kind for part in block.component(kind) for inner in part.modules()}
    kind_by_module |= {id(norm): "final_norm" for norm in final_norms(model, blocks).values()}
    if isinstance(model, TaskModel):
        kind_by_module |= {id(inner): "head" for inner in model.head.modules()}
    modules = dict(model.named_modules())
    inside = {id(inner) for block in blocks for inner in block.module.modules()}
    kinds: dict[str, str] = {}
    before_blocks = True
    for name, _ in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        before_blocks = before_blocks and id(owner) not in inside
        kinds[name] = kind_by_module.get(id(owner), "embed" if before_blocks else "other")
    return kinds


def linear_width(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear map over tokens; None for any other module.

    Linear maps are `nn.Linear`, 1x1 convolutions, and wrappers of one (Gemma's clipped linear layers, adapters of peft
    around their `base_layer`).
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        pointwise = module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
        return (module.in_channels, module.out_channels) if pointwise else None
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        return linear_width(base)
    children = list(module.children())
    wraps = len(children) == 1 and isinstance(children[0], nn.Linear)
    return linear_width(children[0]) if wraps else None


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Children in order of definition, with plain containers flattened."""
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _parts(child)
        else:
            yield child


def _blocks_of(name: str, module: nn.Module, parts: Sequence[nn.Module], attentions: list[int]) -> list[Block] | str:
    """Blocks of a module with attention, or the reason why its components are not defined."""
    maps = {i: linears for i, part in enumerate(parts) if (linears := _feed_forward(part))}
    if len(maps) != len(attentions):
        return (
            f"attentions and feed-forward parts of two linear layers do not pair up ({len(attentions)} and {len(maps)})"
        )
    anchors = sorted([*attentions, *maps])
    norms: dict[int, nn.Module] = {}
    for i, anchor in enumerate(anchors):
        # A part's norm lies between the attention or feed-forward part before it and the one after it.
        start = anchors[i - 1] + 1 if i else 0
        end = anchors[i + 1] if i + 1 < len(anchors) else len(parts)
        taken = {id(norm) for norm in norms.values()}
        free = [j for j in range(start, end) if _is_norm(parts[j]) and id(parts[j]) not in taken]
        if not free:
            role = "attention" if anchor in attentions else "feed-forward part"
            batch = any(isinstance(inner, BATCH_NORMS) for part in parts for inner in part.modules())
            return f"the {role} has no LayerNorm of its own beside it" + (" (but BatchNorm)" if batch else "")
        before = [j for j in free if j < anchor]
        after = [j for j in free if j > anchor]
        norms[anchor] = parts[before[-1] if before else after[0]]  # pre-norm, else post-norm
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
    """Linear maps of a feed-forward part, FC2 last; empty for any other module."""
    if is_attention(part) or linear_width(part) is not None:
        return ()
    linears = tuple(child for child in part.children() if linear_width(child) is not None)
    # All but the last map read the tokens: gate and value of a gated unit have the same input width.
    input_widths = {width[0] for linear in linears[:-1] if (width := linear_width(linear))}
    return linears if len(linears) >= 2 and len(input_widths) == 1 else ()


def _is_norm(module: nn.Module) -> bool:
    """Whether a module normalises over channels: LayerNorm, RMS norm, GroupNorm with one group."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == 1
    name = type(module).__name__.lower()
    return ("layernorm" in name or "rmsnorm" in name) and not isinstance(module, BATCH_NORMS)


def _undefined(network: nn.Module, why: str) -> str:
    """Message for a network whose components are not defined."""
    inner = network.backbone if isinstance(network, TaskModel) else network
    config = getattr(inner, "pretrained_cfg", None) or {}
    name = config.get("architecture") or type(inner).__name__
    return (
        f"The components ln1, mha, ln2, fc1 and fc2 need transformer blocks of LayerNorm, attention, LayerNorm and "
        f"two linear layers, but in {name} {why}. Choose another strategy, or a network such as a ViT, DeiT or Swin."
    )
