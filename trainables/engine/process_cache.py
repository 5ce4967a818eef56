"""Per-process caches: opened stores and pristine pretrained networks."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainables.data.store import Store
from trainables.models.backbone import Backbone, backbone_data_config, load_pretrained
from trainables.models.device import uses_channels_last
from trainables.specs.trial_spec import PLAIN_VIEW, ModelSpec, ViewSettings

if TYPE_CHECKING:
    from trainables.data.store import StoreLike

_replicas: dict[tuple[str, torch.device, bool], Backbone] = {}


# Bounded, because every opened store maps its whole file.
@functools.lru_cache(maxsize=16)
def open_store(path: str) -> StoreLike:
    """The store at `path`, opened once.

    Raises:
        StoreError: no complete store lies there.
    """
    store: StoreLike = Store(path)
    return store


def pretrained_for(
    spec: ModelSpec, image_size: int | None, stored_side: int, cache: str | None, view: ViewSettings = PLAIN_VIEW
) -> Backbone:
    """The pristine backbone, on the CPU, at its input side (`requested_side`)."""
    return load_pretrained(spec, requested_side(spec, image_size, stored_side), Path(cache) if cache else None, view)


def requested_side(spec: ModelSpec, image_size: int | None, stored_side: int) -> int | None:
    """Image side that a network is built for; None = its own.

    It is `image_size`, else the network's own, or the stored side where that is smaller (images are never enlarged;
    timm interpolates position embeddings). Pictures of different sizes, stored whole, have no side in common (0).
    """
    return image_size or (stored_side if 0 < stored_side < _native_side(spec) else None)


def on_device(backbone: Backbone, device: torch.device, channels_last: bool | None = None) -> Backbone:
    """The pristine backbone on `device`, in the memory layout that trials compute in there.

    Copied there once, so that a new trial's network is a copy within the device.

    Args:
        backbone: on the CPU, contiguous.
        device: of the copy.
        channels_last: see `trainables.models.device.uses_channels_last`.
    """
    last = uses_channels_last(device, channels_last)
    if device.type == "cpu" and not last:
        return backbone
    key = (backbone.digest, device, last)
    if key not in _replicas:
        module = copy.deepcopy(backbone.module).to(device)
        if last:
            module = module.to(memory_format=torch.channels_last)
        _replicas[key] = dataclasses.replace(backbone, module=module)
    return _replicas[key]


@functools.lru_cache(maxsize=16)
def _native_side(spec: ModelSpec) -> int:
    return backbone_data_config(spec).image_size
