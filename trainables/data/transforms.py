"""Crop, augmentation and normalisation of a batch of uint8 pixels.

Computed on the device of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainables.specs.augmentations import AUGMENTATIONS
from trainables.specs.suggestions import did_you_mean

PAD_SHARE = 8
"""A stored image that is no larger than the network's input is padded by side / 8 on every edge before a crop."""


class BatchTransform:
    """Crop, augment and normalise a batch.

    Args:
        mean: per channel, of pixel values in 0…1.
        std: per channel, of pixel values in 0…1.
        image_size: side of the result, in pixels; stored images are at least as large.
        augment: any of `trainables.specs.augmentations.AUGMENTATIONS`; applied only in calls with a generator.

    Raises:
        ValueError: an unknown augmentation.

    Example:
        >>> transform = BatchTransform(mean=[0.5] * 3, std=[0.5] * 3, image_size=2, augment=["flip"])
        >>> images = torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
        >>> transform(images)[0, 0]
        tensor([[1., 1.],
                [1., 1.]])
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], image_size: int, augment: Sequence[str]) -> None:
        for name in augment:
            if name not in AUGMENTATIONS:
                hint = did_you_mean(name, AUGMENTATIONS)
                raise ValueError(f"An augmentation is one of {', '.join(AUGMENTATIONS)}, but got {name!r}.{hint}")
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.image_size = image_size
        self.augment = tuple(augment)
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (B, H, W, 3) uint8 → normalised (B, 3, S, S).

        The values are (x / 255 − mean) / std, in float32. The input is not modified.

        Args:
            images: stored pixels, on any device.
            generator: of the augmentation's draws, on the device of the images; None = centre crop.

        Raises:
            ValueError: wrong shape or type, or images smaller than the network's input.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(
                f"A batch must be uint8 of shape (B, H, W, 3), but got {images.dtype} of shape {tuple(images.shape)}."
            )
        if min(images.shape[1:3]) < self.image_size:
            raise ValueError(
                f"Stored images must be at least {self.image_size} pixels wide and high, but they are "
                f"{images.shape[2]} x {images.shape[1]}. Ingest them at {self.image_size} pixels or more."
            )
        if generator is not None and "crop" in self.augment:
            pixels = self._cropped(images, generator)
        else:
            pixels = self._centre(images).permute(0, 3, 1, 2).contiguous()
        if generator is not None and "flip" in self.augment:
            flipped = torch.rand(len(pixels), 1, 1, 1, device=images.device, generator=generator) < 0.5
            # Exchange all bits or none: five times as fast as `torch.where` on a CPU, and as exact.
            pixels = pixels ^ ((pixels ^ pixels.flip(3)) & (flipped.to(torch.uint8) * 255))
        return self._normalised(pixels)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels (B, H, W, 3) uint8 of any size → (B, 3, H, W) float32, neither cropped nor augmented."""
        return self._normalised(pixels.permute(0, 3, 1, 2).contiguous())

    def pixels_of(self, images: Tensor) -> Tensor:
        """Pixels (B, H, W, 3) uint8 that normalised images (B, 3, H, W) were made of."""
        scale, offset = self._scale_and_offset(images.device)
        # Rounded: the normalisation is exact to a small part of a pixel's step.
        return ((images - offset) / scale).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _normalised(self, pixels: Tensor) -> Tensor:
        scale, offset = self._scale_and_offset(pixels.device)
        # In place: the conversion from uint8 has already made a new tensor.
        return pixels.to(torch.float32).mul_(scale).add_(offset)

    def _centre(self, images: Tensor) -> Tensor:
        side = self.image_size
        # Rounded as torchvision's `CenterCrop` rounds, so that a pixel is where timm's evaluation has it.
        top, left = (round((length - side) / 2.0) for length in images.shape[1:3])
        return images[:, top : top + side, left : left + side]

    def _cropped(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A random window of each image: (B, 3, S, S) uint8.

        Reflected beyond the edges, by one indexed look-up.
        """
        count, height, width, channels = images.shape
        rows = self._window(count, height, generator)
        columns = self._window(count, width, generator)
        index = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, self.image_size**2)
        planes = images.reshape(count, height * width, channels).transpose(1, 2).contiguous()
        windows = torch.gather(planes, 2, index.expand(-1, channels, -1))
        return windows.view(count, channels, self.image_size, self.image_size)

    def _window(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Indices (B, S) of the rows (or columns) in each image's window."""
        side = self.image_size
        device = generator.device
        pad = side // PAD_SHARE if length == side else 0
        start = torch.randint(0, length - side + 2 * pad + 1, (count, 1), device=device, generator=generator) - pad
        last = length - 1
        # Reflected at both edges without repeating them.
        return last - (last - (start + torch.arange(side, device=device)).abs()).abs()

    def _scale_and_offset(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Factor and summand of the normalisation, (1, 3, 1, 1) each; cached per device."""
        if device not in self._constants:
            mean = torch.tensor(self.mean, dtype=torch.float64).view(1, -1, 1, 1)
            std = torch.tensor(self.std, dtype=torch.float64).view(1, -1, 1, 1)
            # In float64 and rounded once, so that both constants are exact to float32.
            scale = (1 / (255 * std)).to(torch.float32).to(device)
            offset = (-mean / std).to(torch.float32).to(device)
            self._constants[device] = (scale, offset)
        return self._constants[device]
