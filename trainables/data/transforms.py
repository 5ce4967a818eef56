"""Transforms of whole batches, on the device, after the uint8 → float cast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

AUGMENTATIONS = ("flip", "crop")
"""flip: left-right, half of the images. crop: a random window of the image side, from the stored side where that is
larger, else from the image padded by an eighth of its side (reflected)."""


class BatchTransform:
    """uint8 (B, H, W, 3) → float32 (B, 3, S, S), normalised; augmented where a generator is given.

    Args:
        mean: per channel, for values in [0, 1].
        std: per channel.
        image_size: S; not larger than the stored side.
        augment: any of `AUGMENTATIONS`.

    Raises:
        ValueError: an unknown augmentation.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], image_size: int, augment: Sequence[str] = ()
    ) -> None:
        unknown = sorted(set(augment) - set(AUGMENTATIONS))
        if unknown:
            raise ValueError(f"An augmentation is one of {', '.join(AUGMENTATIONS)}, but got {', '.join(unknown)}.")
        self.mean, self.std = tuple(mean), tuple(std)
        self.image_size, self.augment = image_size, tuple(augment)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Transform one batch; with a generator (on the images' device) augmented, else centre-cropped."""
        if images.shape[1] < self.image_size:
            raise ValueError(
                f"Stored images must be at least {self.image_size} pixels wide, but are {images.shape[1]}."
            )
        values = images.permute(0, 3, 1, 2).float().div_(255.0)
        mean = torch.tensor(self.mean, device=values.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=values.device).view(1, -1, 1, 1)
        values = values.sub_(mean).div_(std)
        if generator is not None and "crop" in self.augment:
            values = self._random_crop(values, generator)
        else:
            values = self._centre_crop(values)
        if generator is not None and "flip" in self.augment:
            flipped = torch.rand(len(values), 1, 1, 1, generator=generator, device=values.device) < 0.5
            values = torch.where(flipped, values.flip(3), values)
        return values.contiguous()

    def _centre_crop(self, values: Tensor) -> Tensor:
        spare = values.shape[-1] - self.image_size
        if spare == 0:
            return values
        start = spare // 2
        return values[:, :, start : start + self.image_size, start : start + self.image_size]

    def _random_crop(self, values: Tensor, generator: torch.Generator) -> Tensor:
        size = self.image_size
        if values.shape[-1] == size:
            values = functional.pad(values, [max(1, size // 8)] * 4, mode="reflect")
        spare = values.shape[-1] - size
        start = torch.randint(spare + 1, (2, len(values)), generator=generator, device=values.device)
        window = torch.arange(size, device=values.device)
        rows, columns = start[0][:, None] + window, start[1][:, None] + window
        index = torch.arange(len(values), device=values.device)[:, None, None]
        cropped: Tensor = values.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
        return cropped.permute(0, 3, 1, 2)
