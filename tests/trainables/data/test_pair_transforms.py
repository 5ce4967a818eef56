"""Scaling and cropping of a picture with its mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from trainables.data.mask_views import Box
from trainables.data.pair_transforms import padded, padded_mask, scaled_mask, scaled_picture, scaled_size
from trainables.data.store import IGNORED


def picture(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", [(37, 53), (20, 30), (7, 61), (74, 106), (1, 1)])
def test_the_scaled_whole_is_torchs_antialiased_interpolation(size: tuple[int, int]) -> None:
    source = picture(37, 53)
    expected = functional.interpolate(
        source.permute(2, 0, 1)[None].float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )[0]
    torch.testing.assert_close(scaled_picture(source, size, Box(0, 0, *size)), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("size", [(30, 20), (90, 80)])
def test_a_box_is_the_same_box_of_the_scaled_whole(size: tuple[int, int]) -> None:
    source = picture(45, 40)
    labels = source[:, :, 0] % 7
    box = Box(11, 5, 13, 14)
    whole = scaled_picture(source, size, Box(0, 0, *size))
    torch.testing.assert_close(scaled_picture(source, size, box), whole[:, box.rows, box.columns], rtol=0, atol=1e-3)
    whole_mask = scaled_mask(labels, size, Box(0, 0, *size))
    assert torch.equal(scaled_mask(labels, size, box), whole_mask[box.rows, box.columns])


@pytest.mark.parametrize("size", [(12, 9), (40, 50), (17, 33)])
def test_a_mask_takes_the_pixel_under_each_centre(size: tuple[int, int]) -> None:
    mask = torch.arange(23 * 31).remainder(251).to(torch.uint8).view(23, 31)
    expected = functional.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0]
    assert torch.equal(scaled_mask(mask, size, Box(0, 0, *size)), expected.to(torch.uint8))


def test_picture_and_mask_stay_on_each_other() -> None:
    """A picture that shows its own mask still does so once both are scaled, but for the four corners."""
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[13:29, 17:44] = 1
    shown = (mask * 255)[:, :, None].expand(-1, -1, 3).contiguous()
    size = scaled_size(40, 60, 1.7)
    box = Box(9, 16, 50, 70)
    scaled = scaled_picture(shown, size, box)[0]
    differing = (scaled > 127.5) != (scaled_mask(mask, size, box) == 1)
    # There the product of two linear filters is below one half.
    assert int(differing.sum()) <= 4 * 2


def test_an_unscaled_picture_keeps_every_value() -> None:
    source = picture(9, 8)
    assert torch.equal(scaled_picture(source, (9, 8), Box(2, 1, 5, 4)), source[2:7, 1:5].permute(2, 0, 1).float())


def test_padding_is_ignored_in_the_mask() -> None:
    assert torch.equal(padded(torch.ones(3, 2, 3), 4)[0].sum(1), torch.tensor([3.0, 3.0, 0.0, 0.0]))
    mask = padded_mask(torch.ones(2, 3, dtype=torch.uint8), 4)
    assert (mask == IGNORED).sum() == 10
    assert (mask[:2, :3] == 1).all()
