"""Plasticity written down plainly: one image, one block, one head, one window at a time, in double precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


@dataclass
class Applied:
    """One block on one image; tokens are (n, d), or (H, W, d) in Swin."""

    functions: dict[str, Function]
    embedding: Tensor
    entering: dict[str, Tensor]


@torch.no_grad()
def plain_plasticity(network: Any, x: Tensor, y: Tensor, probe: str) -> dict[str, list[list[float]]]:
    """Component → per block, per pair: ‖f(x) − f(y)‖_F / ‖x − y‖_F."""
    network = copy.deepcopy(network).double()
    blocks_of = swin_blocks if hasattr(network, "layers") else vit_blocks
    ratios: dict[str, list[list[float]]] = {}
    for image_x, image_y in zip(x.double(), y.double(), strict=True):
        both = zip(blocks_of(network, image_x), blocks_of(network, image_y), strict=True)
        for number, (at_x, at_y) in enumerate(both):
            for kind, function in at_x.functions.items():
                inputs = [tokens(kind, at, probe) for at in (at_x, at_y)]
                wide = [widened(t, at_x.entering["fc2"].shape[-1]) if kind == "fc2" else t for t in inputs]
                rate = frobenius(function(wide[0]) - function(wide[1])) / frobenius(inputs[0] - inputs[1])
                rows = ratios.setdefault(kind, [])
                if len(rows) == number:
                    rows.append([])
                rows[number].append(rate)
    return ratios


def tokens(kind: str, at: Applied, probe: str) -> Tensor:
    return at.embedding if probe == "embedding" else at.entering[kind]


def widened(t: Tensor, width: int) -> Tensor:
    return torch.cat([t, torch.zeros(*t.shape[:-1], width - t.shape[-1], dtype=t.dtype)], dim=-1)


def frobenius(matrix: Tensor) -> float:
    return math.sqrt(math.fsum(v * v for v in matrix.flatten().tolist()))


def vit_blocks(network: Any, image: Tensor) -> Iterator[Applied]:
    """ViT and DeiT: all blocks share the tokens that enter the first one."""
    t = network.norm_pre(network._pos_embed(network.patch_embed(image[None])))[0]
    embedding = t
    for block in network.blocks:
        functions = {**common(block), "mha": lambda s, block=block: attention(block.attn, s)}
        applied, t = through(block, functions, t, embedding)
        yield applied


def swin_blocks(network: Any, image: Tensor) -> Iterator[Applied]:
    """Swin: the blocks of a stage share the tokens that enter the stage."""
    t = network.patch_embed(image[None])[0]
    for stage in network.layers:
        t = stage.downsample(t[None])[0]
        embedding = t
        for block in stage.blocks:
            functions = {**common(block), "mha": lambda s, block=block: in_windows(block, s)}
            applied, t = through(block, functions, t, embedding)
            yield applied


def common(block: Any) -> dict[str, Function]:
    return {
        "ln1": lambda t: layer_norm(block.norm1, t),
        "ln2": lambda t: layer_norm(block.norm2, t),
        "fc1": lambda t: linear(block.mlp.fc1, t),
        "fc2": lambda t: linear(block.mlp.fc2, t),
    }


def through(block: Any, functions: dict[str, Function], t: Tensor, embedding: Tensor) -> tuple[Applied, Tensor]:
    entering = {"ln1": t, "mha": functions["ln1"](t)}
    t = t + scaled(block, "ls1", functions["mha"](entering["mha"]))
    entering |= {"ln2": t, "fc1": functions["ln2"](t)}
    entering["fc2"] = block.mlp.act(functions["fc1"](entering["fc1"]))
    return Applied(functions, embedding, entering), t + scaled(block, "ls2", functions["fc2"](entering["fc2"]))


def scaled(block: Any, name: str, t: Tensor) -> Tensor:
    gamma = getattr(getattr(block, name, None), "gamma", None)
    return t if gamma is None else t * gamma


def layer_norm(norm: Any, t: Tensor) -> Tensor:
    centred = t - t.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias


def linear(layer: Any, t: Tensor) -> Tensor:
    return t @ layer.weight.T + layer.bias


def attention(module: Any, t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention over the n tokens of (n, d), head by head; `bias` (heads, n, n) is added to the logits."""
    n, d = t.shape
    width = d // module.num_heads
    q, k, v = linear(module.qkv, t).reshape(n, 3, d).unbind(1)
    heads = []
    for head in range(module.num_heads):
        part = slice(head * width, (head + 1) * width)
        logits = q[:, part] @ k[:, part].T / math.sqrt(width)
        weights = torch.softmax(logits + (0 if bias is None else bias[head]), dim=-1)
        heads.append(weights @ v[:, part])
    return linear(module.proj, torch.cat(heads, dim=-1))


def in_windows(block: Any, grid: Tensor) -> Tensor:
    """Attention within w x w windows of (H, W, d), shifted by s: tokens that the shift brings together from opposite
    borders do not see each other."""
    height, width, _ = grid.shape
    w = block.window_size[0]
    s = block.shift_size[0]
    outputs = torch.empty_like(grid)
    for top in range(0, height, w):
        for left in range(0, width, w):
            places = [(top + i, left + j) for i in range(w) for j in range(w)]
            real = [((row + s) % height, (column + s) % width) for row, column in places]
            bias = torch.zeros(block.attn.num_heads, w * w, w * w, dtype=grid.dtype)
            for a, (row_a, column_a) in enumerate(places):
                for b, (row_b, column_b) in enumerate(places):
                    offset = (row_a - row_b + w - 1) * (2 * w - 1) + column_a - column_b + w - 1
                    bias[:, a, b] = block.attn.relative_position_bias_table[offset]
                    wrapped = [(p[0] + s >= height, p[1] + s >= width) for p in (places[a], places[b])]
                    if s and wrapped[0] != wrapped[1]:
                        bias[:, a, b] -= 1e4
            out = attention(block.attn, torch.stack([grid[position] for position in real]), bias)
            for position, row in zip(real, out, strict=True):
                outputs[position] = row
    return outputs
