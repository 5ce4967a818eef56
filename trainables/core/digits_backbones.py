"""The demo's two small networks, pretrained at first use on digits rendered from fonts: no download, real transfer."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

log = logging.getLogger("luthier")

SIDE = 32
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits_vit": (
        "vit_tiny_patch16_224",
        {"img_size": SIDE, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2},
    ),
    "digits_cnn": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64), "stem_width": 16}),
}
"""Name → timm architecture and its arguments."""
STEPS = {"digits_vit": 900, "digits_cnn": 400}
RATE = 2e-3
BATCH = 64
PER_CLASS = 1000
INPUT = {
    "input_size": (3, SIDE, SIDE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


def architecture(name: str, num_classes: int = 0) -> nn.Module:
    """The untrained network of one of `NETWORKS`."""
    base, arguments = NETWORKS[name]
    model: nn.Module = timm.create_model(base, num_classes=num_classes, **arguments)
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **INPUT, "num_classes": 10}
    return model


def pretrained_folder(name: str, cache: str | Path | None = None) -> Path:
    """The folder (timm's `local-dir` layout) with the pretrained network; made at first use, once per machine.

    It is found again by a digest of this recipe and of the glyphs' code, so that a change of either trains anew.
    """
    from trainables.data.features import cache_root

    folder = cache_root(cache) / "backbones" / f"{name}-{_recipe_digest()}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                log.info("Pretraining %s on printed digits (once; kept in %s)", name, folder)
                _publish(_pretrain(name), name, folder)
    return folder


def _pretrain(name: str) -> nn.Module:
    from trainables.data.digits import printed_digits

    images, labels = printed_digits(PER_CLASS, seed=0)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    targets = torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = architecture(name, num_classes=10).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
        for step in range(STEPS[name]):
            chosen = torch.randint(len(targets), (BATCH,))
            batch = _augment((pixels[chosen].float() / 255 - 0.5) / 0.5)
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS[name]))
            loss = functional.cross_entropy(model(batch), targets[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def _augment(images: torch.Tensor) -> torch.Tensor:
    """Dark on light and light on dark alike, at any contrast: a backbone that only knew black ink would know less."""
    sign = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, -1.0, 1.0)
    contrast = 0.5 + 0.5 * torch.rand(len(images), 1, 1, 1)
    return images * sign * contrast


def _publish(model: nn.Module, name: str, folder: Path) -> None:
    base, arguments = NETWORKS[name]
    written = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-"))
    config = {
        "architecture": base,
        "num_classes": 10,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": {**INPUT, "num_classes": 10, "classifier": model.default_cfg["classifier"]}
        | ({"first_conv": model.default_cfg["first_conv"]}),
    }
    (written / "config.json").write_text(json.dumps(config, indent=2))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, written / "model.safetensors")
    os.replace(written, folder)


def _recipe_digest() -> str:
    from trainables.data import digits

    text = inspect.getsource(sys.modules[__name__]) + inspect.getsource(digits)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
