"""LayerNorm tuning: what moves, λ's fixed points, how λ is chosen, the cyclic framework."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

import search_spaces
from tests.conformance import StrategyConformance
from tests.support.trials import (
    LAYERNORM_RATES,
    MakeLayerNormTrial,
    MakeTrial,
    changed,
    copies,
    finish,
    layernorm_trials,
    source_of,
)
from trainables import strategy_class
from trainables.diagnostics.norm_shift import fine_tuning_shift_ratio, layer_norms
from trainables.engine import evaluation
from trainables.engine.best_weights import put_back
from trainables.engine.evaluation import final_scores, validation_scores
from trainables.layernorm import LAMBDA_GRID, rescale_layer_norm
from trainables.models.transformer_blocks import component_kinds


class TestConformance(StrategyConformance):
    strategy = "layernorm"
    networks = ("vit",)
    learning: ClassVar[Mapping[str, Any]] = LAYERNORM_RATES
    reports = frozenset(["layernorm/*"])


class TestConformanceOfTheSweep(TestConformance):
    hparams: ClassVar[Mapping[str, Any]] = {"lam_choice": "sweep"}


class TestConformanceOfCycles(TestConformance):
    hparams: ClassVar[Mapping[str, Any]] = {"cycles": 2, "lam": 1.3}
    epochs = 5


@pytest.fixture
def trial(make_trial: MakeTrial) -> MakeLayerNormTrial:
    return layernorm_trials(make_trial)


@pytest.mark.parametrize(
    ("train", "kinds"), [("both", ("weight", "bias")), ("gamma", ("weight",)), ("beta", ("bias",))]
)
@pytest.mark.parametrize("norms", ["all", "attention"])
def test_nothing_but_the_chosen_norms_and_the_head_moves(
    trial: MakeLayerNormTrial, train: str, kinds: tuple[str, ...], norms: str
) -> None:
    run = trial(train=train, norms=norms)
    before = copies(run.model)
    finish(run)
    owners = component_kinds(run.model)
    expected = {f"{layer}.{kind}" for layer in layer_norms(run.model) for kind in kinds}
    if norms == "attention":
        expected = {name for name in expected if owners[name] == "ln1"}
    assert expected
    assert changed(before, run) == expected | {"head.weight", "head.bias"}


def test_statistics_of_batch_norm_stay_as_they_were(trial: MakeLayerNormTrial) -> None:
    run = trial(kind="hybrid")
    before = copies(run.model)
    finish(run)
    assert any(name.endswith("running_mean") for name in before)
    expected = {f"{layer}.{kind}" for layer in layer_norms(run.model) for kind in ("weight", "bias")}
    assert changed(before, run) == expected | {"head.weight", "head.bias"}


def test_fsr_of_a_sample_against_itself_is_1(trial: MakeLayerNormTrial) -> None:
    shift, again = (finish(trial())["ln_shift/last/total"] for _ in range(2))
    assert shift > 0
    assert fine_tuning_shift_ratio(shift, again) == 1.0


def test_a_fixed_lambda_counts_in_the_accuracy_that_selects(trial: MakeLayerNormTrial) -> None:
    metrics = finish(trial(lam=0.0, rescale="both", lr_backbone=1.0))
    run = trial(lam=1.0, rescale="both", lr_backbone=1.0)
    plain = finish(run)
    assert plain["best/val/acc"] == plain["layernorm/val_acc_at_1"] == metrics["layernorm/val_acc_at_1"]
    source = source_of(run)
    rescale_layer_norm(run.model, source, 0.0, "both")
    assert metrics["best/val/acc"] == validation_scores(run.model, run.data)["val/acc"]
    assert metrics["test/acc"] == final_scores(run.model, run.data)["test/acc"]


class TestSweep:
    def test_the_curve_is_that_of_21_networks_made_by_hand_and_validation_chooses(
        self, trial: MakeLayerNormTrial
    ) -> None:
        run = trial(lam_choice="sweep", lr_backbone=0.5)
        metrics = finish(run)
        columns = metrics["curves"]["lambda"]["columns"]
        assert columns["lambda"] == list(LAMBDA_GRID)
        assert len(LAMBDA_GRID) == 21
        by_hand = trial(lam=1.0, lr_backbone=0.5)
        assert finish(by_hand)["best/val/acc"] == columns["val/acc"][LAMBDA_GRID.index(1.0)]
        source = source_of(run)
        tuned = copies(by_hand.model)
        for i, lam in enumerate(LAMBDA_GRID):
            put_back(by_hand.model, tuned)
            rescale_layer_norm(by_hand.model, source, lam)
            scores = {**validation_scores(by_hand.model, run.data), **final_scores(by_hand.model, run.data)}
            assert scores == {name: columns[name][i] for name in scores}
        ranked = sorted(
            zip(columns["val/acc"], columns["val/nll"], columns["lambda"], strict=True),
            key=lambda row: (-row[0], row[1], abs(row[2] - 1)),
        )
        assert metrics["layernorm/lambda"] == ranked[0][2]
        assert metrics["best/val/acc"] == ranked[0][0]
        assert metrics["test/acc"] == columns["test/acc"][LAMBDA_GRID.index(ranked[0][2])]

    def test_its_curve_is_that_of_the_tuned_network_also_with_wise(self, trial: MakeLayerNormTrial) -> None:
        plain = finish(trial(lam_choice="sweep", lr_backbone=0.5))["curves"]["lambda"]
        assert finish(trial(lam_choice="sweep", lr_backbone=0.5, wise=0.3))["curves"]["lambda"] == plain

    def test_it_takes_no_training_step(self, trial: MakeLayerNormTrial, monkeypatch: pytest.MonkeyPatch) -> None:
        steps: list[int] = []
        step = torch.optim.SGD.step
        monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a, **k: (steps.append(1), step(self, *a, **k))[1])
        plain = trial()
        finish(plain)
        alone = len(steps)
        finish(trial(lam_choice="sweep"))
        assert len(steps) == 2 * alone == 2 * 2 * plain.data.steps_per_epoch

    def test_it_costs_one_pass_over_every_split_and_value(
        self, trial: MakeLayerNormTrial, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passes: Counter[str] = Counter()
        score = evaluation.score

        def counted(model: Any, data: Any, split: str, *rest: Any, **options: Any) -> dict[str, float]:
            passes[split] += 1
            return score(model, data, split, *rest, **options)

        monkeypatch.setattr(evaluation, "score", counted)
        finish(trial())
        plain = passes.copy()
        passes.clear()
        finish(trial(lam_choice="sweep"))
        passes.subtract(plain)
        assert passes == {"val": 20, "test": 21, "ood/inverted": 21, "ood/noisy": 21}  # λ = 1 is validated anyway

    @pytest.mark.parametrize("cycles", [0, 2])
    def test_its_curve_leaves_every_tensor_as_it_was(
        self, trial: MakeLayerNormTrial, cycles: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = trial(lam_choice="sweep", lr_backbone=0.5, epochs=4, cycles=cycles)
        hook = run.strategy.curves
        different = set[str]()

        def watched(model: Any, data: Any, tuned: Any) -> Any:
            before = copies(model)
            result = hook(model, data, tuned)
            different.update(changed(before, run))
            return result

        monkeypatch.setattr(run.strategy, "curves", watched)
        metrics = finish(run)
        assert different == set()
        columns = metrics["curves"]["lambda"]["columns"]
        lam = 1.0 if cycles else metrics["layernorm/lambda"]
        assert cycles or lam != 1.0, "choose rates at which a curve that forgets to put λ back is seen"
        assert metrics["test/acc"] == columns["test/acc"][LAMBDA_GRID.index(lam)]
        assert len(set(columns["val/nll"])) > 10


class TestCycles:
    def test_head_and_norms_take_turns_and_lambda_ends_each_cycle(self, trial: MakeLayerNormTrial) -> None:
        run = trial(epochs=6, cycles=2, lam=0.5)
        source = copies(run.model)
        norms = {f"{layer}.{kind}" for layer in layer_norms(run.model) for kind in ("weight", "bias")}
        moved = []
        for _ in range(6):
            before = copies(run.model)
            metrics = run.step()
            if not run.finished:  # the last unit ends with the best weights
                moved.append(changed(before, run))
        head = {"head.weight", "head.bias"}
        assert moved == [head, norms, norms, head, norms]
        assert metrics["layernorm/lambda"] == 0.5
        again = trial(epochs=6, cycles=2, lam=1.0)
        for _ in range(2):
            again.step()
        again.step()
        half = trial(epochs=6, cycles=2, lam=0.5)
        for _ in range(3):
            half.step()
        layer = f"{next(iter(layer_norms(half.model)))}.weight"
        expected = source[layer] + 0.5 * (again.model.state_dict()[layer] - source[layer])
        assert torch.allclose(half.model.state_dict()[layer], expected, atol=1e-7)

    def test_too_few_units(self, trial: MakeLayerNormTrial) -> None:
        with pytest.raises(ValueError) as error:
            trial(epochs=3, cycles=2).step()
        assert str(error.value) == (
            "2 cycles of head and norms take at least 4 units, but the trial has 3. Give it more epochs, or fewer "
            "cycles."
        )


def test_a_network_without_layer_norm_is_refused(trial: MakeLayerNormTrial) -> None:
    with pytest.raises(ValueError) as error:
        trial(kind="cnn").step()
    assert str(error.value) == (
        "LayerNorm tuning needs a network with LayerNorm, but this one has none. For BatchNorm networks use daft, "
        "which adapts BatchNorm to the target data."
    )


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"cycles": -1}, "cycles must be a whole number of at least 0, but got -1."),
        ({"lam": -0.5}, "lam must be a finite number of at least 0, but got -0.5."),
        ({"lam": "sweep"}, "lam must be a finite number of at least 0, but got 'sweep'."),
        (
            {"train": "beta", "lam": 0.5},
            "train='beta' leaves γ where it was, so that rescale='gamma' has nothing to scale. Use rescale='both', or "
            "leave lam and lam_choice out.",
        ),
        ({"lam_choice": "best"}, "lam_choice must be one of 'fixed', 'sweep', 'learned', but got 'best'."),
        (
            {"lam_scope": "layer"},
            "lam_scope='layer' needs lam_choice='learned', but got 'fixed'. Leave lam_scope out, or learn λ.",
        ),
    ],
)
def test_impossible_values(trial: MakeLayerNormTrial, hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        trial(**hparams)
    assert str(error.value) == message


def test_lambda_is_searched_only_where_it_is_fixed_for_a_trial() -> None:
    assert "lam" in search_spaces.searched("layernorm")
    assert "lam" not in search_spaces.searched("layernorm", {"lam_choice": "sweep"})
    assert search_spaces.default_point("layernorm")["lam"] == 1.0
    assert "lam" not in search_spaces.searched("layernorm", {"train": "beta"})
    assert "lam" in search_spaces.searched("layernorm", {"train": "beta", "rescale": "both"})


@pytest.mark.parametrize("name", search_spaces.presets("layernorm"))
def test_every_point_of_a_preset_is_a_trial(name: str) -> None:
    preset = search_spaces.preset("layernorm", name)
    points = list(preset.points(0))
    assert points
    for point in points:
        config = strategy_class("layernorm").from_hparams({**preset.fixed, **point}).config
        assert {name: getattr(config, name) for name in point} == point
