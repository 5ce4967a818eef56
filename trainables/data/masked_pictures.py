"""Batches of pictures with masks: training crops, and the views of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as colour

from trainables.data.mask_views import Box, MaskView, MaskViews
from trainables.data.pair_transforms import padded, padded_mask, scaled_mask, scaled_picture, scaled_size
from trainables.data.square_images import Batch
from trainables.data.store import MaskStoreLike
from trainables.specs.suggestions import did_you_mean

if TYPE_CHECKING:
    from trainables.models.backbone import DataConfig

MASK_AUGMENTATIONS = {
    "flip": "mirror left-right with probability 1/2",
    "crop": "a random square of the network's side out of the picture at its own size, padded where it is smaller",
    "scale": "scale the picture by a factor between 1/2 and 2",
    "jitter": "change brightness, contrast and saturation by up to a half, in random order",
}
"""Values of `data.augment` for pictures with masks; each picture has a draw of its own, and its mask the same."""

SCALES = (0.5, 2.0)
JITTER = 0.5
"""Largest change of brightness, contrast and saturation (Ha et al., 2024, for Cityscapes)."""
JITTER_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
OVERLAP = 3
"""Sliding windows overlap by at least a third of their side."""

Evaluation = Literal["resize", "slide"]
"""resize: a whole picture in one view, its longer side scaled to that of the network. slide: windows of the network's
side over the picture at its own size."""


@dataclass(frozen=True)
class Draw:
    """The random choices for one picture; every field is uniform in [0, 1)."""

    scale: float
    top: float
    left: float
    flip: float
    brightness: float
    contrast: float
    saturation: float
    order: float


class MaskedPictures:
    """Pictures and masks of a store as batches on a device.

    Args:
        store: the opened store.
        config: normalisation and side of the network's input.
        augment: any of `MASK_AUGMENTATIONS`.
        evaluation: see `Evaluation`; None = slide where `crop` is among the augmentations, since the network then
            trains on pictures at their own size.
        device: of the batches.

    Raises:
        ValueError: an unknown augmentation.
    """

    def __init__(
        self,
        store: MaskStoreLike,
        config: DataConfig,
        augment: Sequence[str],
        evaluation: Evaluation | None,
        device: torch.device,
    ) -> None:
        for name in augment:
            if name not in MASK_AUGMENTATIONS:
                hint = did_you_mean(name, MASK_AUGMENTATIONS)
                raise ValueError(
                    f"An augmentation of pictures with masks is one of {', '.join(MASK_AUGMENTATIONS)}, but got "
                    f"{name!r}.{hint}"
                )
        self._store = store
        self._side = config.image_size
        self._mean = torch.tensor(config.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(config.std, device=device).view(3, 1, 1)
        self._augment = frozenset(augment)
        self._evaluation: Evaluation = evaluation or ("slide" if "crop" in augment else "resize")
        self._device = device

    def training(self, batch: Batch, seed: int | None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) float32 and masks (B, S, S) uint8, ignored where the image is padded.

        Args:
            seed: of the batch's augmentation; None = none: whole pictures, scaled to the network's side.
        """
        # On the CPU, also for a GPU: a box must be known to the host, which would otherwise wait for it.
        generator = torch.Generator().manual_seed(seed) if seed is not None and self._augment else None
        pairs = []
        for split, position in _samples(batch):
            # All of them for every picture, so that another augmentation changes no other draw.
            draw = None if generator is None else Draw(*torch.rand(8, generator=generator).tolist())
            pairs.append(self._pair(split, position, draw))
        return torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs])

    def evaluation(self, batch: Batch, first: int) -> Iterator[tuple[Tensor, MaskViews]]:
        """Views (B, 3, S, S) float32 of pictures, with what they show; as many in a batch as it has pictures."""
        samples = _samples(batch)
        images: list[Tensor] = []
        views: list[MaskView] = []
        for number, (split, position) in enumerate(samples, start=first):
            for image, view in self._views(split, position, number):
                images.append(image)
                views.append(view)
                if len(images) == len(samples):
                    yield torch.stack(images), MaskViews(views)
                    images = []
                    views = []
        if images:
            yield torch.stack(images), MaskViews(views)

    def _pair(self, split: str, position: int, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """One picture and its mask as the network trains on them."""
        picture, mask = self._loaded(split, position)
        height, width = mask.shape
        scale = 1.0 if draw is not None and "crop" in self._augment else self._side / max(height, width)
        if draw is not None and "scale" in self._augment:
            scale *= SCALES[0] + draw.scale * (SCALES[1] - SCALES[0])
        size = scaled_size(height, width, scale)
        box = _box(size, self._side, draw)
        image = scaled_picture(picture, size, box)
        target = scaled_mask(mask, size, box)
        if draw is not None and "flip" in self._augment and draw.flip < 0.5:
            image, target = image.flip(2), target.flip(1)
        image = image / 255
        if draw is not None and "jitter" in self._augment:
            image = _jittered(image, draw)
        return padded(self._normalised(image), self._side), padded_mask(target, self._side)

    def _views(self, split: str, position: int, sample: int) -> Iterator[tuple[Tensor, MaskView]]:
        """The views of one picture."""
        picture, mask = self._loaded(split, position)
        height, width = mask.shape
        if self._evaluation == "resize":
            size = scaled_size(height, width, self._side / max(height, width))
            shown = Box(0, 0, *size)
            image = self._normalised(scaled_picture(picture, size, shown) / 255)
            yield padded(image, self._side), MaskView(sample, shown, Box(0, 0, height, width), mask, completes=True)
            return
        boxes = windows(height, width, self._side)
        for number, box in enumerate(boxes, start=1):
            part = picture[box.rows, box.columns].permute(2, 0, 1).to(torch.float32)
            shown = Box(0, 0, box.height, box.width)
            view = MaskView(sample, shown, box, mask, completes=number == len(boxes))
            yield padded(self._normalised(part / 255), self._side), view

    def _loaded(self, split: str, position: int) -> tuple[Tensor, Tensor]:
        """Picture (H, W, 3) and mask (H, W), uint8 on the device."""
        picture = self._store.pictures(split)[position]
        mask = self._store.masks(split)[position]
        # `torch.tensor` copies: the store's memory is read-only.
        return torch.tensor(picture).to(self._device), torch.tensor(mask).to(self._device)

    def _normalised(self, image: Tensor) -> Tensor:
        return (image - self._mean) / self._std


def _samples(batch: Batch) -> list[tuple[str, int]]:
    """Splits of the store and positions in them, in the order of the batch's rows."""
    samples = [
        (int(row), split, int(position))
        for split, positions, rows in batch
        for position, row in zip(positions, rows, strict=True)
    ]
    return [(split, position) for _, split, position in sorted(samples)]


def windows(height: int, width: int, side: int) -> list[Box]:
    """Windows of a side that cover a picture, row by row; smaller where the picture is.

    Evenly spread, so that neighbours overlap by at least a third of the side.

    Example:
        >>> [(box.left, box.width) for box in windows(40, 100, side=60)]
        [(0, 60), (40, 60)]
    """
    return [
        Box(top, left, min(side, height), min(side, width))
        for top in _starts(height, side)
        for left in _starts(width, side)
    ]


def _starts(length: int, side: int) -> list[int]:
    if length <= side:
        return [0]
    stride = max(1, side - side // OVERLAP)
    steps = math.ceil((length - side) / stride)
    return [(length - side) * step // steps for step in range(steps + 1)]


def _box(size: tuple[int, int], side: int, draw: Draw | None) -> Box:
    """Window of the network's side in a scaled picture, or all of an axis that is shorter."""
    height, width = size
    rows, columns = min(height, side), min(width, side)
    if draw is None:
        return Box(0, 0, rows, columns)
    return Box(int(draw.top * (height - rows + 1)), int(draw.left * (width - columns + 1)), rows, columns)


def _jittered(image: Tensor, draw: Draw) -> Tensor:
    """An image in 0…1 with changed brightness, contrast and saturation, in the draw's order."""
    changes = (
        (colour.adjust_brightness, draw.brightness),
        (colour.adjust_contrast, draw.contrast),
        (colour.adjust_saturation, draw.saturation),
    )
    for number in JITTER_ORDERS[int(draw.order * len(JITTER_ORDERS))]:
        change, value = changes[number]
        image = change(image.clamp(0, 1), 1 + JITTER * (2 * value - 1))
    return image.clamp(0, 1)
