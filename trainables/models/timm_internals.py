"""Conventions of timm that it does not promise to keep, as read in timm 1.0.31.

timm has no public name for the parts of a transformer block, nor for the filter that turns a published checkpoint into
its own names. `tests/trainables/models/test_timm_internals.py` holds that these conventions are as they were read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_ATTENTION = re.compile(r"attn|attention|^(xca|gpsa|mhsa)$", re.IGNORECASE)
_POOLING = re.compile(r"(attn|attention)pool", re.IGNORECASE)
_WINDOWED = ("_attn", "_shifted_window_attn", "_partition_attn", "_window_attn")


def checkpoint_filter(module: nn.Module) -> Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """timm's filter of published checkpoints for a network; None = its architecture has none.

    A filter renames tensors of the original publication and resamples position embeddings to the network's image side.
    By convention it is the function `checkpoint_filter_fn` of the module that defines the architecture. Gone: such
    checkpoints lack tensors, which is an error.
    """
    return getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)


@contextmanager
def recorded_missing_keys() -> Iterator[list[str]]:
    """Record the state-dict keys that a checkpoint lacks when timm loads it within the block.

    timm reports them in a log message alone. It loads by `nn.Module.load_state_dict`, whose result has them; the method
    is replaced for the length of the block. Not for several threads at once.
    """
    missing: list[str] = []
    load_state_dict = nn.Module.load_state_dict

    def recording(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load_state_dict(module, *args, **kwargs)
        missing.extend(result.missing_keys)
        return result

    nn.Module.load_state_dict = recording  # type: ignore[method-assign,assignment]
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


def is_attention(module: nn.Module) -> bool:
    """Whether a module is attention over tokens, by its class's name.

    Of nested ones only the innermost is.

    Pooling by attention is not: it is part of no block. Gone: an attention by another name is part of no block, and its
    network is refused by strategies that need blocks.
    """
    return _has_attention_name(module) and not any(
        _has_attention_name(inner) for inner in module.modules() if inner is not module
    )


def is_attention_pooling(module: nn.Module) -> bool:
    """Whether a module pools tokens by attention, by the name of its class."""
    return bool(_POOLING.search(type(module).__name__))


def windowed_attention(block: nn.Module) -> str | None:
    """Name of a block's method for attention in windows.

    It cuts an image's tokens into windows, attends, and puts them back; None = the block calls its attention on all
    tokens.
    """
    for name in _WINDOWED:
        if callable(getattr(block, name, None)):
            return name
    return None


def is_fused_block(module: nn.Module) -> bool:
    """Whether a module is a parallel block as in ViT-22B.

    One linear map is the input of attention and feed-forward.
    """
    return isinstance(getattr(module, "in_proj", None), nn.Linear) and hasattr(module, "mlp_act")


def _has_attention_name(module: nn.Module) -> bool:
    name = type(module).__name__
    return bool(_ATTENTION.search(name)) and not _POOLING.search(name)


def map_strides(module: nn.Module) -> list[int]:
    """Stride of every map that `forward_intermediates` gives, in its order.

    By convention `feature_info` describes these maps: timm's `FeatureGetterNet` reads them by its indices.
    """
    info: Any = module.feature_info
    rows = info.info if hasattr(info, "info") else info
    return [int(row["reduction"]) for row in rows]
