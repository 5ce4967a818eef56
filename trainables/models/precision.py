"""Numeric precision of the forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """Autocast type: `auto` is bfloat16 on a GPU whose hardware has it, float32 elsewhere.

    Example:
        >>> resolve_precision("auto", torch.device("cpu"))
        torch.float32
    """
    if precision == "auto":
        # Emulated bfloat16 (Turing, Volta) is slower than float32, and no more accurate.
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on `device`; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
