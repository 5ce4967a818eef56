"""Batches of pictures with masks: training crops, and the views of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as colour

from trainables.data.mask_views import Box, MaskView, MaskViews
from trainables.data.pair_transforms import padded, padded_mask, scaled_mask, scaled_picture, scaled_size
from trainables.data.square_images import Batch
from trainables.data.store import MaskStoreLike
from trainables.specs.augmentations import MASK_AUGMENTATIONS
from trainables.specs.suggestions import did_you_mean

if TYPE_CHECKING:
    from trainables.models.backbone import DataConfig

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


def evaluation_of(augment: Sequence[str], evaluation: Evaluation | None) -> Evaluation:
    """Views of an evaluation: those asked for, else windows where `crop` is among the augmentations.

    With crops the network trains on pictures at their own size.
    """
    return evaluation or ("slide" if "crop" in augment else "resize")


class PictureViews:
    """Views of whole pictures, as an evaluation sees them.

    Args:
        config: normalisation and side of the network's input.
        evaluation: see `Evaluation`.
        device: of pictures, masks and views.
    """

    def __init__(self, config: DataConfig, evaluation: Evaluation, device: torch.device) -> None:
        self._side = config.image_size
        self._mean = torch.tensor(config.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(config.std, device=device).view(3, 1, 1)
        self._evaluation = evaluation

    def batches(
        self, pairs: Iterable[tuple[Tensor, Tensor]], size: int, first: int = 0
    ) -> Iterator[tuple[Tensor, MaskViews]]:
        """Views (B, 3, S, S) float32 with what they show, those of a picture one after another.

        Args:
            pairs: pictures (H, W, 3) and their masks (H, W), uint8.
            size: views in a batch.
            first: position of the first picture among those of its evaluation.
        """
        images: list[Tensor] = []
        views: list[MaskView] = []
        for number, (picture, mask) in enumerate(pairs, start=first):
            for image, view in self._of(picture, mask, number):
                images.append(image)
                views.append(view)
                if len(images) == size:
                    yield torch.stack(images), MaskViews(views)
                    images = []
                    views = []
        if images:
            yield torch.stack(images), MaskViews(views)

    def normalised(self, image: Tensor) -> Tensor:
        """An image (…, 3, h, w) in 0…1 as the network takes it."""
        return (image - self._mean) / self._std

    def _of(self, picture: Tensor, mask: Tensor, sample: int) -> Iterator[tuple[Tensor, MaskView]]:
        """The views of one picture."""
        height, width = mask.shape
        if self._evaluation == "resize":
            size = scaled_size(height, width, self._side / max(height, width))
            shown = Box(0, 0, *size)
            image = self.normalised(scaled_picture(picture, size, shown) / 255)
            yield (
                padded(image, self._side),
                MaskView(sample, shown, Box(0, 0, height, width), mask, completes=True, side=self._side),
            )
            return
        boxes = windows(height, width, self._side)
        for number, box in enumerate(boxes, start=1):
            part = picture[box.rows, box.columns].permute(2, 0, 1).to(torch.float32)
            shown = Box(0, 0, box.height, box.width)
            view = MaskView(sample, shown, box, mask, completes=number == len(boxes), side=self._side)
            yield padded(self.normalised(part / 255), self._side), view


class MaskedPictures:
    """Pictures and masks of a store as batches on a device.

    Args:
        store: the opened store.
        config: normalisation and side of the network's input.
        augment: any of `trainables.specs.augmentations.MASK_AUGMENTATIONS`.
        evaluation: see `evaluation_of`.
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
        self._views = PictureViews(config, evaluation_of(augment, evaluation), device)
        self._augment = frozenset(augment)
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
        pairs = (self._loaded(split, position) for split, position in samples)
        return self._views.batches(pairs, len(samples), first)

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
        return padded(self._views.normalised(image), self._side), padded_mask(target, self._side)

    def _loaded(self, split: str, position: int) -> tuple[Tensor, Tensor]:
        """Picture (H, W, 3) and mask (H, W), uint8 on the device."""
        picture = self._store.pictures(split)[position]
        mask = self._store.masks(split)[position]
        # `torch.tensor` copies: the store's memory is read-only.
        return torch.tensor(picture).to(self._device), torch.tensor(mask).to(self._device)


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
