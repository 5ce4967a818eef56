"""Raw images of a store on a device: gathered by index, without a host sync, and kept on a GPU where they fit."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainables.data.store_like import Indices, StoreLike

RESIDENT_BYTES = 4 * 2**30
"""How many bytes of uint8 images a process keeps on its GPU for all of its trials; larger splits are sent batch by
batch. (One process per trial slot: several trials on one GPU each keep their own copy.)"""

_resident: OrderedDict[tuple[str, str, str], Tensor] = OrderedDict()


def gather_images(store: StoreLike, split: str, indices: Indices, device: torch.device) -> Tensor:
    """Images `indices` of a split as uint8 (B, H, W, 3) on `device`, in memory of their own."""
    images = store.images(split)
    if device.type == "cpu":
        return torch.from_numpy(np.take(images, indices, axis=0))
    whole = _on_device(store, split, device)
    if whole is not None:
        return whole.index_select(0, to_device(indices, device))
    return to_device(np.take(images, indices, axis=0), device)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of `values` on `device`; the copy to a GPU goes through pinned memory and does not wait."""
    # `torch.tensor` copies: `from_numpy` would let us write to an array that is a read-only view of mapped memory.
    host = torch.tensor(values)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def _on_device(store: StoreLike, split: str, device: torch.device) -> Tensor | None:
    key = (store.digest, split, str(device))
    found = _resident.get(key)
    if found is not None:
        _resident.move_to_end(key)
        return found
    images = store.images(split)
    if images.nbytes > RESIDENT_BYTES:
        return None
    while _resident and sum(t.nbytes for t in _resident.values()) + images.nbytes > RESIDENT_BYTES:
        _resident.popitem(last=False)
    _resident[key] = torch.tensor(images).to(device)
    return _resident[key]
