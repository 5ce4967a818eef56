"""Small image folders to test with: each picture differs from all others, its colour tells its class and domain."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from orchestrator.ingest.pipeline import IngestRequest, ingest
from trainables.data.store import Store

CLASSES = ("ant", "bee", "cat")


def picture(number: int, width: int = 20, height: int = 16) -> Image.Image:
    """Noise, decided by a number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(root: Path, counts: Mapping[str, int], first: int = 0) -> int:
    """Write `counts[folder]` PNG files into each folder below `root`; returns the next free number."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            picture(first).save(root / folder / f"{first:04d}.png")
            first += 1
    return first


def domains(root: Path, names: Sequence[str] = ("photo", "sketch"), count: int = 8) -> Path:
    """`root/<domain>/<class>/*` with `count` pictures of each class of each domain."""
    fill(root, {f"{domain}/{name}": count for domain in names for name in CLASSES})
    return root


def read(root: Path, into: Path, source: str = "folder", **fields: Any) -> Store:
    """Ingest with small defaults: 16 pixels, one worker."""
    request = IngestRequest(source=source, root=str(root), **{"image_size": 16, "interpolation": "bilinear", **fields})
    return ingest(request, into, workers=1)


def png_claiming(width: int, height: int) -> bytes:
    """A valid PNG of one bit per pixel, all black: tiny as a file, huge when it is decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(packer.compress(row * 64) for _ in range(height // 64)) + packer.compress(row * (height % 64))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data + packer.flush()) + chunk(b"IEND", b"")
