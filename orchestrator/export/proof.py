"""Comparison of an exported model with the network that it was made from, before it counts as exported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.export.errors import ExportError
from orchestrator.wording import counted

BATCHES = (1, 2, 7, 16, 33)
"""Batch sizes that every exported model must take. None of the examples that formats are traced with is that long."""
BATCH = 64
"""Pictures per forward pass of the comparison with every picture."""

Runner = Callable[[Tensor], Tensor]
"""Normalised images (B, 3, S, S) float32 → logits (B, K)."""


@dataclass(frozen=True)
class Proof:
    """The outcome of a comparison."""

    pictures: int
    difference: float
    """Largest difference of a logit, as a share of the largest logit."""
    tolerance: float
    batches: tuple[int, ...] = BATCHES
    batch: int = BATCH
    """Of the comparison of every picture."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Further heights and widths that were compared."""

    def sentence(self) -> str:
        """The comparison in words."""
        sizes = ", ".join(map(str, self.batches))
        others = " and ".join(f"{height} x {width}" for height, width in self.sizes)
        further = f", and on images of {others} pixels" if others else ""
        return (
            f"On {counted(self.pictures, 'picture')}, in batches of {sizes} and {self.batch}{further}, the exported "
            f"model's logits differ from the tested network's by at most {self.difference:.1e} of the largest logit "
            f"(allowed: {self.tolerance:g})."
        )


@torch.no_grad()
def prove(
    exported: Runner,
    network: nn.Module,
    transform: Callable[[Tensor], Tensor],
    pixels: NDArray[np.uint8],
    tolerance: float,
) -> Proof:
    """Compare an exported model with its network, on every picture and in batches of several sizes.

    Args:
        exported: the model as it was read back from its file.
        network: images → logits, on the CPU in eval mode.
        transform: stored pixels → images.
        pixels: (n, H, W, 3), n ≥ 1.
        tolerance: largest permitted difference, relative to the largest logit.

    Raises:
        ExportError: it takes no batch of some size, or its logits differ.
    """
    reference = torch.cat([network(images) for images in _batches(pixels, transform, BATCH)])
    largest = float(reference.abs().max())
    difference = 0.0
    start = 0
    for images in _batches(pixels, transform, BATCH):
        difference = max(difference, _difference(exported, images, reference[start : start + len(images)]))
        start += len(images)
    for size in BATCHES:
        positions = np.resize(np.arange(len(pixels)), size)
        images = transform(torch.tensor(pixels[positions]))
        difference = max(difference, _difference(exported, images, reference[positions]))
    return Proof(len(pixels), _relative(difference, largest, len(pixels), tolerance), tolerance)


@torch.no_grad()
def prove_dense(
    exported: Runner,
    network: nn.Module,
    views: Iterable[Tensor],
    pictures: int,
    sizes: Sequence[tuple[int, int]],
    tolerance: float,
) -> Proof:
    """Compare an exported model of pixels with its network, on every view and in batches of several sizes.

    Args:
        exported: images (B, 3, S, S) → logits (B, K, h, w), as it was read back from its file.
        network: the same, on the CPU in eval mode.
        views: batches (B, 3, S, S), at least one.
        pictures: that the views show.
        sizes: further heights and widths that the exported model must take.
        tolerance: largest permitted difference, relative to the largest logit.

    Raises:
        ExportError: it takes no batch of some size, or its logits differ.
    """
    difference = 0.0
    largest = 0.0

    def compare(images: Tensor) -> None:
        nonlocal difference, largest
        reference = network(images)
        largest = max(largest, float(reference.abs().max()))
        difference = max(difference, _difference(exported, images, reference))

    first: Tensor | None = None
    for images in views:
        first = images if first is None else first
        compare(images)
    assert first is not None, "a test split has a picture"
    for count in BATCHES:
        compare(first[np.resize(np.arange(len(first)), count)])
    for height, width in sizes:
        for count in BATCHES[:2]:
            compare(resized(first[np.resize(np.arange(len(first)), count)], height, width))
    relative = _relative(difference, largest, pictures, tolerance)
    return Proof(pictures, relative, tolerance, batch=len(first), sizes=tuple(sizes))


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Images of another size, for comparisons at it."""
    return functional.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)


def _relative(difference: float, largest: float, pictures: int, tolerance: float) -> float:
    relative = difference / max(largest, 1e-12)
    if not relative <= tolerance:
        raise ExportError(
            f"An exported model must give the logits of the tested network to {tolerance:g} of the largest one, but "
            f"they differ by {relative:.2g} on {counted(pictures, 'picture')}. It was not written."
        )
    return relative


def _difference(exported: Runner, images: Tensor, expected: Tensor) -> float:
    try:
        logits = exported(images)
    except Exception as error:  # libraries of several formats, each with errors of its own
        reason = " ".join(str(error).split())[:240]
        raise ExportError(
            f"An exported model must take batches of any size, but one of {len(images)} fails "
            f"({type(error).__name__}: {reason}). It was not written."
        ) from error
    if logits.shape != expected.shape:
        raise ExportError(
            f"An exported model must give logits of shape {tuple(expected.shape)} for {len(images)} pictures, but it "
            f"gives {tuple(logits.shape)}. It was not written."
        )
    return float((logits.double() - expected.double()).abs().max())


def _batches(pixels: NDArray[np.uint8], transform: Callable[[Tensor], Tensor], size: int) -> Iterator[Tensor]:
    for start in range(0, len(pixels), size):
        yield transform(torch.tensor(pixels[start : start + size]))
