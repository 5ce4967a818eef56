"""Pooled features of the pretrained backbone: computed once per weights, data and view, shared by all trials."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from trainables.storage.atomic_files import atomic_file
from trainables.storage.compute_once import cache_root

if TYPE_CHECKING:
    from trainables.data.store import StoreLike
    from trainables.models.backbone import Backbone

log = logging.getLogger("luthier")

BATCH = 256
KEPT = 64
"""Arrays that a process keeps mapped."""

_mapped: OrderedDict[Path, NDArray[np.float32]] = OrderedDict()


class FeatureCache:
    """Features on disk as `.npy`, memory-mapped; written by whoever needs them first.

    Images go through the network in fixed batches from the first on, so that an image's features are the same bits
    whichever number of images was asked for; a longer file therefore serves shorter requests.
    """

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
            backbone: the pretrained network, left where it is.
            store: where the images are.
            split: one of the store's.
            count: how many images from the first on.
            view: uint8 (B, H, W, 3) → float32 (B, 3, S, S), without augmentation.
            device: where to compute.

        Raises:
            ValueError: the split has fewer images.
        """
        total = len(store.labels(split))
        if count > total:
            raise ValueError(f"Features of the first {count} images of {split} were asked for, but it has {total}.")
        whole = min(total, -(-count // BATCH) * BATCH)
        text = f"{backbone.digest} {store.digest} {split} {backbone.data_config} {torch.device(device).type}"
        stem = hashlib.sha256(text.encode()).hexdigest()[:24]
        folder = self.root / "features"
        found = _find(folder, stem, whole, backbone.num_features)
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{stem}.lock"):
                found = _find(folder, stem, whole, backbone.num_features)
                if found is None:
                    path = folder / f"{stem}-{whole}.npy"
                    _write(path, _compute(backbone, store.images(split)[:whole], view, torch.device(device)))
                    found = _map(path)
        return found[:count]


def _find(folder: Path, stem: str, count: int, width: int) -> NDArray[np.float32] | None:
    """The shortest readable array with at least `count` rows; None if there is none."""
    sizes = sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{stem}-*.npy"))
    for size in sizes:
        if size < count:
            continue
        path = folder / f"{stem}-{size}.npy"
        try:
            found = _map(path)
        except (OSError, ValueError, EOFError) as error:
            log.warning("The stored features %s are damaged (%s) and are computed again.", path, error)
            continue
        if found.shape == (size, width):
            return found
    return None


def _map(path: Path) -> NDArray[np.float32]:
    if path not in _mapped:
        _mapped[path] = np.load(path, mmap_mode="r", allow_pickle=False)
        while len(_mapped) > KEPT:
            _mapped.popitem(last=False)
    _mapped.move_to_end(path)
    return _mapped[path]


@torch.no_grad()
def _compute(
    backbone: Backbone, images: NDArray[np.uint8], view: Callable[[Tensor], Tensor], device: torch.device
) -> NDArray[np.float32]:
    module = backbone.module
    if any(tensor.device != device for tensor in module.state_dict().values()):
        module = copy.deepcopy(module).to(device)  # the pristine network stays where it is
    found = np.empty((len(images), backbone.num_features), np.float32)
    # Full float32 also on a GPU: these numbers are kept, and the linear probe's optimum is as good as they are.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for i in range(0, len(images), BATCH):
            # A copy per batch: the store's view is read-only memory, which torch would not respect.
            batch = view(torch.tensor(images[i : i + BATCH]).to(device))
            found[i : i + BATCH] = module(batch).float().cpu().numpy()
    return found


def _write(path: Path, features: NDArray[np.float32]) -> None:
    with atomic_file(path) as written, open(written, "wb") as file:  # given a path, np.save would add .npy
        np.save(file, features)
    _mapped.pop(path, None)
