"""Pooled features of the pretrained backbone: computed once per weights, data and view, shared by all trials."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from trainables.core.backbone import Backbone
    from trainables.data.trial_data import StoreLike

BATCH = 256
KEPT = 64
"""Arrays that a process keeps mapped."""

_mapped: OrderedDict[Path, NDArray[np.float32]] = OrderedDict()


def cache_root(root: str | Path | None = None) -> Path:
    """The folder for features and demo networks: `root`, `$LUTHIER_CACHE`, or `~/.cache/luthier`."""
    return Path(root or os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier")


class FeatureCache:
    """Features on disk as `.npy`, memory-mapped; written by whoever needs them first."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = cache_root(root)

    def features(
        self,
        backbone: Backbone,
        store: StoreLike,
        split: str,
        count: int,
        view: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
    ) -> NDArray[np.float32]:
        """Features (count, D) of the first `count` images of a split, in the order of the store; read-only.

        Args:
            view: uint8 (B, H, W, 3) → float32 (B, 3, S, S), without augmentation.
        """
        text = f"{backbone.digest} {store.digest} {split} {backbone.data_config} {torch.device(device).type}"
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        path = self.root / "features" / f"{key}-{count}.npy"
        if path in _mapped:
            _mapped.move_to_end(path)
            return _mapped[path]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.exists():
                    _write(path, _compute(backbone, store, split, count, view, torch.device(device)))
        _mapped[path] = np.load(path, mmap_mode="r", allow_pickle=False)
        while len(_mapped) > KEPT:
            _mapped.popitem(last=False)
        return _mapped[path]


@torch.no_grad()
def _compute(
    backbone: Backbone,
    store: StoreLike,
    split: str,
    count: int,
    view: Callable[[Tensor], Tensor],
    device: torch.device,
) -> NDArray[np.float32]:
    images = store.images(split)[:count]
    module = backbone.module.to(device)
    try:
        # A copy per batch: the store's view is read-only memory, which torch would not respect.
        parts = [
            module(view(torch.tensor(images[i : i + BATCH]).to(device))).float().cpu().numpy()
            for i in range(0, count, BATCH)
        ]
    finally:
        module.to("cpu")
    return np.concatenate(parts) if parts else np.zeros((0, backbone.num_features), np.float32)


def _write(path: Path, features: NDArray[np.float32]) -> None:
    written = path.with_suffix(f".{os.getpid()}.tmp")
    with open(written, "wb") as file:
        np.save(file, features)
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)
