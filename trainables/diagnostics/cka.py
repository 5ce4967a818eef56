"""Linear CKA between a network before and after tuning, block by block.

Kornblith et al. (ICML 2019) compare activations by centred kernel alignment, with all positions of an image in one
vector. Nguyen, Raghu & Kornblith (ICLR 2021, eq. 2-4) estimate it over mini-batches with the unbiased HSIC of Song et
al. (JMLR 2012), so that its expectation does not depend on the size of the batches and no activations are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainables.models.layer_types import blocks
from trainables.models.precision import autocast
from trainables.specs.measurements import Curve
from trainables.specs.metrics import CKA_MEAN

SMALLEST_BATCH = 4
"""The unbiased HSIC needs four samples."""
NOTE = "Linear CKA between a block's activations in the pretrained and in the tuned network (1 = alike)."


def gram(activations: Tensor) -> Tensor:
    """Gram matrix of centred activations: (B, …) → (B, B) float64.

    Zero where rows differ by rounding only.
    """
    # Hooks run inside the forward pass's autocast, which would round the product to bfloat16.
    with torch.autocast(activations.device.type, enabled=False):
        rows = activations.detach().flatten(1).float()
        # The unbiased HSIC does not depend on the mean; subtracting it avoids cancellation in its sums.
        centred = rows - rows.mean(0)
        # The rounding of activations that do not depend on the image would otherwise count as a pattern of the images.
        alike = centred.norm() <= 4 * torch.finfo(torch.float32).eps * rows.norm()
        return torch.where(alike, 0.0, (centred @ centred.T).double())


def unbiased_hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """HSIC₁ of two (n, n) Gram matrices, n ≥ 4.

    Song et al. (2012), eq. 5; Nguyen et al. (2021), eq. 3.
    """
    n = len(k)
    # Zero diagonals: the similarity of an image with itself is what biases the usual estimate.
    k = k - torch.diag(k.diagonal())
    l = l - torch.diag(l.diagonal())  # noqa: E741
    rows_k = k.sum(1)
    rows_l = l.sum(1)
    means = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    return ((k * l).sum() + means - 2 / (n - 2) * (rows_k @ rows_l)) / (n * (n - 3))


@torch.no_grad()
def block_cka(
    before: nn.Module, after: nn.Module, batches: Iterable[Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, float | None]:
    """Linear CKA of each executed block, in network order.

    None where a block's activations are the same for all images.

    Args:
        before, after: backbones of one structure, both in eval mode; the same object twice costs one pass and gives 1.
        batches: images (B, 3, H, W); batches of fewer than four are skipped.
        dtype: autocast type of the forward passes.

    Raises:
        ValueError: no batch of four images or more, or the blocks differ.
    """
    names = blocks(before)
    if list(names) != list(blocks(after)):
        raise ValueError("CKA compares two networks of one structure, but their blocks differ.")
    sums: dict[str, Tensor] = {}
    for images in batches:
        if len(images) < SMALLEST_BATCH:
            continue
        first = _grams(before, images, dtype)
        second = first if after is before else _grams(after, images, dtype)
        for name, k in first.items():
            l = second[name]  # noqa: E741
            hsics = torch.stack([unbiased_hsic(k, l), unbiased_hsic(k, k), unbiased_hsic(l, l)])
            # Summed over batches before the quotient: a mean of quotients would be biased.
            sums[name] = sums[name] + hsics if name in sums else hsics
    if not sums:
        raise ValueError(f"CKA needs a batch of at least {SMALLEST_BATCH} images, but got none.")
    return {name: _ratio(*sums[name].tolist()) for name in names if name in sums}


def cka_report(values_by_block: dict[str, float | None]) -> dict[str, float | Curve]:
    """Metric `cka/mean` over the blocks and curve `cka` (block, cka)."""
    values = [value for value in values_by_block.values() if value is not None]
    curve = Curve({"block": list(values_by_block), "cka": list(values_by_block.values())}, NOTE)
    report: dict[str, float | Curve] = {CKA_MEAN.group: curve}
    if values:
        report[CKA_MEAN.name] = sum(values) / len(values)
    return report


def _grams(network: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    grams: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _activations(output, len(images))
            if tensor is not None:
                grams[name] = gram(tensor)

        return record

    hooks = [block.register_forward_hook(recorder(name)) for name, block in blocks(network).items()]
    try:
        with autocast(images.device, dtype):
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return grams


def _activations(output: Any, count: int) -> Tensor | None:
    """The first tensor with one row per image.

    Some blocks return their grid size or several streams.
    """
    outputs = output if isinstance(output, (tuple, list)) else [output]
    tensors = (o for o in outputs if isinstance(o, Tensor) and o.ndim > 1 and len(o) == count)
    return next(tensors, None)


def _ratio(hsic_kl: float, hsic_kk: float, hsic_ll: float) -> float | None:
    # An unbiased estimate can be negative, and is zero for constant activations: CKA is undefined there.
    return hsic_kl / math.sqrt(hsic_kk * hsic_ll) if hsic_kk > 0 and hsic_ll > 0 else None
