"""The built-in pictures with masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainables.demo import scenes as module
from trainables.demo.scenes import CLASSES, COUNTS, SHIFTED, Scene, scenes


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Scene]]:
    return scenes(seed=0)


def test_every_split_has_its_scenes_and_every_class(drawn: dict[str, list[Scene]]) -> None:
    assert list(drawn) == ["train", "val", "test", *SHIFTED, "printed"]
    for name, split in drawn.items():
        assert len(split) == COUNTS.get(name, COUNTS["test"])
        assert set(np.unique(np.concatenate([scene.mask.ravel() for scene in split]))) == set(range(len(CLASSES)))


def test_a_mask_has_the_size_of_its_picture_and_sizes_differ(drawn: dict[str, list[Scene]]) -> None:
    assert all(scene.picture.shape == (*scene.mask.shape, 3) for split in drawn.values() for scene in split)
    assert len({scene.mask.shape for scene in drawn["train"]}) > 100


def test_ink_is_darker_than_the_photograph_around_it(drawn: dict[str, list[Scene]]) -> None:
    for scene in drawn["train"]:
        # Ink covers more than half of a pixel of the mask: with ink up to 90 and paper up to 255 that is at most 172.
        assert scene.picture[scene.mask > 0].max() <= 172
        assert scene.picture[scene.mask > 0].mean() < scene.picture[scene.mask == 0].mean()


def test_shifted_scenes_keep_the_masks_of_the_test(drawn: dict[str, list[Scene]]) -> None:
    for kind in SHIFTED:
        for scene, test in zip(drawn[kind], drawn["test"], strict=True):
            assert np.array_equal(scene.mask, test.mask)
            assert not np.array_equal(scene.picture, test.picture)
    assert np.array_equal(drawn["inverted"][0].picture, 255 - drawn["test"][0].picture)


def test_no_digit_is_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits are given to `_compose` split by split: none of the images of one is among those of another."""
    given: list[set[bytes]] = []
    compose = module._compose

    def recorded(digits: module.Picture, *arguments: object) -> list[Scene]:
        given.append({digit.tobytes() for digit in digits})
        return compose(digits, *arguments)

    monkeypatch.setattr(module, "_compose", recorded)
    scenes(seed=1)
    handwritten = given[:3]
    assert len(given) == 4
    assert all(len(one & other) <= 1 for one, other in itertools.combinations(handwritten, 2))


def test_a_seed_fixes_the_scenes(drawn: dict[str, list[Scene]]) -> None:
    again = scenes(seed=0)
    other = scenes(seed=1)
    for name, split in drawn.items():
        assert all(np.array_equal(a.picture, b.picture) for a, b in zip(split, again[name], strict=True))
    assert not np.array_equal(drawn["train"][0].picture, other["train"][0].picture)
