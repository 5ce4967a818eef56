"""Corrupt a batch of pictures, each by a random stream of its own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from trainables.data.corruptions.blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from trainables.data.corruptions.digital import contrast, elastic_transform, jpeg_compression, pixelate
from trainables.data.corruptions.noise import gaussian_noise, impulse_noise, shot_noise
from trainables.data.corruptions.parameters import Parameters, parameters_for
from trainables.data.corruptions.streams import ImageStreams
from trainables.data.corruptions.weather import brightness, fog, frost, snow
from trainables.specs.corruptions import SEVERITIES, check_corruption
from trainables.specs.seeds import stream_seed

Corruption = Callable[[Tensor, int, Parameters, ImageStreams], Tensor]
"""Pixels (B, H, W, 3) uint8, severity, parameters and streams → pixels of the same shape and type."""

_CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}

_BY_PILLOW = frozenset({"pixelate", "jpeg_compression"})
"""Corruptions that are computed picture by picture, by a library of the CPU."""

_CHUNK = {"cpu": 224 * 224, "cuda": 64 * 224 * 224}
"""Pixels that are corrupted at once, by the type of device: on a CPU as many as its cache holds."""


@torch.no_grad()
def corrupt(images: Tensor, name: str, severity: int, seed: int, image_names: Sequence[str] | None = None) -> Tensor:
    """Corrupted pictures (B, H, W, 3) uint8 on the device of `images`.

    Depends on image name, corruption, severity and seed alone, whatever the batch and its order. From a shorter side of
    96 pixels up the parameters are those of ImageNet-C, below those of CIFAR-10-C.

    Args:
        images: (B, H, W, 3) uint8; not changed.
        name: one of `trainables.specs.corruptions.COMMON`.
        severity: 1 to 5.
        seed: of the random corruptions.
        image_names: names of the pictures' random streams; None = a checksum of each picture's pixels.

    Raises:
        ValueError: wrong shape or type, unknown corruption, another severity, or another number of names.

    Example:
        >>> images = torch.full((2, 32, 32, 3), 100, dtype=torch.uint8)
        >>> corrupt(images, "brightness", 3, seed=0)[1, 0, 0]
        tensor([138, 138, 138], dtype=torch.uint8)
    """
    check_corruption(name)
    if severity not in SEVERITIES:
        raise ValueError(f"A severity is one of 1, 2, 3, 4 and 5, but got {severity!r}.")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"Pictures must be uint8 of shape (B, H, W, 3), but got {images.dtype} of shape {tuple(images.shape)}."
        )
    if image_names is not None and len(image_names) != len(images):
        raise ValueError(
            f"image_names needs one name per picture, but got {len(image_names)} names for {len(images)} pictures."
        )
    if images.numel() == 0:
        return images.clone()
    height, width = images.shape[1:3]
    parameters = parameters_for(height, width)
    size = max(1, _CHUNK.get(images.device.type, _CHUNK["cpu"]) // (height * width))
    if name in _BY_PILLOW:
        size = len(images)
    parts = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        names = None if image_names is None else image_names[start : start + size]
        seeds = partial(_seeds, seed, name, severity, part, names)
        parts.append(_CORRUPTIONS[name](part, severity, parameters, ImageStreams(len(part), seeds, images.device)))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()


def _seeds(seed: int, name: str, severity: int, images: Tensor, image_names: Sequence[str] | None) -> list[int]:
    """Seeds of the pictures' streams."""
    names = [_checksum(image) for image in images] if image_names is None else image_names
    return [stream_seed(seed, "corruption", name, severity, image_name) for image_name in names]


def _checksum(image: Tensor) -> str:
    return f"{zlib.crc32(image.contiguous().cpu().numpy().tobytes()):08x}"
