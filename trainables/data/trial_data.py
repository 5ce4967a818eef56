"""Data of one trial: image batches on its device, and cached pretrained features.

In this order: selection and order of a trial's samples, as pure functions of its spec and a seed; `TrialData`, which
loads them in this order.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from trainables.data.feature_cache import FeatureCache
from trainables.data.masked_pictures import MaskedPictures
from trainables.data.square_images import Batch, SampleTransform, SquareImages, to_device
from trainables.data.store import Indices, StoreLike, has_masks
from trainables.data.transforms import BatchTransform
from trainables.models.device import uses_channels_last
from trainables.specs.metrics import HELD_OUT
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import TrialSpec

if TYPE_CHECKING:
    from trainables.models.backbone import Backbone


def batch_positions(
    count: int, size: int, seed: int | None, drop_last: bool, balance: Indices | None = None
) -> list[Indices]:
    """Split positions 0…count-1 into batches of `size`, shuffled by `seed` (None = in order).

    With `balance`, the labels (count,) of the positions, a shuffled order is `balanced_order`.

    `drop_last` omits a last, smaller batch unless it is the only one: BatchNorm statistics of a remainder of a few
    images are noise, but a split smaller than a batch must still train.

    Example:
        >>> [batch.tolist() for batch in batch_positions(5, 2, seed=None, drop_last=True)]
        [[0, 1], [2, 3]]
        >>> [batch.tolist() for batch in batch_positions(5, 8, seed=None, drop_last=True)]
        [[0, 1, 2, 3, 4]]
    """
    if seed is None:
        order = np.arange(count)
    elif balance is not None:
        order = balanced_order(balance, seed)
    else:
        order = np.random.default_rng(seed).permutation(count)
    omit_remainder = drop_last and count > size
    end = count - count % size if omit_remainder else count
    return [order[i : i + size].astype(np.int64) for i in range(0, end, size)]


def balanced_order(labels: Indices, seed: int) -> Indices:
    """As many positions as there are labels, all classes equally often.

    In random order; the counts of classes differ by one at most.

    Images of a small class come several times, equally often (to one); of a large class a random part comes, each
    image at most once.

    Example:
        >>> order = balanced_order(np.array([0, 0, 0, 0, 0, 1]), seed=0)
        >>> np.bincount(np.array([0, 0, 0, 0, 0, 1])[order]).tolist()
        [3, 3]
    """
    random = np.random.default_rng(seed)
    classes = np.unique(labels)
    shares = np.full(len(classes), len(labels) // len(classes))
    # Classes that get one more take turns from epoch to epoch.
    shares[random.permutation(len(classes))[: len(labels) % len(classes)]] += 1
    parts = []
    for label, share in zip(classes, shares, strict=True):
        members = np.flatnonzero(labels == label)
        rounds = [random.permutation(members) for _ in range(-(-int(share) // len(members)))]
        parts += [np.concatenate(rounds)[:share]] if rounds else []
    # The parts stand class by class.
    return random.permutation(np.concatenate(parts))


def class_counts(spec: TrialSpec, store: StoreLike) -> tuple[int, ...]:
    """Training samples of each class of the store, in a trial."""
    labels = np.concatenate([store.labels(source)[indices] for source, indices in select_samples(spec, store)["train"]])
    # `minlength`: a class without a training sample counts 0, and keeps its place.
    return tuple(np.bincount(labels, minlength=len(store.classes)).tolist())


def select_samples(spec: TrialSpec, store: StoreLike) -> dict[str, list[tuple[str, Indices]]]:
    """Samples of each split: (split of the store, ascending positions in it).

    A list of such pairs per split. `train` is the spec's fraction, of draw 0 its nested prefix, of another draw equally
    many samples of each class, or the whole OOD domain `train_on`. The training and
    validation images of a held-out domain move from `train` and `val` to the split `held_out`, on which a fold is
    scored; images of other domains that are equal or nearly equal to one of them are left out. Of a refit, `train` has
    the validation images, too, and there is no split `val`.

    Raises:
        ValueError: the held-out domain is not an ID domain, or the only one; `train_on` is not an OOD domain.
    """
    parts = {split: [(split, np.arange(len(store.labels(split)), dtype=np.int64))] for split in store.splits}
    if spec.shared.train_on is not None:
        return _oracle(spec.shared.train_on, parts)
    # The training split is stored in nested order: each prefix is a stratified sample.
    used = store.fraction("train", spec.shared.train_fraction)
    parts["train"] = [("train", redrawn(store.labels("train"), used, spec.train_draw))]
    if spec.role == "refit":
        parts["train"] += parts.pop("val")
        return parts
    if spec.held_out is None:
        return parts
    id_domains = [store.domains[i] for i in np.unique(store.domain_ids("train"))]
    if spec.held_out not in id_domains:
        raise ValueError(
            f"A held-out domain is one of the ID domains {', '.join(id_domains)}, but got {spec.held_out!r}."
        )
    held_out_id = store.domains.index(spec.held_out)
    parts[HELD_OUT] = [(split, np.flatnonzero(store.domain_ids(split) == held_out_id)) for split in ("train", "val")]
    tested = np.unique(np.concatenate([store.groups(split)[indices] for split, indices in parts[HELD_OUT]]))
    for split in ("train", "val"):
        source, indices = parts[split][0]
        # Nor on copies of the held-out images: the fold would measure how well they are remembered.
        is_copy = np.isin(store.groups(source)[indices], tested[tested >= 0])
        remaining = indices[(store.domain_ids(source)[indices] != held_out_id) & ~is_copy]
        parts[split] = [(source, remaining)]
        if len(remaining) == 0:
            raise ValueError(
                f"Without the held-out domain {spec.held_out!r} the {split} split must keep images, but it keeps none. "
                f"The ID domains are {', '.join(id_domains)}."
            )
    return parts


def redrawn(labels: Indices, used: int, draw: int) -> Indices:
    """Ascending positions of a stratified sample that has as many samples of each class as the first `used`.

    Draw 0 is these themselves. Of one draw a smaller sample is contained in a larger one.

    Args:
        labels: (n,) of all samples, in nested order.
        draw: number of the sample.

    Example:
        >>> redrawn(np.array([0, 1, 0, 0, 1, 0]), 3, draw=0).tolist()
        [0, 1, 2]
    """
    if draw == 0:
        return np.arange(used, dtype=np.int64)
    parts = []
    for label, count in zip(*np.unique(labels[:used], return_counts=True), strict=True):
        random = np.random.default_rng(stream_seed(draw, "sample", int(label)))
        parts.append(random.permutation(np.flatnonzero(labels == label))[:count])
    return np.sort(np.concatenate(parts))


def _oracle(domain: str, parts: dict[str, list[tuple[str, Indices]]]) -> dict[str, list[tuple[str, Indices]]]:
    """Replace `train` by a whole OOD domain; `val` still holds the ID domains."""
    if f"ood/{domain}" not in parts:
        domains = ", ".join(split.removeprefix("ood/") for split in parts if split.startswith("ood/"))
        raise ValueError(f"An oracle reference trains on an OOD domain ({domains or 'none'}), but got {domain!r}.")
    return {**parts, "train": parts[f"ood/{domain}"]}


_SCALE_SAMPLES = 1024
"""Number of training images for the mean squared feature norm. The training split is stored in nested stratified
order, so that any prefix is a stratified sample."""


class TrialData:
    """Batches, labels and pretrained features of a trial's splits.

    The splits are `train`, `val`, `test`, `ood/<domain>` and, for a trial with `spec.held_out`, `held_out`, after
    `train_fraction` and the held-out domain have been applied.

    Args:
        spec: the trial, with fraction, augmentation and batch sizes.
        store: the opened store.
        backbone: the pristine pretrained backbone; its normalisation, input size and features are used.
        device: device of the batches.
        reference: the pristine network on `device`, unless it is `backbone.module`.
        transform: the task's `trainables.tasks.base.Task.transform`; None = labels unchanged.
        recorded: of a refit, the metrics of the trial whose configuration is trained again; see `recorded_choice`.

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
        transform: SampleTransform | None = None,
        recorded: Mapping[str, float] | None = None,
    ) -> None:
        self.spec = spec
        self.store = store
        self.backbone = backbone
        self.device = torch.device(device)
        self.reference = backbone.module if reference is None else reference
        self._loader = _loader(spec, store, backbone, self.device, transform)
        config = backbone.data_config
        self._normalisation = BatchTransform(config.mean, config.std, config.image_size, ())
        self._parts = select_samples(spec, store)
        self._recorded = recorded
        self._cache = FeatureCache(spec.shared.cache)
        self.first_delivery: float | None = None

    @property
    def has_validation(self) -> bool:
        """Whether validation images are kept apart; False for a refit, whose choices are `recorded_choice`."""
        return "val" in self._parts

    def recorded_choice(self, name: str) -> float:
        """What an earlier trial of the configuration chose on validation, by its recorded name.

        Raises:
            ValueError: it has none on record.
        """
        value = (self._recorded or {}).get(name)
        if value is None:
            raise ValueError(
                f"A refit has no validation images to choose on and takes over {name} from the record of a trial, but "
                "that trial has none. Export the trial's own weights, without a refit."
            )
        return value

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
        """Evaluation-only domains."""
        return [split.removeprefix("ood/") for split in self.store.splits if split.startswith("ood/")]

    @property
    def train_size(self) -> int:
        """Number of training images of this trial."""
        return self.size("train")

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per pass over the training split.

        A last, smaller batch counts only if it is alone.
        """
        return max(1, self.train_size // self.spec.shared.batch_size)

    def size(self, split: str) -> int:
        """Number of images of a split."""
        return sum(len(indices) for _, indices in self._part(split))

    def labels(self, split: str) -> Indices:
        """Labels (n,) int64 in the order of `batches` without shuffling."""
        return np.concatenate([self.store.labels(source)[indices] for source, indices in self._part(split)])

    def names(self, split: str) -> list[str]:
        """Origin of each sample within the source, in the order of `batches` without shuffling."""
        names: list[str] = []
        for source, indices in self._part(split):
            stored = self.store.names(source)
            names += [stored[index] for index in indices.tolist()]
        return names

    def domain_ids(self, split: str) -> Indices:
        """Domains (n,) int64, indices into the store's `domains`, in the order of `batches` without shuffling."""
        return np.concatenate([self.store.domain_ids(source)[indices] for source, indices in self._part(split)])

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
        """Batches of normalised images and targets of a split as a loss takes them, on the device.

        Images are (B, 3, H, W) float32, targets labels (B,) int64 or masks (B, H, W) uint8, unless the task's transform
        returns others.

        Args:
            split: see the class.
            batch_size: None = the spec's, for training if a seed is given, else for evaluation.
            augment_seed: seed of the spec's augmentation, combined with the batch's number; None = none.
            shuffle_seed: seed of the order; None = as stored.
            drop_last: omit a last, smaller batch, unless it is the only one.
            start: number of batches to skip (a unit that continues in the middle of an epoch).
        """
        training = augment_seed is not None or shuffle_seed is not None
        shared = self.spec.shared
        size = batch_size or (shared.batch_size if training else shared.eval_batch_size)
        for number, batch in enumerate(self._plan(split, size, shuffle_seed, drop_last)):
            # Counted all the same: a batch's number seeds its augmentation.
            if number < start:
                continue
            # Seeded per batch, so that a unit resumed at `start` reproduces its augmentation.
            seed = None if augment_seed is None else stream_seed(augment_seed, number)
            images, targets = self._loader.training(batch, seed)
            self._delivered()
            yield self._memory_format(images), targets

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Any]]:
        """Batches of a split as they are scored, in its order and on the device.

        Of pictures with masks, views and `MaskViews`; otherwise what `batches` gives.
        """
        size = self.spec.shared.eval_batch_size
        first = 0
        for batch in self._plan(split, size, None, drop_last=False):
            for images, targets in self._loader.evaluation(batch, first):
                self._delivered()
                yield self._memory_format(images), targets
            first += sum(len(indices) for _, indices, _ in batch)

    def pixels_of(self, images: Tensor) -> Tensor:
        """Pixels (B, H, W, 3) uint8 of normalised images (B, 3, H, W), as the network sees them."""
        return self._normalisation.pixels_of(images)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels (B, H, W, 3) uint8 that are neither resized nor cropped → images as `batches` gives them."""
        return self._memory_format(self._normalisation.normalised(pixels))

    def view_of(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Square pictures (B, N, N, 3) uint8 → images as `batches` gives them, resized by Pillow and cropped."""
        config = self.backbone.data_config
        resampling = Image.Resampling[config.interpolation.upper()]
        side = (config.stored_size, config.stored_size)
        resized = np.stack([np.asarray(Image.fromarray(picture).resize(side, resampling)) for picture in pictures])
        return self._memory_format(self._normalisation(to_device(resized, self.device)))

    def features(self, split: str) -> NDArray[np.float32]:
        """Pooled features (n, D) of the PRETRAINED backbone in eval mode on centre crops.

        In the order of `batches` without shuffling; see `trainables.data.feature_cache`.
        """
        return np.concatenate([self._cached_features(source, indices) for source, indices in self._part(split)])

    def feature_batches(
        self, features: Tensor, labels: Tensor, *, shuffle_seed: int, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of precomputed features (n, D) and labels (n,) on the device.

        The same samples in the same order as `batches("train", shuffle_seed=…, drop_last=True)`.
        """
        balance = self._balance("train")
        plan = batch_positions(len(features), self.spec.shared.batch_size, shuffle_seed, True, balance)
        for positions in plan[start:]:
            rows = to_device(positions, features.device)
            yield features.index_select(0, rows), labels.index_select(0, rows)

    def mean_square_norm(self) -> float:
        """Mean ‖φ‖² of the pretrained features of (up to 1024) training images of this trial."""
        source, indices = self._part("train")[0]
        sample = self._cached_features(source, indices[:_SCALE_SAMPLES])
        # In float64: the head's learning rate is a quotient of this number.
        return float(np.square(sample, dtype=np.float64).sum(1).mean())

    @property
    def cache_key(self) -> str:
        """Cache key of solutions on `features("train")` and `features("val")`: sixteen hex digits.

        Covers weights, data, preprocessing, fraction and held-out domain. A solution that depends on anything else must
        not be cached under this key alone.
        """
        digest = hashlib.sha256()
        for name in (self.backbone.digest, self.store.digest, repr(self.backbone.data_config)):
            digest.update(name.encode() + b"\n")
        for source, indices in self._part("train") + self._parts.get("val", []):
            # The header delimits the indices, so that different selections never give the same bytes.
            digest.update(f"{source} {len(indices)}\n".encode() + indices.tobytes())
        return digest.hexdigest()[:16]

    @property
    def solution_folder(self) -> Path:
        """Folder of closed-form solutions on these features, shared by all trials with the same `cache_key`."""
        return self._cache.root / "solutions" / self.cache_key

    def _part(self, split: str) -> list[tuple[str, Indices]]:
        if split not in self._parts:
            raise ValueError(f"A split is one of {', '.join(self._parts)}, but got {split!r}.")
        return self._parts[split]

    def _plan(self, split: str, size: int, seed: int | None, drop_last: bool) -> Iterator[Batch]:
        """Batches of a split. Only a shuffled one mixes two splits of the store."""
        parts = self._part(split)
        if seed is None:
            for source, indices in parts:
                for positions in batch_positions(len(indices), size, None, drop_last):
                    yield [(source, indices[positions], np.arange(len(positions)))]
            return
        ends = np.cumsum([len(indices) for _, indices in parts])
        for positions in batch_positions(int(ends[-1]), size, seed, drop_last, self._balance(split)):
            owners = np.searchsorted(ends, positions, side="right")
            rows = [np.flatnonzero(owners == owner) for owner in range(len(parts))]
            yield [
                (source, indices[positions[row] - (end - len(indices))], row)
                for (source, indices), end, row in zip(parts, ends, rows, strict=True)
                if len(row)
            ]

    def _balance(self, split: str) -> Indices | None:
        """The labels by which a split is balanced where it is shuffled; None = it is not."""
        return self.labels(split) if split == "train" and self.spec.shared.sampling == "balanced" else None

    def _cached_features(self, source: str, indices: Indices) -> NDArray[np.float32]:
        # The cache holds prefixes of a split: a small fraction needs no features of the rest.
        count = int(indices.max()) + 1
        assert isinstance(self._loader, SquareImages), "only classification has cached features"
        view = self._loader.center_crop
        features = self._cache.features(self.backbone, self.store, source, count, view, self.device)
        self._delivered()
        return np.asarray(features[indices])

    def _memory_format(self, images: Tensor) -> Tensor:
        if not uses_channels_last(images.device, self.spec.shared.channels_last):
            return images
        return images.contiguous(memory_format=torch.channels_last)

    def _delivered(self) -> None:
        if self.first_delivery is None:
            self.first_delivery = time.perf_counter()


class BatchLoader(Protocol):
    """Samples of a store as batches on a device."""

    def training(self, batch: Batch, seed: int | None) -> tuple[Tensor, Tensor]:
        """Images and targets as a loss takes them, in the order of the batch's rows.

        Args:
            seed: of the batch's augmentation; None = none.
        """

    def evaluation(self, batch: Batch, first: int) -> Iterator[tuple[Tensor, Any]]:
        """Images and targets as they are scored, in as many batches as needed.

        Args:
            first: position of the batch's first sample among those of its split.
        """


def _loader(
    spec: TrialSpec,
    store: StoreLike,
    backbone: Backbone,
    device: torch.device,
    transform: SampleTransform | None,
) -> BatchLoader:
    """The loader of a store, by what lies in it."""
    shared = spec.shared
    if has_masks(store):
        return MaskedPictures(store, backbone.data_config, shared.augment, shared.evaluation, device)
    return SquareImages(store, backbone.data_config, shared.augment, transform, device)
