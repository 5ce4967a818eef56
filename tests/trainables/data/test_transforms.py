"""Batch transforms against torchvision, image by image."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torchvision import transforms

from trainables.data.transforms import BatchTransform
from trainables.specs.augmentations import AUGMENTATIONS

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def pixels(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def raw(side: int, *augment: str) -> BatchTransform:
    """Without normalisation: values stay pixel values / 255."""
    return BatchTransform((0, 0, 0), (1, 1, 1), side, augment)


def as_bytes(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) floats in 0…1 → (B, S, S, 3) uint8."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


class TestEvaluation:
    @pytest.mark.parametrize(("stored", "side"), [(12, 12), (12, 8), (13, 8), (15, 8), (257, 224)])
    def test_it_equals_torchvisions_crop_and_normalisation(self, stored: int, side: int) -> None:
        images = pixels(3, stored, stored)
        reference = transforms.Compose(
            [transforms.CenterCrop(side), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        )
        expected = torch.stack([reference(Image.fromarray(x.numpy())) for x in images])
        batch = BatchTransform(MEAN, STD, side, ())(images)
        assert batch.dtype == torch.float32
        assert batch.is_contiguous()
        assert torch.allclose(batch, expected, atol=2e-6)

    def test_a_generator_without_augmentation_changes_nothing(self) -> None:
        images = pixels(4, 10, 10)
        generator = torch.Generator().manual_seed(1)
        transform = BatchTransform(MEAN, STD, 8, ())
        assert torch.equal(transform(images, generator), transform(images))

    def test_no_augmentation_without_a_generator(self) -> None:
        images = pixels(4, 10, 10)
        assert torch.equal(
            BatchTransform(MEAN, STD, 8, tuple(AUGMENTATIONS))(images), BatchTransform(MEAN, STD, 8, ())(images)
        )


class TestFlip:
    def test_each_image_is_itself_or_its_mirror_image_about_half_the_time(self) -> None:
        images = pixels(200, 8, 8)
        results = as_bytes(raw(8, "flip")(images, torch.Generator().manual_seed(0)))
        mirrored = [torch.equal(result, image.flip(1)) for result, image in zip(results, images, strict=True)]
        unchanged = [torch.equal(result, image) for result, image in zip(results, images, strict=True)]
        assert all(a != b for a, b in zip(mirrored, unchanged, strict=True))
        assert 75 <= sum(mirrored) <= 125


class TestCrop:
    def test_each_image_is_a_window_of_itself_and_all_positions_occur(self) -> None:
        images = pixels(300, 6, 6)
        windows = as_bytes(raw(4, "crop")(images, torch.Generator().manual_seed(0)))
        positions = []
        for window, image in zip(windows, images, strict=True):
            fits = [(y, x) for y in range(3) for x in range(3) if torch.equal(window, image[y : y + 4, x : x + 4])]
            assert len(fits) == 1
            positions += fits
        assert len(set(positions)) == 9

    def test_an_image_of_the_same_size_is_padded_by_reflection_by_an_eighth(self) -> None:
        images = pixels(300, 16, 16)
        windows = as_bytes(raw(16, "crop")(images, torch.Generator().manual_seed(0)))
        padded = functional.pad(images.permute(0, 3, 1, 2).float(), [2] * 4, mode="reflect")
        padded = padded.to(torch.uint8).permute(0, 2, 3, 1)
        positions = set()
        for window, image in zip(windows, padded, strict=True):
            fits = [(y, x) for y in range(5) for x in range(5) if torch.equal(window, image[y : y + 16, x : x + 16])]
            assert len(fits) == 1
            positions |= {*fits}
        assert len(positions) == 25

    def test_crop_and_flip_together(self) -> None:
        images = pixels(50, 6, 6)
        windows = as_bytes(raw(4, "flip", "crop")(images, torch.Generator().manual_seed(3)))
        for window, image in zip(windows, images, strict=True):
            crops = [image[y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
            assert any(torch.equal(window, crop) or torch.equal(window, crop.flip(1)) for crop in crops)


class TestRules:
    def test_the_result_depends_on_the_generator_alone(self) -> None:
        images = pixels(20, 10, 10)
        transform = raw(8, "flip", "crop")
        first = transform(images, torch.Generator().manual_seed(5))
        assert torch.equal(first, transform(images, torch.Generator().manual_seed(5)))
        assert not torch.equal(first, transform(images, torch.Generator().manual_seed(6)))

    def test_the_input_is_not_written_to_even_if_it_is_stored_channels_first(self) -> None:
        images = pixels(20, 8, 8).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        before = images.clone()
        raw(8, "flip", "crop")(images, torch.Generator().manual_seed(0))
        BatchTransform(MEAN, STD, 8, ("flip",))(images, torch.Generator().manual_seed(0))
        assert torch.equal(images, before)

    def test_it_survives_pickling(self) -> None:
        images = pixels(2, 8, 8)
        transform = BatchTransform(MEAN, STD, 8, ("flip",))
        transform(images)
        assert torch.equal(pickle.loads(pickle.dumps(transform))(images), transform(images))  # noqa: S301 - our own

    def test_unknown_augmentation(self) -> None:
        with pytest.raises(ValueError) as error:
            BatchTransform(MEAN, STD, 8, ("flipp",))
        assert str(error.value) == "An augmentation is one of flip, crop, but got 'flipp'. Did you mean 'flip'?"

    def test_stored_images_that_are_too_small(self) -> None:
        with pytest.raises(ValueError) as error:
            raw(16)(pixels(1, 12, 12))
        assert str(error.value) == (
            "Stored images must be at least 16 pixels wide and high, but they are 12 x 12. "
            "Ingest them at 16 pixels or more."
        )

    def test_a_batch_of_another_shape_or_type(self) -> None:
        with pytest.raises(ValueError) as error:
            raw(4)(torch.from_numpy(np.zeros((2, 3, 8, 8), np.float32)))
        assert str(error.value) == (
            "A batch must be uint8 of shape (B, H, W, 3), but got torch.float32 of shape (2, 3, 8, 8)."
        )
