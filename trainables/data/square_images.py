"""Batches of square images with labels: images by index on a device, cropped, augmented and normalised there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainables.data.store import Indices, StoreLike
from trainables.data.transforms import BatchTransform

if TYPE_CHECKING:
    from trainables.models.backbone import DataConfig


GPU_CACHE_BYTES = 4 * 2**30
"""Size of a process's GPU cache of uint8 images, for all of its trials; a larger split is copied batch by batch.
Several trials on one GPU are several processes, each with its cache."""

_gpu_cache: OrderedDict[tuple[str, str, str], Tensor] = OrderedDict()
"""Least recently used first; by store digest, split and device."""


def gather_images(store: StoreLike, split: str, indices: Indices, device: torch.device) -> Tensor:
    """Copy images of a split by index: (B, H, W, 3) uint8 on `device`."""
    images = store.images(split)
    if device.type == "cpu":
        # `np.take` copies: torch does not respect that the store's memory is read-only.
        return torch.from_numpy(np.take(images, indices, axis=0))
    cached = _cached_split(store, split, device)
    if cached is not None:
        return cached.index_select(0, to_device(indices, device))
    return to_device(np.take(images, indices, axis=0), device)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy `values` to `device`; to a GPU asynchronously, through pinned memory."""
    # `torch.tensor` copies: `from_numpy` would let us write to an array that is a read-only view of mapped memory.
    host = torch.tensor(values)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def _cached_split(store: StoreLike, split: str, device: torch.device) -> Tensor | None:
    """All images of a split, cached on `device`; None = larger than the cache."""
    key = (store.digest, split, str(device))
    cached = _gpu_cache.get(key)
    if cached is not None:
        _gpu_cache.move_to_end(key)
        return cached
    images = store.images(split)
    if images.nbytes > GPU_CACHE_BYTES:
        return None
    while _gpu_cache and sum(t.nbytes for t in _gpu_cache.values()) + images.nbytes > GPU_CACHE_BYTES:
        _gpu_cache.popitem(last=False)
    _gpu_cache[key] = torch.tensor(images).to(device)
    return _gpu_cache[key]


ImageTransform = Callable[[Tensor, torch.Generator | None], Tensor]
SampleTransform = Callable[[Tensor, Tensor, ImageTransform, torch.Generator | None], tuple[Tensor, Tensor]]
"""Pixels (B, H, W, 3) uint8, labels (B,), an image transform and its generator → images and targets."""


def _labels_unchanged(
    pixels: Tensor, labels: Tensor, image_transform: ImageTransform, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    return image_transform(pixels, generator), labels


Batch = list[tuple[str, Indices, Indices]]
"""Per split of the store that a batch has samples of: its name, positions in it, and their rows in the batch."""


class SquareImages:
    """Square images of a store as batches on a device.

    Args:
        store: the opened store.
        config: normalisation and side of the network's input.
        augment: any of `trainables.data.transforms.AUGMENTATIONS`.
        transform: the task's `trainables.tasks.base.Task.transform`; None = labels unchanged.
        device: of the batches.
    """

    def __init__(
        self,
        store: StoreLike,
        config: DataConfig,
        augment: Sequence[str],
        transform: SampleTransform | None,
        device: torch.device,
    ) -> None:
        self._store = store
        self.center_crop = BatchTransform(config.mean, config.std, config.image_size, ())
        """The view of an evaluation: pixels (B, H, W, 3) uint8 to (B, 3, S, S)."""
        self._augmentation = BatchTransform(config.mean, config.std, config.image_size, tuple(augment))
        self._transform = _labels_unchanged if transform is None else transform
        self._device = device
        self._generator = torch.Generator(device) if augment else None

    def training(self, batch: Batch, seed: int | None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) float32 and labels (B,), or the task's own targets.

        Args:
            seed: of the batch's augmentation; None = centre crop.
        """
        pixels, labels = self._gather(batch)
        if self._generator is None or seed is None:
            # Also for training without augmentation: nothing is drawn, so no generator is seeded.
            return self._transform(pixels, labels, self.center_crop, None)
        self._generator.manual_seed(seed)
        return self._transform(pixels, labels, self._augmentation, self._generator)

    def evaluation(self, batch: Batch, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Centre crops; a sample is a row."""
        yield self.training(batch, None)

    def _gather(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pixels (B, H, W, 3) uint8 and labels (B,) of a batch, on the device."""
        pixels = [gather_images(self._store, source, indices, self._device) for source, indices, _ in batch]
        labels = [to_device(self._store.labels(source)[indices], self._device) for source, indices, _ in batch]
        if len(batch) == 1:
            return pixels[0], labels[0]
        order = to_device(np.argsort(np.concatenate([rows for _, _, rows in batch])), self._device)
        return torch.cat(pixels).index_select(0, order), torch.cat(labels).index_select(0, order)
