"""The built-in source: handwritten digits in distribution, shifted and printed digits out of distribution."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orchestrator.ingest.source import ArraySource, Sample
from trainables.data.splits import TEST, TRAIN, VAL, stratified_split
from trainables.demo import digits
from trainables.specs.seeds import stream_seed

ID_DOMAIN = "handwritten"
OOD_DOMAINS = (*digits.SHIFTS, "printed")
PRINTED_PER_CLASS = 50
_SPLITS = {TRAIN: "train", VAL: "val", TEST: "test"}


@dataclass
class DigitsSource(ArraySource):
    """Images in memory."""

    pixels: list[NDArray[np.uint8]] = field(default_factory=list)

    def arrays(self) -> Iterator[tuple[int, NDArray[np.uint8] | NDArray[np.uint16]]]:
        first = 0
        for pixels in self.pixels:
            yield first, pixels
            first += len(pixels)


@functools.lru_cache(maxsize=1)  # a study scans twice: for its plan and for its store
def scan_digits(val_fraction: float, test_fraction: float, seed: int) -> DigitsSource:
    """Handwritten digits (ID) and the OOD domains `OOD_DOMAINS`.

    The shifted domains are derived from the handwritten digits of the test split, so that no OOD image is a transformed
    training image. The printed ones, the kind that the demo networks were pretrained on, are fresh renderings; they
    measure retention.
    """
    images, labels = digits.handwritten_digits()
    codes = stratified_split(labels, np.zeros_like(labels), val_fraction, test_fraction, seed)
    test = np.flatnonzero(codes == TEST)
    pixels = [images]
    samples = [
        Sample(f"{ID_DOMAIN}/{i}", str(label), ID_DOMAIN, _SPLITS[int(code)], None)
        for i, (label, code) in enumerate(zip(labels, codes, strict=True))
    ]
    for kind in digits.SHIFTS:
        pixels.append(digits.shift(images[test], kind, stream_seed(seed, "shift", kind)))
        samples += [Sample(f"{kind}/{i}", str(labels[i]), kind, None, None) for i in test]
    printed, printed_labels = digits.printed_digits(PRINTED_PER_CLASS, stream_seed(seed, "printed"))
    pixels.append(printed)
    samples += [Sample(f"printed/{i}", str(label), "printed", None, None) for i, label in enumerate(printed_labels)]
    return DigitsSource(
        kind="digits",
        layout="built-in digits",
        samples=samples,
        digest=_recipe_digest(),
        evaluation_domains=frozenset(OOD_DOMAINS),
        pixels=pixels,
    )


def _recipe_digest() -> str:
    """SHA-256 of the code that makes the digits."""
    text = inspect.getsource(digits) + inspect.getsource(sys.modules[__name__])
    return hashlib.sha256(text.encode()).hexdigest()
