"""The built-in digits: shapes, contents, seeds."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from trainables.demo.digits import SHIFTS, handwritten_digits, printed_digits, render, shift


def test_printed_digits_are_balanced_dark_on_light_and_reproducible() -> None:
    images, labels = printed_digits(6, seed=0)
    assert images.shape == (60, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == list(range(10)) * 6
    again, _ = printed_digits(6, seed=0)
    other, _ = printed_digits(6, seed=1)
    assert np.array_equal(images, again)
    assert not np.array_equal(images, other)
    edges = np.concatenate([images[:, 0], images[:, -1]])
    assert edges.mean() > 240
    assert (images.reshape(60, -1).min(1) < 60).all()


def test_printed_digits_of_one_class_differ() -> None:
    images, labels = printed_digits(20, seed=0)
    sevens = images[labels == 7].reshape(20, -1)
    assert len(np.unique(sevens, axis=0)) == 20


def test_printed_digits_are_classified_by_their_nearest_neighbour() -> None:
    """Labels match the images: 1-NN on fresh renderings is far above the 10 % of chance."""
    reference, labels = printed_digits(60, seed=0)
    fresh, truth = printed_digits(10, seed=1)
    distances = ((fresh[:, None, ::2, ::2, 0].astype(float) - reference[None, :, ::2, ::2, 0]) ** 2).sum((2, 3))
    assert (labels[distances.argmin(1)] == truth).mean() > 0.5


def test_render_takes_any_characters_and_side() -> None:
    images, labels = render("AB", 3, seed=0, side=48)
    assert images.shape == (6, 48, 48, 3)
    assert labels.tolist() == [0, 1] * 3


def test_handwritten_digits_are_scikit_learns() -> None:
    images, labels = handwritten_digits()
    source = load_digits()
    assert images.shape == (1797, 32, 32, 3)
    assert np.array_equal(labels, source.target)
    assert (images[:, :4] == 255).all()
    ink = 255 - images[:, 4:28, 4:28, 0].reshape(1797, 8, 3, 8, 3).mean((2, 4))
    assert np.corrcoef(ink.ravel(), source.images.ravel())[0, 1] > 0.97


class TestShift:
    def test_inverted(self) -> None:
        images, _ = printed_digits(1, seed=0)
        assert np.array_equal(shift(images, "inverted", 0), 255 - images)

    def test_noisy_has_the_stated_strength_where_nothing_is_clipped(self) -> None:
        grey = np.full((20, 32, 32, 3), 128, np.uint8)
        noise = shift(grey, "noisy", 0)[..., 0].astype(float) - 128
        assert abs(noise.mean()) < 2
        assert 58 < noise.std() < 66  # 64, clipped at two standard deviations

    def test_rotated_turns_by_20_to_45_degrees_and_keeps_the_background(self) -> None:
        bar = np.full((40, 33, 33, 3), 255, np.uint8)
        bar[:, 16, 4:29] = 0
        for image in shift(bar, "rotated", 0):
            y, x = np.nonzero(image[..., 0] < 128)
            angle = abs(np.degrees(np.arctan(np.polyfit(x, y, 1)[0])))
            assert 17 < angle < 48
            assert image[0, 0, 0] == 255

    def test_blurred_keeps_the_mean_and_loses_contrast(self) -> None:
        images, _ = printed_digits(2, seed=0)
        blurred = shift(images, "blurred", 0)
        assert abs(blurred.mean() - images.mean()) < 3
        assert blurred.std() < 0.8 * images.std()

    @pytest.mark.parametrize("kind", SHIFTS)
    def test_the_input_is_unchanged_and_the_result_depends_on_the_seed(self, kind: str) -> None:
        images, _ = printed_digits(1, seed=0)
        before = images.copy()
        first = shift(images, kind, 0)
        assert first.shape == images.shape
        assert first.dtype == np.uint8
        assert np.array_equal(images, before)
        assert np.array_equal(first, shift(images, kind, 0))
        if kind in ("rotated", "noisy"):
            assert not np.array_equal(first, shift(images, kind, 1))

    def test_unknown_kind(self) -> None:
        images, _ = printed_digits(1, seed=0)
        with pytest.raises(ValueError) as error:
            shift(images, "foggy", 0)
        assert str(error.value) == "A shift is one of inverted, rotated, noisy, blurred, but got 'foggy'."
