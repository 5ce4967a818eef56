"""A refit: the same configuration on training and validation images together, without any validation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.support.synthetic import SIZES, MemoryStore, shapes
from tests.support.trials import LAYERNORM_RATES, MakeTrial, copies, finish, history_of, same_tensors
from trainables.engine.trial import Trial
from trainables.specs.errors import NonFiniteError
from trainables.specs.metrics import COMPONENT
from trainables.tasks.linear_probe_head import fit_linear_probe

pytestmark = pytest.mark.usefixtures("cpu_only")

TRAINED = {"lr_backbone": 0.01, "lr_head": 0.1}


def refit_of(trial: Trial, result: dict[str, Any] | None = None, store: MemoryStore | None = None) -> Trial:
    """A refit of a finished trial's configuration."""
    recorded = {name: value for name, value in (result or {}).items() if isinstance(value, float)}
    spec = dataclasses.replace(trial.spec, role="refit")
    return Trial(spec, store=store or shapes(), device="cpu", recorded=recorded)


def test_the_training_set_is_training_and_validation_images(make_trial: MakeTrial) -> None:
    data = refit_of(make_trial("full")).data
    assert data.train_size == SIZES["train"] + SIZES["val"]
    assert data.names("train") == [f"{split}/{i}" for split in ("train", "val") for i in range(SIZES[split])]
    assert not data.has_validation
    with pytest.raises(ValueError, match="A split is one of train, test, ood/inverted, ood/noisy, but got 'val'"):
        next(data.batches("val"))


def test_every_image_comes_once_per_epoch_and_batches_mix_both_splits(make_trial: MakeTrial) -> None:
    trial = refit_of(make_trial("full"))
    store = shapes()
    # Every image gets a number that its pixels carry.
    for first, split in ((0, "train"), (100, "val")):
        numbers = np.arange(first, first + SIZES[split], dtype=np.uint8)
        store.pixels[split] = np.broadcast_to(numbers[:, None, None, None], store.pixels[split].shape).copy()
        store.targets[split] = numbers.astype(np.int64)
    data = Trial(trial.spec, store=store, device="cpu", recorded={}).data
    config = data.backbone.data_config
    seen = []
    for images, labels in data.batches("train", shuffle_seed=3):
        pixels = images[:, 0, 0, 0] * config.std[0] + config.mean[0]
        assert (255 * pixels).round().long().tolist() == labels.tolist()
        assert labels.min() < 100 <= labels.max()
        seen += labels.tolist()
    assert sorted(seen) == [*range(64), *range(100, 132)]


def test_cached_features_come_in_the_order_of_the_images(make_trial: MakeTrial) -> None:
    data = refit_of(make_trial("full")).data
    labels = torch.tensor(data.labels("train"))
    positions = torch.arange(len(labels)).float()[:, None]
    by_feature = [batch.tolist() for _, batch in data.feature_batches(positions, labels, shuffle_seed=5)]
    by_image = [batch.tolist() for _, batch in data.batches("train", shuffle_seed=5, drop_last=True)]
    assert by_feature == by_image


def test_equal_seeds_give_equal_tensors_and_another_network_than_the_trial_s(make_trial: MakeTrial) -> None:
    trial = make_trial("full", **TRAINED)
    result = finish(trial)
    first, second = refit_of(trial, result), refit_of(trial, result)
    history = history_of(first)
    finish(second)
    assert same_tensors(copies(first.model), copies(second.model))
    assert not same_tensors(copies(first.model), copies(trial.model))
    assert len(history) == trial.unit == 2
    assert history[0]["cost/training_images"] == 96.0
    other = Trial(dataclasses.replace(first.spec, seed=1), store=shapes(), device="cpu")
    finish(other)
    assert not same_tensors(copies(first.model), copies(other.model))


def test_nothing_is_measured_on_validation(make_trial: MakeTrial) -> None:
    trial = refit_of(make_trial("full", **TRAINED))
    names = {name for unit in history_of(trial) for name in unit}
    assert {name for name in names if name.startswith(("val/", "best/")) or "val_" in name} == set()
    assert {"test/acc", "ood/noisy/acc", "ood/mean/acc", "train/acc"} <= names
    meta = trial.kept_weights(3).meta
    assert (meta["role"], meta["result"]["test/acc"]) == ("refit", trial.result and trial.result["test/acc"])


def test_the_weights_are_those_of_the_last_unit(make_trial: MakeTrial) -> None:
    trial = refit_of(make_trial("full", **TRAINED))
    trial.step()
    before = copies(trial.model)
    last: list[dict[str, torch.Tensor]] = []
    trial.after_step = lambda: last.append(copies(trial.model))
    trial.step()
    assert same_tensors(copies(trial.model), last[-1])
    assert not same_tensors(copies(trial.model), before)


