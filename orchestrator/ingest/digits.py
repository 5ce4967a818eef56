"""The built-in data: handwritten digits (ID); inverted, rotated, noisy and blurred held-out ones and printed digits
(OOD)."""

from __future__ import annotations

import hashlib
import inspect
from functools import partial

import numpy as np
from numpy.typing import NDArray

from orchestrator.ingest.images import resize
from orchestrator.ingest.samples import Listing, Sample
from trainables.data import digits

HANDWRITTEN, PRINTED = "handwritten", "printed"
HELD_OUT = 597
"""Handwritten digits, the last of the set (other writers than most of the first), that only the OOD domains show."""
PRINTED_PER_CLASS = 60


def list_digits() -> Listing:
    """All domains of the built-in data."""
    images, labels = digits.handwritten_digits()
    samples = _samples(HANDWRITTEN, images[:-HELD_OUT], labels[:-HELD_OUT])
    for kind in digits.SHIFTS:
        samples += _samples(kind, digits.shift(images[-HELD_OUT:], kind, seed=0), labels[-HELD_OUT:])
    samples += _samples(PRINTED, *digits.printed_digits(PRINTED_PER_CLASS, seed=1))
    fingerprint = hashlib.sha256(inspect.getsource(digits).encode()).hexdigest()
    return Listing(samples, "built-in digits", fingerprint)


def _samples(domain: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> list[Sample]:
    return [Sample(f"{domain}[{i}]", str(label), domain, partial(_decode, images, i)) for i, label in enumerate(labels)]


def _decode(images: NDArray[np.uint8], row: int, side: int, interpolation: str) -> NDArray[np.uint8]:
    return resize(images[row], side, interpolation)
