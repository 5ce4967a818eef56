"""Small things to test with: an image set in memory that can be learned, and two pretrained-looking networks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from trainables.specs.torch_threads import torch_threads

SIDE = 16
CLASSES = ("disc", "stripes", "cross", "corner")
ID_DOMAINS = ("bright", "dim")
OOD_DOMAINS = ("inverted", "noisy")
SIZES = {"train": 64, "val": 32, "test": 32, "ood/inverted": 32, "ood/noisy": 32}


@dataclass
class MemoryStore:
    """What `trainables.data.store.Store` offers, held in memory."""

    pixels: dict[str, NDArray[np.uint8]]
    targets: dict[str, NDArray[np.int64]]
    sources: dict[str, NDArray[np.int64]]
    classes: list[str] = field(default_factory=lambda: list(CLASSES))
    domains: list[str] = field(default_factory=lambda: [*ID_DOMAINS, *OOD_DOMAINS])
    digest: str = "synthetic-shapes"
    path: str = "memory"
    image_size: int = SIDE

    @property
    def splits(self) -> list[str]:
        return list(self.pixels)

    def images(self, split: str) -> NDArray[np.uint8]:
        return self.pixels[split]

    def labels(self, split: str) -> NDArray[np.int64]:
        return self.targets[split]

    def domain_ids(self, split: str) -> NDArray[np.int64]:
        return self.sources[split]

    def names(self, split: str) -> list[str]:
        return [f"{split}/{index}" for index in range(len(self.targets[split]))]

    def groups(self, split: str) -> NDArray[np.int64]:
        return np.full(len(self.targets[split]), -1, np.int64)

    def fraction(self, split: str, f: float) -> int:
        """Labels cycle through the classes, so that any multiple of four is a stratified prefix."""
        return max(len(CLASSES), round(len(self.targets[split]) * f))


def shapes() -> MemoryStore:
    """Four drawn shapes with noise, in a bright and a dim ID domain, and inverted and noisy OOD domains."""
    generator = np.random.default_rng(0)
    pixels, targets, sources = {}, {}, {}
    names = [*ID_DOMAINS, *OOD_DOMAINS]
    for split, count in SIZES.items():
        labels = np.arange(count) % len(CLASSES)
        if split.startswith("ood/"):
            domains = np.full(count, names.index(split.removeprefix("ood/")))
        else:
            domains = (np.arange(count) // len(CLASSES)) % len(ID_DOMAINS)
        images = [_draw(k, names[d], generator) for k, d in zip(labels.tolist(), domains, strict=True)]
        pixels[split], targets[split] = np.stack(images), labels.astype(np.int64)
        sources[split] = domains.astype(np.int64)
    return MemoryStore(pixels, targets, sources)


def _draw(label: int, domain: str, generator: np.random.Generator) -> NDArray[np.uint8]:
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + generator.integers(-1, 2, size=(2, 1, 1))
    mask = [
        x**2 + y**2 < 25,
        np.floor(x / 3) % 2 == 0,
        (np.abs(x) < 2) | (np.abs(y) < 2),
        (x < -1) & (y < -1),
    ][label]
    value = mask * (0.5 if domain == "dim" else 0.9)
    value = value + generator.normal(0, 0.3 if domain == "noisy" else 0.05, size=(SIDE, SIDE))
    value = 1 - value if domain == "inverted" else value
    return np.repeat((np.clip(value, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("test_vit", {"img_size": SIDE, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}),
    "cnn": ("test_resnet", {"channels": [8, 8, 16, 16], "stem_width": 8}),
    "hybrid": (
        "xcit_nano_12_p8_224",
        {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 1, "cls_attn_layers": 1, "num_heads": 2},
    ),
}
"""`hybrid` has both kinds of norm: BatchNorm in its stem and between its tokens, LayerNorm in its blocks."""


def _pretrain(model: nn.Module, width: int) -> None:
    generator = np.random.default_rng(1)
    head = nn.Linear(width, len(CLASSES))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    for step in range(60):
        labels = np.arange(32) % len(CLASSES)
        images = np.stack([_draw(k, ("dim", "inverted")[step % 2], generator) for k in labels.tolist()])
        inputs = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(head(model(inputs)), torch.from_numpy(labels)))
        optimizer.step()


def write_network(kind: str, folder: Path) -> Path:
    """A network of a few thousand parameters, pretrained for a second on dim and inverted shapes, in timm's `local-dir`
    layout. (Random networks would not do: their features are nearly constant.)"""
    architecture, arguments = NETWORKS[kind]
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=0, **arguments)
        _pretrain(model, model.num_features)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            **{k: model.pretrained_cfg[k] for k in ("first_conv", "classifier")},
            "input_size": [3, SIDE, SIDE],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 0,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shapes(folder: Path) -> Path:
    """`shapes()` as an Arrow store on disk, written here and not by the ingest: the layout is a contract."""
    import pyarrow as pa

    memory = shapes()
    folder.mkdir(parents=True)
    columns = [("image", pa.list_(pa.uint8(), SIDE * SIDE * 3)), ("label", pa.int64()), ("domain", pa.int64())]
    schema = pa.schema([*columns, ("name", pa.string())])
    file = folder / "data.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for split in memory.splits:
            pixels = pa.FixedSizeListArray.from_arrays(memory.images(split).reshape(-1), SIDE * SIDE * 3)
            rows = [pixels, memory.labels(split), memory.domain_ids(split)]
            names = [f"{split}/{i}" for i in range(len(memory.labels(split)))]
            writer.write_batch(pa.record_batch([*rows, names], schema=schema))
    content = file.read_bytes()
    manifest = {
        "format": 1,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "image_size": SIDE,
        "classes": memory.classes,
        "domains": memory.domains,
        "splits": memory.splits,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_images(root: Path) -> Path:
    """`shapes()` as a folder root/<domain>/<class>/<n>.png."""
    memory = shapes()
    for split in memory.splits:
        rows = zip(memory.images(split), memory.labels(split), memory.domain_ids(split), strict=True)
        for number, (pixels, label, domain) in enumerate(rows):
            folder = root / memory.domains[domain] / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{split.replace('/', '-')}-{number}.png")
    return root