def test_the_probe_has_the_recorded_c(make_trial: MakeTrial) -> None:
    trial = make_trial("linear_probe", "cnn")
    result = finish(trial)
    # Another one than validation would choose, to see that it is taken over and not chosen again.
    refit = refit_of(trial, {**result, "linear_probe/C": 0.125})
    refitted = finish(refit)
    assert refitted["linear_probe/C"] == 0.125
    features = refit.data.features("train").astype(np.float64)
    scaled = (features - features.mean()) / features.std()
    weight, _ = fit_linear_probe(scaled, refit.data.labels("train"), 0.125)
    kept = refit.model.head.weight.detach().numpy()
    # Both solutions are as near to the optimum as the solver's tolerance.
    assert kept == pytest.approx(weight / features.std(), rel=1e-2, abs=1e-3)


def test_a_head_that_starts_from_the_probe_starts_from_the_recorded_c(make_trial: MakeTrial) -> None:
    trial = make_trial("lp_ft", "cnn", lr_backbone=1e-4)
    result = finish(trial)
    assert result["linear_probe/C"] > 0
    assert finish(refit_of(trial, {**result, "linear_probe/C": 0.125}))["linear_probe/C"] == 0.125


@pytest.mark.parametrize(
    ("hparams", "name"),
    [
        ({"lam_choice": "sweep"}, "layernorm/lambda"),
        ({"lam_choice": "learned"}, "layernorm/lambda"),
        ({"wise": "sweep"}, "wise/alpha"),
    ],
)
def test_lambda_and_alpha_are_taken_over(make_trial: MakeTrial, hparams: dict[str, Any], name: str) -> None:
    trial = make_trial("layernorm", **{**LAYERNORM_RATES, **hparams})
    result = finish(trial)
    refit = refit_of(trial, {**result, name: 0.375})
    assert finish(refit)[name] == 0.375
    kind = "alpha" if name == "wise/alpha" else "lambda"
    assert refit.kept_weights(0).meta["interpolated"] == kind


def test_components_chosen_by_plasticity_are_those_of_the_trial(make_trial: MakeTrial) -> None:
    trial = make_trial("components", lr_backbone=0.01)
    result = finish(trial)
    chosen = {COMPONENT.of(kind): float(kind == "ln1") for kind in ("ln1", "mha", "ln2", "fc1", "fc2")}
    assert chosen.keys() <= result.keys()
    refitted = finish(refit_of(trial, result | chosen))
    assert {name: refitted[name] for name in chosen} == chosen


def test_a_fixed_lambda_and_cycles_need_no_record(make_trial: MakeTrial) -> None:
    trial = make_trial("layernorm", **LAYERNORM_RATES, lam=0.5, cycles=1)
    assert finish(refit_of(trial))["layernorm/lambda"] == 0.5


@pytest.mark.parametrize(
    ("hparams", "choice"),
    [
        ({"lam_choice": "learned", "lam_scope": "layer"}, "lam_choice='learned' chose a λ for each layer"),
        ({"lam_choice": "sweep", "cycles": 1}, "lam_choice='sweep' chose a λ in each of 1 cycles"),
    ],
)
def test_choices_that_are_not_one_number_are_refused(
    make_trial: MakeTrial, hparams: dict[str, Any], choice: str
) -> None:
    trial = make_trial("layernorm", **hparams)
    with pytest.raises(ValueError, match=rf"layernorm with {choice} on validation\. Export the trial's own weights"):
        refit_of(trial)


def test_a_choice_that_is_not_on_record_is_refused(make_trial: MakeTrial) -> None:
    with pytest.raises(ValueError, match="takes over linear_probe/C from the record of a trial, but that trial has no"):
        refit_of(make_trial("linear_probe")).step()


def test_lora_is_merged_and_kept_as_an_update(make_trial: MakeTrial) -> None:
    refit = refit_of(make_trial("lora", rank=2))
    finish(refit)
    kept = refit.kept_weights(0)
    assert kept.meta["adapter"]["r"] == 2
    assert kept.adapter


def test_weights_that_overflow_in_the_last_step_are_an_error(make_trial: MakeTrial) -> None:
    refit = refit_of(make_trial("full", task={"epochs": 1}, **TRAINED))

    def overflow() -> None:
        if refit.state_without_tensors()["step"] == 6:
            with torch.no_grad():
                refit.model.head.weight.fill_(math.inf)

    refit.after_step = overflow
    with pytest.raises(NonFiniteError, match=r"test .* must be finite, but it was nan after the refit"):
        refit.step()
