"""Cosine and L2 between features before and after, against plain loops; what is exact must be exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.support.synthetic import OOD_DOMAINS
from tests.support.trials import MakeTrial
from trainables.diagnostics.distortion import GRID, FeatureDistortion, feature_distortion
from trainables.engine.evaluation import final_scores
from trainables.engine.trial import Trial

SPLITS = ("test", *(f"ood/{domain}" for domain in OOD_DOMAINS))


@pytest.fixture
def make(make_trial: MakeTrial) -> Callable[..., Trial]:
    """`make("full", "cnn", lr_backbone=…)`: a short run on the tiny networks."""
    return partial(make_trial, seed=1, task={"eval_batch_size": 12})


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def plain(before: Tensor, after: Tensor) -> tuple[list[float], list[float]]:
    """The definitions, one image after the other."""
    cosines, distances = [], []
    for a, b in zip(before.tolist(), after.tolist(), strict=True):
        inner = sum(x * y for x, y in zip(a, b, strict=True))
        norms = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
        cosines.append(inner / (norms[0] * norms[1]))
        distances.append(math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))))
    return cosines, distances


def features_of(run: Trial, split: str) -> tuple[Tensor, Tensor]:
    """Pooled features of the pretrained and of the trial's network, straight from the images."""
    features: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for images, _ in run.data.batches(split):
            features[0].append(run.data.backbone.module(images))
            features[1].append(run.model.eval().features(images))
    return torch.cat(features[0]), torch.cat(features[1])


@pytest.mark.parametrize(("count", "width", "scale"), [(1, 3, 1.0), (20, 64, 1e-4), (20, 7, 1e6)])
def test_it_agrees_with_the_definitions(count: int, width: int, scale: float) -> None:
    before, after = random(count, width, scale=scale), random(count, width, seed=1)
    cosine, distance = feature_distortion(before, after)
    expected = plain(before, after)
    assert cosine.tolist() == pytest.approx(expected[0], rel=1e-12)
    assert distance.tolist() == pytest.approx(expected[1], rel=1e-12)


def test_equal_features_have_cosine_exactly_one_and_distance_exactly_zero() -> None:
    for scale in (1e-15, 1e-3, 1.0, 3.7, 1e15):
        features = random(500, 37, scale=scale)
        cosine, distance = feature_distortion(features, features.clone())
        assert set(cosine.tolist()) == {1.0}
        assert set(distance.tolist()) == {0.0}


def test_direction_and_length_are_distinguished() -> None:
    before = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    after = torch.tensor([[6.0, 8.0], [-3.0, -4.0], [-4.0, 3.0]])
    cosine, distance = feature_distortion(before, after)
    assert cosine.tolist() == [1.0, -1.0, 0.0]
    assert distance.tolist() == pytest.approx([5.0, 10.0, math.sqrt(50)])


def test_features_of_zero_norm() -> None:
    before = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    after = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    cosine, distance = feature_distortion(before, after)
    assert cosine.tolist() == [1.0, 0.0, 0.0]
    assert distance.tolist() == [0.0, 2.0, 1.0]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError) as error:
        feature_distortion(torch.zeros(2, 3), torch.zeros(2, 4))
    assert str(error.value) == (
        "Distortion compares two (N, D) sets of features of the same images, but got shapes (2, 3) and (2, 4)."
    )


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_a_pristine_backbone_is_not_distorted(make: Callable[..., Trial], kind: str) -> None:
    last = make("linear_probe", kind).step()
    for split in SPLITS:
        for suffix in ("", "_q05", "_q50", "_q95"):
            assert last[f"distortion/{split}/cosine{suffix}"] == 1.0
            assert last[f"distortion/{split}/l2{suffix}"] == 0.0


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_a_trial_reports_the_distortion_of_its_final_weights(make: Callable[..., Trial], kind: str) -> None:
    run = make("full", kind, lr_backbone=0.02)
    run.step()
    last = run.step()
    curve = last["curves"]["distortion"]["columns"]
    assert curve["quantile"] == list(GRID)
    for split in SPLITS:
        for name, values in zip(("cosine", "l2"), plain(*features_of(run, split)), strict=True):
            reported = [last[f"distortion/{split}/{name}{suffix}"] for suffix in ("", "_q05", "_q50", "_q95")]
            expected = [float(np.mean(values)), *np.quantile(values, [0.05, 0.5, 0.95]).tolist()]
            assert reported == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert curve[f"{split}/{name}"] == pytest.approx(np.quantile(values, GRID).tolist(), rel=1e-4, abs=1e-6)
    assert last["distortion/test/cosine"] < 0.999


def test_the_features_before_are_those_of_the_pretrained_network_also_after_a_conversion(
    make: Callable[..., Trial],
) -> None:
    """DAFT converts the network before training; its function, and so its features, stay as they were."""
    run = make("daft", "cnn")
    tensors = run.model.backbone.state_dict()
    assert not torch.equal(tensors["bn1.running_mean"], run.data.reference.state_dict()["bn1.running_mean"])
    distortion = FeatureDistortion(run.data)
    final_scores(run.model, run.data, distortion.watch)
    report = distortion.report()
    for split in SPLITS:
        assert report[f"distortion/{split}/cosine"] == pytest.approx(1.0, abs=1e-6)
        assert report[f"distortion/{split}/l2_q95"] == pytest.approx(0.0, abs=1e-3)


def test_scores_are_the_same_bits_and_the_tuned_network_runs_as_often(make: Callable[..., Trial]) -> None:
    run = make("full", lr_backbone=0.02)
    run.step()
    batches: list[int] = []
    hook = run.model.backbone.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    alone = final_scores(run.model, run.data)
    passed = len(batches)
    distortion = FeatureDistortion(run.data)
    watched = final_scores(run.model, run.data, distortion.watch)
    hook.remove()
    assert watched == alone
    assert len(batches) == 2 * passed
    assert distortion.report()["distortion/test/l2"] > 0


def test_a_second_pass_replaces_the_first(make: Callable[..., Trial]) -> None:
    run = make("full", lr_backbone=0.02)
    distortion = FeatureDistortion(run.data)
    final_scores(run.model, run.data, distortion.watch)
    run.step()
    final_scores(run.model, run.data, distortion.watch)
    again = FeatureDistortion(run.data)
    final_scores(run.model, run.data, again.watch)
    assert distortion.report() == again.report()


def test_nothing_watched_is_nothing_reported(make: Callable[..., Trial]) -> None:
    assert FeatureDistortion(make("full").data).report() == {}
