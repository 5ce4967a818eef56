"""The demo's two small networks, pretrained at first use on digits rendered from fonts: no download, real transfer."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from torch import nn
from torch.nn import functional

from trainables.specs.trial_spec import ModelSpec
from trainables.storage.atomic_files import atomic_folder
from trainables.storage.compute_once import cache_root

log = logging.getLogger("luthier")

SIDE = 32
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits_vit": (
        "vit_tiny_patch16_224",
        {
            "img_size": SIDE,
            "patch_size": 8,
            "embed_dim": 64,
            "depth": 4,
            "num_heads": 4,
            "mlp_ratio": 2,
            "class_token": False,
            "global_pool": "avg",
        },
    ),
    "digits_cnn": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64), "stem_width": 16}),
}
"""Name → timm architecture and its arguments."""
STEPS = {"digits_vit": 500, "digits_cnn": 400}
RATE = 3e-3
MUON_RATE = 0.03
WEIGHT_DECAY = 0.05
WARMUP = 50
BATCH = 64
PER_CLASS = 500
INPUT = {
    "input_size": (3, SIDE, SIDE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


def is_pretrained_here(spec: ModelSpec) -> bool:
    """Whether a model's weights are those that `pretrained_folder` makes: not random ones, and none of its user."""
    return spec.name in NETWORKS and spec.pretrained and spec.weights is None


def architecture(name: str, num_classes: int = 0, image_size: int | None = None) -> nn.Module:
    """The untrained network of one of `NETWORKS`; its weights are drawn from the caller's generator."""
    base, arguments = NETWORKS[name]
    sized = {"img_size": image_size} if image_size is not None and "img_size" in arguments else {}
    model: Any = timm.create_model(base, num_classes=num_classes, **{**arguments, **sized})
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **INPUT, "num_classes": 10}
    network: nn.Module = model
    return network


def pretrained_folder(name: str, cache: str | Path | None = None) -> Path:
    """The folder (timm's `local-dir` layout) with the pretrained network; made at first use, once per machine.

    It is found again by a digest of this recipe and of the glyphs' code, so that a change of either trains anew.

    Args:
        name: one of `NETWORKS`.
        cache: see `trainables.storage.compute_once.cache_root`.
    """
    folder = cache_root(cache) / "backbones" / f"{name}-{_recipe_digest()}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _make(name, folder)
    return folder


def _make(name: str, folder: Path) -> None:
    log.info("Pretraining %s on printed digits, once; it is kept in %s", name, folder)
    began = time.perf_counter()
    with _one_thread():
        model = _pretrain(name)
    _publish(model, name, folder)
    log.info("Pretrained %s in %.0f s", name, time.perf_counter() - began)


def _pretrain(name: str) -> nn.Module:
    from trainables.demo.digits import printed_digits

    images, labels = printed_digits(PER_CLASS, seed=0)
    pixels = torch.tensor(images).permute(0, 3, 1, 2)
    targets = torch.tensor(labels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = architecture(name, num_classes=10).train()
        _order_positions(model)
        optimizers = _optimizers(model)
        for step in range(STEPS[name]):
            chosen = torch.randint(len(targets), (BATCH,))
            batch = _augment((pixels[chosen].float() / 255 - 0.5) / 0.5)
            loss = functional.cross_entropy(model(batch), targets[chosen], label_smoothing=0.1)
            model.zero_grad()
            torch.autograd.backward(loss)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * _factor(step, STEPS[name])
                optimizer.step()
    return model.eval()


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of transformer blocks: within half a minute on one core AdamW alone takes the
    vision transformer to 60 % on unseen glyphs, both together to 97 %."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
    ]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=MUON_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return found


@torch.no_grad()
def _order_positions(model: nn.Module) -> None:
    """Start position embeddings from sines and cosines, where there are any: order need not be learned first."""
    embedding = getattr(model, "pos_embed", None)
    if isinstance(embedding, nn.Parameter):
        grid = list(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
        waves = build_sincos2d_pos_embed(grid, dim=embedding.shape[-1])
        embedding.copy_(waves.reshape(embedding.shape))


def _factor(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _augment(images: torch.Tensor) -> torch.Tensor:
    """Dark on light and light on dark alike, at any contrast: a backbone that only knew black ink would know less."""
    sign = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, -1.0, 1.0)
    contrast = 0.5 + 0.5 * torch.rand(len(images), 1, 1, 1)
    return images * sign * contrast


def _publish(model: nn.Module, name: str, folder: Path) -> None:
    base, arguments = NETWORKS[name]
    cfg: dict[str, Any] = model.default_cfg  # type: ignore[assignment]
    config = {
        "architecture": base,
        "num_classes": 10,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            **INPUT,
            "num_classes": 10,
            "classifier": cfg["classifier"],
            "first_conv": cfg["first_conv"],
        },
    }
    with atomic_folder(folder) as written:
        (written / "config.json").write_text(json.dumps(config, indent=2))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, written / "model.safetensors")


def _recipe_digest() -> str:
    from trainables.demo import digits

    text = inspect.getsource(sys.modules[__name__]) + inspect.getsource(digits)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def _one_thread() -> Iterator[None]:
    """The weights must not depend on how many cores the process that happens to be first may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
