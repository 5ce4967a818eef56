"""Corruptions: the published definitions, and numbers that depend on a picture's name alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.support.corruption_pictures import mean_distance, pictures, reference
from trainables.data.corruptions import COMMON, GROUPS, LARGE_SIDE, SEVERITIES, corrupt

BIT_EXACT = ("zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
"""Deterministic corruptions that are computed as the reference computes them, operation by operation."""
DRAWS = {"motion_blur": 6, "frost": 6, "fog": 12, "snow": 4}
"""Corrupted copies of each large picture; 3 of the others."""
SMALL_DRAWS = {"motion_blur": 20, "impulse_noise": 60, "elastic_transform": 60, "fog": 30}
"""Corrupted copies of each small picture; 12 of the others."""


def distance(images: Tensor, name: str, severity: int, draws: int = 1) -> float:
    """Mean distance between pictures and corrupted copies, over seeds."""
    copies = [corrupt(images, name, severity, seed).numpy() for seed in range(draws)]
    return float(np.mean([mean_distance(copy, images.numpy()) for copy in copies]))


@pytest.fixture(scope="module")
def small() -> Tensor:
    return torch.from_numpy(pictures(32))


@pytest.fixture(scope="module")
def large() -> Tensor:
    return torch.from_numpy(pictures(224))


def test_fifteen_names_in_four_groups() -> None:
    assert len(COMMON) == 15
    assert tuple(name for group in GROUPS.values() for name in group) == COMMON


@pytest.mark.parametrize("name", COMMON)
def test_small_pictures_are_as_far_away_as_the_references(small: Tensor, name: str) -> None:
    expected = reference()["32"][name]
    measured = [distance(small, name, severity, SMALL_DRAWS.get(name, 12)) for severity in SEVERITIES]
    assert measured == pytest.approx(expected, rel=1e-9 if name in BIT_EXACT else 0.05)


@pytest.mark.thorough
@pytest.mark.parametrize("name", COMMON)
def test_large_pictures_are_as_far_away_as_the_references(large: Tensor, name: str) -> None:
    expected = reference()["224"][name]
    draws = 1 if name in (*BIT_EXACT, "defocus_blur") else DRAWS.get(name, 3)
    measured = [distance(large, name, severity, draws) for severity in SEVERITIES]
    tolerance = {"defocus_blur": 2e-3} | dict.fromkeys(BIT_EXACT, 1e-9)
    assert measured == pytest.approx(expected, rel=tolerance.get(name, 0.05))


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("side", [32, LARGE_SIDE])
def test_severity_five_is_farther_away_than_one(name: str, side: int) -> None:
    images = torch.from_numpy(pictures(side))
    nearer, farther = (distance(images, name, severity, draws=2) for severity in (1, 5))
    if (name, side) == ("elastic_transform", 32):
        # As published: CIFAR-10-C's first severity is an affine map alone, whose bound shrinks with severity.
        assert reference()["32"][name][0] > reference()["32"][name][4]
    else:
        assert farther > nearer


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("size", [(8, 8), (33, 47), (96, 130)])
def test_type_and_size_stay(name: str, size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    original = images.clone()
    for severity in (1, 5):
        corrupted = corrupt(images, name, severity, seed=0)
        assert corrupted.dtype == torch.uint8
        assert corrupted.shape == images.shape
    assert torch.equal(images, original)


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("side", [32, LARGE_SIDE])
def test_neither_batch_nor_order_matters(name: str, side: int) -> None:
    images = torch.from_numpy(pictures(side)).repeat(3, 1, 1, 1)
    names = [f"picture {number}" for number in range(len(images))]
    whole = corrupt(images, name, 4, seed=3, image_names=names)
    order = torch.tensor([7, 2, 11, 0])
    part = corrupt(images[order], name, 4, seed=3, image_names=[names[number] for number in order.tolist()])
    assert torch.equal(part, whole[order])
    alone = corrupt(images[5:6], name, 4, seed=3, image_names=names[5:6])
    assert torch.equal(alone, whole[5:6])


@pytest.mark.parametrize("name", [name for name in COMMON if name not in (*BIT_EXACT, "defocus_blur")])
def test_name_severity_and_seed_choose_the_random_numbers(small: Tensor, name: str) -> None:
    twice = small[:1].repeat(2, 1, 1, 1)
    corrupted = corrupt(twice, name, 5, seed=0, image_names=["a", "b"])
    assert not torch.equal(corrupted[0], corrupted[1])
    assert not torch.equal(corrupted, corrupt(twice, name, 5, seed=1, image_names=["a", "b"]))
    # Without names, equal pictures are one picture.
    unnamed = corrupt(twice, name, 5, seed=0)
    assert torch.equal(unnamed[0], unnamed[1])


def test_a_flat_picture_stays_flat_under_every_blur() -> None:
    images = torch.full((1, 96, 96, 3), 200, dtype=torch.uint8)
    for name in ("glass_blur", "motion_blur", "elastic_transform", "pixelate"):
        assert torch.equal(corrupt(images, name, 5, seed=0), images), name


def test_impulse_noise_replaces_the_published_share() -> None:
    images = torch.full((1, 224, 224, 3), 128, dtype=torch.uint8)
    corrupted = corrupt(images, "impulse_noise", 5, seed=0)
    assert (corrupted == 0).float().mean().item() == pytest.approx(0.27 / 2, abs=0.003)
    assert (corrupted == 255).float().mean().item() == pytest.approx(0.27 / 2, abs=0.003)
    assert (corrupted == 128).float().mean().item() == pytest.approx(0.73, abs=0.005)


def test_shot_noise_has_the_moments_of_a_poisson_distribution() -> None:
    images = torch.full((1, 224, 224, 3), 102, dtype=torch.uint8)
    counts = corrupt(images, "shot_noise", 2, seed=0).double() / 255 * 25
    # 0.4 · 25 photons are expected; values are truncated to one of 255 levels.
    assert counts.mean().item() == pytest.approx(10 - 0.5 * 25 / 255, abs=0.05)
    assert counts.var().item() == pytest.approx(10, rel=0.03)


def test_bad_arguments() -> None:
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"A corruption is one of .*got 'gausian_noise'. Did you mean"):
        corrupt(images, "gausian_noise", 1, seed=0)
    with pytest.raises(ValueError, match="A severity is one of 1, 2, 3, 4 and 5, but got 6"):
        corrupt(images, "fog", 6, seed=0)
    with pytest.raises(ValueError, match=r"uint8 of shape \(B, H, W, 3\), but got torch.float32"):
        corrupt(images.float(), "fog", 1, seed=0)
    with pytest.raises(ValueError, match="one name per picture, but got 1 names for 2 pictures"):
        corrupt(images, "fog", 1, seed=0, image_names=["a"])


def test_no_pictures_give_none() -> None:
    assert corrupt(torch.zeros(0, 32, 32, 3, dtype=torch.uint8), "fog", 1, seed=0).shape == (0, 32, 32, 3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() == 0, reason="this machine has no GPU")
@pytest.mark.parametrize("name", COMMON)
def test_a_gpu_gives_nearly_the_same_pictures(small: Tensor, name: str) -> None:
    on_cpu = corrupt(small, name, 3, seed=0).int()
    on_gpu = corrupt(small.cuda(), name, 3, seed=0).cpu().int()
    assert (on_cpu - on_gpu).abs().float().mean().item() < 0.1
