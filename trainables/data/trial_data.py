"""The data of one trial: which samples it may see, as batches on its device or as pretrained features."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainables.core.task import TrialSpec, stream_seed
from trainables.data.pixels import gather_images, to_device
from trainables.data.samples import batch_positions, select_samples
from trainables.data.store_like import Indices, StoreLike

if TYPE_CHECKING:
    from trainables.core.backbone import Backbone

_SCALE_SAMPLES = 1024
"""How many training images the mean squared feature norm is taken over. The training split is stored in nested
stratified order, so that any prefix is a stratified sample."""


class TrialData:
    """Batches, labels and pretrained features of the splits `train`, `val`, `test`, `ood/<domain>` and, for a trial
    with `spec.held_out`, `held_out`; `train_fraction` and the held-out domain are already taken into account.

    Args:
        spec: the trial; its task says fraction, augmentation and batch sizes.
        store: the opened store.
        backbone: the pristine pretrained backbone (its normalisation and crop are used, and its features).
        device: where batches go.
        reference: the pristine network on `device`, if it is not `backbone.module`.

    Raises:
        ValueError: `spec.held_out` is not an ID domain, or leaves no training image.
    """

    def __init__(
        self,
        spec: TrialSpec,
        store: StoreLike,
        backbone: Backbone,
        device: torch.device | str,
        reference: nn.Module | None = None,
    ) -> None:
        from trainables.data.features import FeatureCache
        from trainables.data.transforms import BatchTransform

        self.spec, self.store, self.backbone = spec, store, backbone
        self.device = torch.device(device)
        self.reference = backbone.module if reference is None else reference
        config = backbone.data_config
        shape = (config.mean, config.std, config.image_size)
        self._view = BatchTransform(*shape, ())
        self._augmented = BatchTransform(*shape, tuple(spec.task.augment))
        self._parts = select_samples(spec, store)
        self._cache = FeatureCache(spec.task.cache)
        self.first_delivery: float | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> TrialData:
        return self  # read-only: a copied strategy shares it

    @property
    def classes(self) -> list[str]:
        """Class names, by label."""
        return self.store.classes

    @property
    def num_classes(self) -> int:
        """K, the number of logits."""
        return len(self.store.classes)

    @property
    def ood_domains(self) -> list[str]:
        """Names of the domains that are only evaluated."""
        return [s.removeprefix("ood/") for s in self.store.splits if s.startswith("ood/")]

    @property
    def train_size(self) -> int:
        """Number of training images of this trial."""
        return self.size("train")

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the training split; a last, smaller batch counts only if it is alone."""
        return max(1, self.train_size // self.spec.task.batch_size)

    def size(self, split: str) -> int:
        """Number of images of a split."""
        return sum(len(indices) for _, indices in self._part(split))

    def labels(self, split: str) -> Indices:
        """Labels (n,) int64 in the order of `batches` without shuffling."""
        return np.concatenate([self.store.labels(source)[indices] for source, indices in self._part(split)])

    def batches(
        self,
        split: str,
        *,
        batch_size: int | None = None,
        augment_seed: int | None = None,
        shuffle_seed: int | None = None,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of a split: images (B, 3, H, W) float32, normalised, on the device; labels (B,) int64.

        Args:
            split: see the class.
            batch_size: None = the task's, for training if a seed is given, else for evaluation.
            augment_seed: augment as the task says, drawn from this seed and the batch's number; None = centre crop.
            shuffle_seed: order; None = as stored.
            drop_last: leave out a last, smaller batch, unless it is the only one.
            start: number of batches to skip (a unit that continues in the middle of an epoch).
        """
        training = augment_seed is not None or shuffle_seed is not None
        task = self.spec.task
        size = batch_size or (task.batch_size if training else task.eval_batch_size)
        generator = torch.Generator(self.device) if augment_seed is not None and task.augment else None
        for number, (source, indices) in enumerate(self._plan(split, size, shuffle_seed, drop_last)):
            if number < start:
                continue
            raw = gather_images(self.store, source, indices, self.device)
            labels = to_device(self.store.labels(source)[indices], self.device)
            if generator is None or augment_seed is None:
                images = self._view(raw)
            else:
                generator.manual_seed(stream_seed(augment_seed, number))
                images = self._augmented(raw, generator)
            self._delivered()
            yield self._memory_format(images), labels

    def features(self, split: str) -> NDArray[np.float32]:
        """Pooled features (n, D) of the PRETRAINED backbone in eval mode on centre crops, in the order of `batches`
        without shuffling; computed once per weights, data and view, then read from disk."""
        return np.concatenate([self._cached_features(source, indices) for source, indices in self._part(split)])

    def feature_batches(
        self, features: Tensor, labels: Tensor, *, shuffle_seed: int, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of precomputed features (n, D) and labels (n,) on the device: the same samples in the same
        order as `batches("train", shuffle_seed=…, drop_last=True)`."""
        plan = batch_positions(len(features), self.spec.task.batch_size, shuffle_seed, drop_last=True)
        for positions in plan[start:]:
            rows = to_device(positions, features.device)
            yield features.index_select(0, rows), labels.index_select(0, rows)

    def mean_square_norm(self) -> float:
        """mean ‖φ‖² of the pretrained features of (up to 1024) training images of this trial."""
        source, indices = self._part("train")[0]
        sample = self._cached_features(source, indices[:_SCALE_SAMPLES])
        return float(np.square(sample, dtype=np.float64).sum(1).mean())

    @property
    def cache_key(self) -> str:
        """Sixteen hex digits that name what `features("train")` and `features("val")` depend on: weights, data, view,
        fraction and held-out domain. A solution that depends on nothing else may be stored under it."""
        digest = hashlib.sha256()
        for name in (self.backbone.digest, self.store.digest, repr(self.backbone.data_config)):
            digest.update(name.encode() + b"\n")
        for source, indices in self._part("train") + self._part("val"):
            digest.update(f"{source} {len(indices)}\n".encode() + indices.tobytes())
        return digest.hexdigest()[:16]

    @property
    def solution_folder(self) -> Path:
        """Folder for closed-form solutions on the features of this data, shared by all trials that see the same."""
        return self._cache.root / "solutions" / self.cache_key

    def _part(self, split: str) -> list[tuple[str, Indices]]:
        if split not in self._parts:
            raise ValueError(f"A split is one of {', '.join(self._parts)}, but got {split!r}.")
        return self._parts[split]

    def _plan(self, split: str, size: int, seed: int | None, drop_last: bool) -> list[tuple[str, Indices]]:
        return [
            (source, indices[positions])
            for source, indices in self._part(split)
            for positions in batch_positions(len(indices), size, seed, drop_last)
        ]

    def _cached_features(self, source: str, indices: Indices) -> NDArray[np.float32]:
        count = int(indices.max()) + 1
        features = self._cache.features(self.backbone, self.store, source, count, self._view, self.device)
        self._delivered()
        return np.asarray(features[indices])

    def _memory_format(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if images.is_cuda else images

    def _delivered(self) -> None:
        if self.first_delivery is None:
            self.first_delivery = time.perf_counter()
