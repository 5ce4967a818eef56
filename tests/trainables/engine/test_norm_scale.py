"""λ: its fixed points, what it scales, how it is chosen and learned."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.trials import MakeLayerNormTrial, MakeTrial, changed, copies, finish, layernorm_trials, source_of
from trainables.diagnostics.norm_shift import layer_norm_shift, layer_norms
from trainables.engine.best_weights import put_back
from trainables.engine.evaluation import validation_scores
from trainables.engine.trial import Trial
from trainables.engine.weight_interpolation import LAMBDA_GRID, best_lambda, fitted, rescale_layer_norm, scaled_names
from trainables.specs.metrics import CLASSIFICATION


@pytest.fixture
def trial(make_trial: MakeTrial) -> MakeLayerNormTrial:
    return layernorm_trials(make_trial)


def test_lambda_1_is_the_tuned_network_bit_for_bit_and_lambda_0_the_source(trial: MakeLayerNormTrial) -> None:
    run = trial()
    images, _ = next(run.data.batches("test"))
    source = copies(run.model)
    finish(run)
    tuned = copies(run.model)
    model = run.model.eval()
    rescale_layer_norm(model, source, 1.0, "both")
    assert changed(tuned, run) == set()
    rescale_layer_norm(model, source, 0.0, "both")
    with torch.no_grad():
        assert torch.equal(model.features(images), run.data.backbone.module(images))
    assert layer_norm_shift(source, model).total == 0.0
    put_back(model, tuned)
    with torch.no_grad():
        next(iter(layer_norms(model).values())).weight[0] = torch.inf  # type: ignore[index,operator]
    rescale_layer_norm(model, source, 0.0)
    assert layer_norm_shift(source, model).gamma == 0.0
    assert layer_norm_shift(source, model).beta > 0.0


def test_lambda_scales_the_shift_of_gamma_and_leaves_beta(trial: MakeLayerNormTrial) -> None:
    run = trial()
    source = copies(run.model)
    finish(run)
    tuned = copies(run.model)
    model = run.model
    rescale_layer_norm(model, source, 1.7)
    for layer in layer_norms(model):
        gamma = f"{layer}.weight"
        expected = source[gamma] + 1.7 * (tuned[gamma] - source[gamma])
        assert torch.allclose(model.state_dict()[gamma], expected, atol=1e-6)
    assert all(name.endswith("weight") for name in changed(tuned, run))
    put_back(model, tuned)
    per_layer = torch.zeros(len(layer_norms(model)))
    per_layer[1] = 1.0
    rescale_layer_norm(model, source, per_layer)
    shifts = layer_norm_shift(source, model).per_layer
    assert [name for name, shift in shifts.items() if shift.gamma] == [list(layer_norms(model))[1]]


@pytest.mark.parametrize(
    ("lam", "rescale", "message"),
    [
        (float("nan"), "gamma", "λ must be finite, but got nan."),
        (torch.ones(3), "gamma", "λ is one number, or one for each of the 5 LayerNorms, but got 3."),
        (0.5, "beta", "rescale must be one of 'gamma', 'both', but got 'beta'."),
    ],
)
def test_what_cannot_be_rescaled(trial: MakeLayerNormTrial, lam: Any, rescale: Any, message: str) -> None:
    model = trial().model
    with pytest.raises(ValueError) as error:
        rescale_layer_norm(model, copies(model), lam, rescale)
    assert str(error.value) == message


def test_a_source_that_does_not_fit_changes_nothing(trial: MakeLayerNormTrial) -> None:
    run = trial()
    source = {name: value + 1 for name, value in copies(run.model).items()}
    last = f"{list(layer_norms(run.model))[-1]}.weight"
    before = copies(run.model)
    for wrong, description in (({}, "none"), ({last: torch.ones(3)}, "one of shape (3,)")):
        given = {name: value for name, value in source.items() if name != last} | wrong
        with pytest.raises(ValueError) as error:
            rescale_layer_norm(run.model, given, 0.5)
        assert str(error.value) == (
            f"Rescaling needs the source tensor {last!r} of shape (16,), but the source has {description}."
        )
        assert changed(before, run) == set()


def test_ties_go_to_the_lower_nll_then_to_the_nearest_to_1() -> None:
    scores = {0.0: (0.8, 0.1), 0.7: (0.9, 0.5), 0.9: (0.9, 0.4), 1.2: (0.9, 0.4), 2.0: (0.9, 0.6)}
    named = {lam: {"val/acc": accuracy, "val/nll": nll} for lam, (accuracy, nll) in scores.items()}
    assert best_lambda(named, CLASSIFICATION) == 0.9
    assert best_lambda({lam: named[lam] for lam in (2.0, 0.7)}, CLASSIFICATION) == 0.7


class TestLearned:
    @pytest.fixture
    def plain(self, trial: MakeLayerNormTrial) -> Trial:
        """The tuned network whose λ is learned below, at λ = 1."""
        run = trial()
        finish(run)
        return run

    def test_one_lambda_is_at_the_minimum_of_the_validation_loss_and_nothing_else_moves(
        self, trial: MakeLayerNormTrial, plain: Trial
    ) -> None:
        run = trial(lam_choice="learned")
        lam = finish(run)["layernorm/lambda"]
        tuned = copies(plain.model)
        assert changed(tuned, run) == {f"{layer}.weight" for layer in layer_norms(run.model)}
        source = source_of(run)
        losses = {}
        for step in range(-10, 11):
            put_back(plain.model, tuned)
            rescale_layer_norm(plain.model, source, lam + 0.02 * step)
            losses[step] = validation_scores(plain.model, run.data)["val/nll"]
        assert min(losses, key=lambda step: losses[step]) == 0
        put_back(plain.model, tuned)
        assert losses[0] < validation_scores(plain.model, run.data)["val/nll"]

    def test_it_is_the_same_again_and_does_not_depend_on_the_batches(
        self, trial: MakeLayerNormTrial, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, again = (finish(trial(lam_choice="learned"))["layernorm/lambda"] for _ in range(2))
        assert first == again != 1.0
        run = trial(lr_backbone=1.0)
        finish(run)
        source = source_of(run)
        names = {name: source[name] for group in scaled_names(run.model, "gamma").values() for name in group}
        values = []
        for size in (5, 32):
            task = dataclasses.replace(run.spec.shared, batch_size=size)
            data = copy.copy(run.data)
            data.spec = dataclasses.replace(run.spec, shared=task)
            values.append(fitted(run.model, data, names, "gamma", per_layer=False))
        assert torch.allclose(values[0], values[1], atol=1e-3)
        sizes = []
        call = torch.func.functional_call

        def little_memory(model: nn.Module, state: Any, args: tuple[Tensor]) -> Any:
            if len(args[0]) > 8:
                raise torch.OutOfMemoryError
            sizes.append(len(args[0]))
            return call(model, state, args)

        monkeypatch.setattr(torch.func, "functional_call", little_memory)
        assert torch.allclose(fitted(run.model, data, names, "gamma", per_layer=False), values[1], atol=1e-3)
        assert set(sizes) == {8}

    def test_it_stays_in_the_range_of_the_sweep(self, plain: Trial) -> None:
        source = source_of(plain)
        names = [name for group in scaled_names(plain.model, "gamma").values() for name in group]
        tuned = copies(plain.model)
        for away, end in ((0.1, LAMBDA_GRID[-1]), (-1.0, LAMBDA_GRID[0])):
            put_back(plain.model, {name: source[name] + away * (tuned[name] - source[name]) for name in names})
            lams = fitted(plain.model, plain.data, {name: source[name] for name in names}, "gamma", per_layer=False)
            assert torch.allclose(lams, torch.full_like(lams, end), atol=1e-2)
            assert bool(((lams >= LAMBDA_GRID[0]) & (lams <= LAMBDA_GRID[-1])).all())

    def test_one_per_layer_is_better_still_and_1_where_nothing_moved(
        self, trial: MakeLayerNormTrial, plain: Trial
    ) -> None:
        runs = {scope: trial(lam_choice="learned", lam_scope=scope, lr_backbone=1.0) for scope in ("global", "layer")}
        metrics = {scope: finish(run) for scope, run in runs.items()}
        columns = metrics["layer"]["curves"]["layernorm_lambda"]["columns"]
        assert columns["layer"] == list(layer_norms(plain.model))
        assert len(set(columns["lambda"])) == len(columns["layer"])
        assert metrics["layer"]["layernorm/lambda"] == pytest.approx(sum(columns["lambda"]) / len(columns["lambda"]))
        loss = {scope: validation_scores(run.model, run.data)["val/nll"] for scope, run in runs.items()}
        assert loss["layer"] < loss["global"]
        some = finish(trial(lam_choice="learned", lam_scope="layer", lr_backbone=1.0, norms="attention"))
        by_layer = dict(zip(*some["curves"]["layernorm_lambda"]["columns"].values(), strict=True))
        assert {name for name, lam in by_layer.items() if lam != 1.0} == {n for n in by_layer if n.endswith("norm1")}
