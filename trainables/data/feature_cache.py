"""Cache of the pretrained backbone's pooled features.

Computed once per weights, data and view, shared by all trials.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainables.models.micro_batch import MicroBatch
from trainables.specs.short_hash import short_hash
from trainables.storage.atomic_files import atomic_file
from trainables.storage.compute_once import cache_root, compute_once

if TYPE_CHECKING:
    from trainables.data.store import StoreLike
    from trainables.models.backbone import Backbone

log = logging.getLogger("luthier")

BATCH = 256
MAPPED_LIMIT = 64
"""Arrays that a process has mapped at a time."""

_mapped: OrderedDict[Path, NDArray[np.float32]] = OrderedDict()
"""Least recently used first."""


class FeatureCache:
    """Features on disk as `.npy`, memory-mapped; computed by the first trial that needs them.

    Images go through the network in the same batches however many are requested, so that an image's features are the
    same bits; a longer file therefore serves shorter requests.

    Args:
        root: see `trainables.storage.compute_once.cache_root`.
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
        """Features (count, D) of the first `count` images of a split.

        In the order of the store; read-only.

        Args:
            backbone: the pretrained network; it is not moved or changed.
            store: the images.
            split: one of the store's.
            count: number of images.
            view: uint8 (B, H, W, 3) → float32 (B, 3, S, S), without augmentation.
            device: of the computation.

        Raises:
            ValueError: the split has fewer images.
        """
        total = len(store.labels(split))
        if count > total:
            raise ValueError(f"Features of the first {count} images of {split} were asked for, but it has {total}.")
        device = torch.device(device)
        # Whole batches: a matrix product may round differently in a batch of another size.
        rows = min(total, -(-count // BATCH) * BATCH)
        # With the type of device: a GPU rounds differently from a CPU, and equal requests must get equal bits.
        key = [backbone.digest, store.digest, split, str(backbone.data_config), device.type]
        stem = self.root / "features" / short_hash(key, digits=24)

        def compute() -> NDArray[np.float32]:
            path = _array_path(stem, rows)
            _save(path, _compute(backbone, store.images(split)[:rows], view, device))
            return _map(path)

        features = compute_once(stem, lambda stem: _load_longer(stem, rows, backbone.num_features), compute)
        return features[:count]


def _array_path(stem: Path, rows: int) -> Path:
    return stem.with_name(f"{stem.name}-{rows}.npy")


def _load_longer(stem: Path, rows: int, width: int) -> NDArray[np.float32] | None:
    """The shortest readable array with at least `rows` rows; None = there is none."""
    sizes = sorted(int(path.stem.rpartition("-")[2]) for path in stem.parent.glob(f"{stem.name}-*.npy"))
    for size in sizes:
        if size < rows:
            continue
        path = _array_path(stem, size)
        try:
            features = _map(path)
        except (OSError, ValueError, EOFError) as error:
            log.warning("The stored features %s are damaged (%s) and are computed again.", path, error)
            continue
        # A flipped bit in the header may still give a valid shape.
        if features.shape == (size, width):
            return features
    return None


def _map(path: Path) -> NDArray[np.float32]:
    if path not in _mapped:
        # Never a pickle, which an .npy file may hold and which can run code.
        _mapped[path] = np.load(path, mmap_mode="r", allow_pickle=False)
        while len(_mapped) > MAPPED_LIMIT:
            # Drops the cache's reference alone: an array that is in use stays mapped.
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
    features = np.empty((len(images), backbone.num_features), np.float32)
    micro_batch = MicroBatch()

    def fill(start: int, end: int) -> None:
        # By micro-batches of the same images where memory runs out; their features may differ in the last bits then.
        for piece in micro_batch.pieces(end - start):
            rows = slice(start + piece.start, start + piece.stop)
            # A copy per batch: the store's view is read-only memory, which torch would not respect.
            batch = view(torch.tensor(images[rows]).to(device))
            features[rows] = module(batch).float().cpu().numpy()

    # Full float32 also on a GPU: these numbers are kept, and the linear probe's optimum is as good as they are.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for start in range(0, len(images), BATCH):
            end = min(start + BATCH, len(images))
            micro_batch.attempt(partial(fill, start, end), end - start, "computing features of")
    return features


def _save(path: Path, features: NDArray[np.float32]) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as file:  # given a path, np.save would append .npy
        np.save(file, features)
    # A map made before still shows the file that was replaced.
    _mapped.pop(path, None)
