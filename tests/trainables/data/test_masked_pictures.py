"""Training crops and evaluation views of pictures with masks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.mask_store import MaskMemoryStore, rectangles
from trainables.data.masked_pictures import MaskedPictures, windows
from trainables.data.store import IGNORED
from trainables.models.backbone import DataConfig
from trainables.specs.augmentations import MASK_AUGMENTATIONS

SIDE = 16
CONFIG = DataConfig(
    mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear", crop_pct=1.0, image_size=SIDE
)  # fmt: skip


def loader(store: MaskMemoryStore | None = None, augment: tuple[str, ...] = (), **options: Any) -> MaskedPictures:
    options = {"evaluation": None, **options}
    return MaskedPictures(store or rectangles(), CONFIG, augment, device=torch.device("cpu"), **options)


def batch(*positions: int, split: str = "train") -> list[Any]:
    return [(split, np.array(positions), np.arange(len(positions)))]


def pictures_of(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CONFIG.mean, CONFIG.std))
    return (images * std + mean) * 255


def single(picture: np.ndarray, mask: np.ndarray) -> MaskMemoryStore:
    return MaskMemoryStore({"train": [picture]}, {"train": [mask]})


def ramp(height: int, width: int) -> MaskMemoryStore:
    """A picture whose red and green values are row and column, and a mask that is their sum."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([rows, columns, np.zeros_like(rows)], 2).astype(np.uint8)
    return single(picture, (rows + columns).astype(np.uint8))


def test_a_crop_holds_the_same_pixels_of_picture_and_mask() -> None:
    images, masks = loader(ramp(30, 40), ("crop", "flip")).training(batch(0, 0, 0, 0), seed=3)
    pixels = pictures_of(images).round()
    assert torch.equal((pixels[:, 0] + pixels[:, 1]).to(torch.uint8), masks)
    corners = {tuple(pixel[:2, 0, 0].tolist()) for pixel in pixels}
    assert len(corners) == 4
    steps = {float(pixel[1, 0, 1] - pixel[1, 0, 0]) for pixel in pixels}
    assert steps == {1.0, -1.0}


def test_a_picture_smaller_than_the_crop_is_padded_with_ignored_pixels() -> None:
    images, masks = loader(ramp(5, 7), ("crop",)).training(batch(0), seed=0)
    assert (masks[0] != IGNORED).sum() == 35
    assert images[0, :, 5:].abs().sum() == 0
    assert images[0, :, :, 7:].abs().sum() == 0


def test_scales_span_the_range_and_move_both() -> None:
    """A flat picture with a flat mask: what a scale changes is how much of the square is picture."""
    store = single(np.full((16, 16, 3), 99, np.uint8), np.full((16, 16), 1, np.uint8))
    _, masks = loader(store, ("scale",)).training(batch(*[0] * 200), seed=0)
    areas = (masks == 1).flatten(1).sum(1)
    sides = areas.double().sqrt()
    assert sides.min() == 8
    assert sides.max() == SIDE
    # A third of the draws are below 1, where the picture no longer fills the square.
    assert 0.23 < float((areas < SIDE**2).double().mean()) < 0.43


def test_jitter_changes_the_picture_only() -> None:
    plain, masks = loader(augment=("crop",)).training(batch(0, 1, 2), seed=5)
    changed, same = loader(augment=("crop", "jitter")).training(batch(0, 1, 2), seed=5)
    assert torch.equal(masks, same)
    assert all(not torch.equal(one, other) for one, other in zip(plain, changed, strict=True))


@pytest.mark.parametrize("augment", [tuple(MASK_AUGMENTATIONS), ()])
def test_a_batch_depends_on_its_seed_alone(augment: tuple[str, ...]) -> None:
    first = loader(augment=augment).training(batch(3, 1, 4), seed=11)
    torch.manual_seed(123)
    again = loader(augment=augment).training(batch(3, 1, 4), seed=11)
    other = loader(augment=augment).training(batch(3, 1, 4), seed=12)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(first[0], other[0]) is (augment == ())


def test_rows_of_a_batch_of_two_splits_are_in_order() -> None:
    mixed = [("train", np.array([2, 5]), np.array([0, 2])), ("val", np.array([1]), np.array([1]))]
    images, masks = loader().training(mixed, seed=None)
    for row, (split, position) in enumerate([("train", 2), ("val", 1), ("train", 5)]):
        alone, mask = loader().training(batch(position, split=split), seed=None)
        assert torch.equal(images[row], alone[0])
        assert torch.equal(masks[row], mask[0])


def test_a_resized_view_shows_the_whole_picture() -> None:
    store = rectangles()
    batches = list(loader(store, evaluation="resize").evaluation(batch(0, 1, 2, split="test"), first=7))
    ((images, views),) = batches
    assert images.shape == (3, 3, SIDE, SIDE)
    assert views.samples == [7, 8, 9]
    for position, view in enumerate(views):
        height, width = store.masks("test")[position].shape
        assert (view.region.height, view.region.width) == (height, width)
        assert max(view.shown.height, view.shown.width) == SIDE
        assert view.completes
        assert np.array_equal(view.mask.numpy(), store.masks("test")[position])


@pytest.mark.parametrize(("height", "width"), [(50, 33), (16, 16), (9, 40), (17, 12)])
def test_sliding_windows_show_every_pixel_at_its_place(height: int, width: int) -> None:
    store = ramp(height, width)
    seen = np.zeros((height, width), bool)
    completed = []
    for images, views in loader(store, evaluation="slide").evaluation(batch(0), first=0):
        for pixels, view in zip(pictures_of(images).round(), views, strict=True):
            part = pixels[:2, view.shown.rows, view.shown.columns]
            assert part[0, 0, 0] == view.region.top
            assert part[1, 0, 0] == view.region.left
            assert part[0, -1, -1] == view.region.top + view.region.height - 1
            seen[view.region.rows, view.region.columns] = True
            completed.append(view.completes)
    assert seen.all()
    assert completed == [False] * (len(completed) - 1) + [True]


def test_windows_are_the_default_where_training_crops() -> None:
    store = ramp(40, 40)
    cropped = list(loader(store, ("crop",)).evaluation(batch(0), first=0))
    whole = list(loader(store).evaluation(batch(0), first=0))
    assert sum(len(views) for _, views in cropped) == len(windows(40, 40, SIDE)) > 1
    assert sum(len(views) for _, views in whole) == 1


def test_views_of_several_pictures_keep_the_batch_size() -> None:
    sizes = [
        (len(images), views.samples)
        for images, views in loader(ramp(20, 40), evaluation="slide").evaluation(batch(0, 0), first=0)
    ]
    per_picture = len(windows(20, 40, SIDE))
    assert all(size == 2 for size, _ in sizes[:-1])
    assert [sample for _, samples in sizes for sample in samples] == [0] * per_picture + [1] * per_picture


@pytest.mark.parametrize("length", range(1, 70))
def test_windows_cover_and_overlap(length: int) -> None:
    boxes = windows(length, 5, SIDE)
    assert boxes[0].top == 0
    assert boxes[-1].top + boxes[-1].height == length
    for before, after in itertools.pairwise(boxes):
        assert before.top + before.height - after.top >= SIDE // 3


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of flip, crop, scale, jitter, but got 'scales'.*scale"):
        loader(augment=("scales",))
