"""Which samples a trial sees, in which order, and its features."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.support.synthetic import SIDE, shapes, write_shapes
from tests.support.imbalanced import imbalanced
from trainables.data.store import Store
from trainables.data.trial_data import TrialData, balanced_order, batch_positions, class_counts, select_samples
from trainables.models.backbone import load_pretrained
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec

Make = Callable[..., TrialData]
Batch = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def make(network: Callable[[str], str], tmp_path: Path) -> Make:
    """`make(store=…, kind=…, held_out=…, batch_size=…)`: the data of a trial."""

    def make(store: Any = None, kind: str = "cnn", held_out: str | None = None, **fields: Any) -> TrialData:
        model = ModelSpec(name=network(kind))
        fields = {"batch_size": 10, "eval_batch_size": 24, "cache": str(tmp_path / "cache"), **fields}
        spec = TrialSpec(
            shared=SharedTrialSettings(store="memory", model=model, **fields), strategy="full", held_out=held_out
        )
        return TrialData(spec, store or shapes(), load_pretrained(model), "cpu")

    return make


def assert_equal_batches(batches: Iterable[Batch], others: Iterable[Batch]) -> None:
    """Whether two runs of batches have the same bits."""
    for (inputs, targets), (other_inputs, other_targets) in zip(batches, others, strict=True):
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(targets, other_targets)


def test_evaluation_batches_are_whole_in_order_and_normalised(make: Make) -> None:
    data = make()
    store = shapes()
    batches = list(data.batches("test"))
    assert [len(labels) for _, labels in batches] == [24, 8]
    images = torch.cat([b[0] for b in batches])
    expected = (torch.from_numpy(store.images("test")).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25
    assert images.dtype == torch.float32
    assert torch.allclose(images.double(), expected, atol=1e-6)
    assert torch.cat([b[1] for b in batches]).tolist() == store.labels("test").tolist() == data.labels("test").tolist()


def test_training_batches_hold_every_sample_once_in_an_order_of_the_seed(make: Make) -> None:
    data = make(batch_size=16)

    def epoch(seed: int) -> list[float]:
        images = torch.cat([images for images, _ in data.batches("train", shuffle_seed=seed)])
        sums: list[float] = images.double().sum((1, 2, 3)).tolist()
        return sums

    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2)
    assert Counter(epoch(1)) == Counter(epoch(2))
    assert len(epoch(1)) == 64


@pytest.mark.parametrize(
    ("count", "size", "drop_last", "sizes"),
    [(64, 10, True, [10] * 6), (64, 10, False, [10] * 6 + [4]), (7, 10, True, [7]), (10, 10, True, [10])],
)
def test_a_last_smaller_batch_is_left_out_unless_it_is_alone(
    count: int, size: int, drop_last: bool, sizes: list[int]
) -> None:
    for seed in (None, 3):
        batches = batch_positions(count, size, seed, drop_last)
        assert [len(b) for b in batches] == sizes
        assert len(set(np.concatenate(batches).tolist())) == sum(sizes)


def test_the_number_of_steps_is_the_number_of_batches(make: Make) -> None:
    for size in (10, 64, 100):
        data = make(batch_size=size)
        assert data.steps_per_epoch == len(list(data.batches("train", shuffle_seed=0, drop_last=True)))


def test_an_epoch_entered_in_the_middle_is_the_rest_of_the_epoch(make: Make) -> None:
    data = make(augment=("flip", "crop"))
    whole = list(data.batches("train", shuffle_seed=1, augment_seed=2, drop_last=True))
    rest = list(data.batches("train", shuffle_seed=1, augment_seed=2, drop_last=True, start=4))
    assert len(rest) == len(whole) - 4
    for (a, b), (c, d) in zip(whole[4:], rest, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_augmentation_follows_its_seed_and_only_where_a_seed_is_given(make: Make) -> None:
    data = make(augment=("flip",))
    first = lambda **seeds: next(data.batches("train", batch_size=64, **seeds))[0]  # noqa: E731
    assert torch.equal(first(augment_seed=1), first(augment_seed=1))
    assert not torch.equal(first(augment_seed=1), first(augment_seed=2))
    assert torch.equal(first(), next(make().batches("train", batch_size=64))[0])


def test_features_are_those_of_the_network_on_the_evaluation_view(make: Make) -> None:
    for kind in ("cnn", "vit"):
        data = make(kind=kind, augment=("flip",))
        with torch.no_grad():
            expected = torch.cat([data.backbone.module(images) for images, _ in data.batches("train")])
        assert np.allclose(data.features("train"), expected.numpy(), atol=1e-5)
        squares = (expected.double() ** 2).sum(1).mean()
        assert data.mean_square_norm() == pytest.approx(float(squares), rel=1e-5)


def test_feature_batches_are_the_image_batches_of_the_same_seed(make: Make) -> None:
    data = make()
    labels = torch.from_numpy(data.labels("train"))
    images = torch.stack([i for b, _ in data.batches("train") for i in b]).flatten(1)
    by_feature = list(data.feature_batches(images, labels, shuffle_seed=5))
    by_image = list(data.batches("train", shuffle_seed=5, drop_last=True))
    assert_equal_batches(by_feature, [(images.flatten(1), labels) for images, labels in by_image])


def test_a_fraction_is_a_prefix_and_changes_training_only(make: Make) -> None:
    small = make(train_fraction=0.25)
    assert (small.train_size, small.size("val"), small.size("ood/noisy")) == (16, 32, 32)
    assert small.labels("train").tolist() == shapes().labels("train")[:16].tolist()
    assert small.cache_key != make().cache_key
    assert np.allclose(small.features("train"), make().features("train")[:16], atol=1e-6)


def test_a_draw_is_another_nested_sample_of_the_same_classes(make: Make) -> None:
    store = shapes()

    def positions(draw: int, fraction: float) -> set[int]:
        spec = dataclasses.replace(make(train_fraction=fraction).spec, train_draw=draw)
        ((_, indices),) = select_samples(spec, store)["train"]
        assert (np.diff(indices) > 0).all()
        return set(indices.tolist())

    labels = store.labels("train")
    own, first, second = (positions(draw, 0.5) for draw in (0, 1, 2))
    assert own == set(range(store.fraction("train", 0.5)))
    assert len({frozenset(sample) for sample in (own, first, second)}) == 3
    assert Counter(labels[sorted(first)].tolist()) == Counter(labels[sorted(own)].tolist())
    assert positions(1, 0.25) < first
    assert positions(1, 1.0) == positions(0, 1.0)


def test_a_held_out_domain_leaves_training_and_validation(make: Make) -> None:
    data = make(held_out="dim")
    store = shapes()
    dim = store.domains.index("dim")
    bright = [i for i in range(64) if store.domain_ids("train")[i] != dim]
    assert data.labels("train").tolist() == store.labels("train")[bright].tolist()
    assert (data.train_size, data.size("val"), data.size("test"), data.size("held_out")) == (32, 16, 32, 48)
    assert len(data.features("held_out")) == sum(len(labels) for _, labels in data.batches("held_out")) == 48
    assert data.cache_key != make().cache_key


def test_an_impossible_held_out_domain_is_an_error(make: Make) -> None:
    with pytest.raises(ValueError) as error:
        make(held_out="noisy")
    assert str(error.value) == "A held-out domain is one of the ID domains bright, dim, but got 'noisy'."
    store = shapes()
    store.sources["train"][:] = 0
    with pytest.raises(ValueError) as error:
        make(store=store, held_out="bright")
    assert str(error.value) == (
        "Without the held-out domain 'bright' the train split must keep images, but it keeps none. "
        "The ID domains are bright."
    )


def test_an_unknown_split_is_an_error(make: Make) -> None:
    with pytest.raises(ValueError) as error:
        next(make().batches("valid"))
    assert str(error.value) == "A split is one of train, val, test, ood/inverted, ood/noisy, but got 'valid'."


def test_the_store_on_disk_gives_what_memory_gives_and_is_never_written_to(make: Make, tmp_path: Path) -> None:
    store = Store(write_shapes(tmp_path / "store"))
    disk, memory = make(store=store, augment=("flip",)), make(augment=("flip",))
    seeds = {"shuffle_seed": 1, "augment_seed": 2}
    batches = list(disk.batches("train", **seeds))
    assert_equal_batches(batches, memory.batches("train", **seeds))
    for inputs, targets in batches:
        inputs.fill_(0)
        targets.fill_(0)
    assert store.image_size == SIDE
    store.verify()
    assert np.array_equal(store.images("train"), shapes().images("train"))


@pytest.mark.parametrize("counts", [(95, 5), (50, 30, 1), (4, 4), (3, 0, 8)])
def test_a_balanced_order_has_every_class_equally_often(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    present = sum(count > 0 for count in counts)
    for seed in range(5):
        order = balanced_order(labels, seed)
        assert len(order) == len(labels)
        drawn = np.bincount(labels[order], minlength=len(counts))
        of_present = drawn[np.array(counts) > 0]
        assert of_present.max() - of_present.min() <= 1
        assert of_present.sum() == len(labels)
        for label in np.flatnonzero(drawn):
            times = np.bincount(order[labels[order] == label], minlength=len(labels))[labels == label]
            assert times.max() - times.min() <= 1
        assert np.array_equal(order, balanced_order(labels, seed))
    assert not np.array_equal(balanced_order(labels, 0), balanced_order(labels, 1))
    assert present >= 2


def test_balanced_sampling_changes_shuffled_training_batches_alone(make: Make) -> None:
    plain, balanced = make(store=imbalanced()), make(store=imbalanced(), sampling="balanced")
    labels = torch.cat([labels for _, labels in balanced.batches("train", shuffle_seed=3, drop_last=True)])
    assert torch.bincount(labels).tolist() == [400, 400]
    assert balanced.steps_per_epoch == plain.steps_per_epoch
    for split, seeds in (("train", {}), ("test", {"shuffle_seed": 3})):
        assert_equal_batches(plain.batches(split, **seeds), balanced.batches(split, **seeds))


def test_balanced_feature_batches_are_the_balanced_image_batches(make: Make) -> None:
    data = make(store=imbalanced(), sampling="balanced")
    labels = torch.from_numpy(data.labels("train"))
    images = torch.stack([i for b, _ in data.batches("train") for i in b]).flatten(1)
    by_feature = list(data.feature_batches(images, labels, shuffle_seed=5))
    by_image = list(data.batches("train", shuffle_seed=5, drop_last=True))
    assert_equal_batches(by_feature, [(images.flatten(1), labels) for images, labels in by_image])


def test_class_counts_are_of_the_samples_that_a_trial_trains_on(make: Make) -> None:
    for settings in ({}, {"train_fraction": 0.25}, {"held_out": "dim"}, {"train_on": "noisy"}):
        data = make(**settings)
        expected = np.bincount(data.labels("train"), minlength=4).tolist()
        assert class_counts(data.spec, data.store) == tuple(expected)
