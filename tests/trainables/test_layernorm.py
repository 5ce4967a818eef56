"""LayerNorm tuning: what moves, λ's fixed points, how λ is chosen, the cyclic framework."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import search_spaces
from tests.conformance import StrategyConformance
from tests.synthetic import shapes
from trainables import strategy_class
from trainables.core import scoring
from trainables.core.contract import Curve
from trainables.core.norm_scale import fitted, scaled_names
from trainables.core.run import Run
from trainables.core.scoring import final_scores, validation_scores
from trainables.core.snapshot import put_back
from trainables.core.task import ModelSpec, Task, TrialSpec
from trainables.core.vit_blocks import component_kinds
from trainables.diagnostics.norm_shift import fine_tuning_shift_ratio, layer_norm_shift, layer_norms
from trainables.layernorm import GRID, rescale_layer_norm

RATES = {"lr_backbone": 0.1, "lr_head": 3.0}


class TestConformance(StrategyConformance):
    strategy = "layernorm"
    networks = ("vit",)
    learning: ClassVar[Mapping[str, Any]] = RATES
    reports = frozenset(["layernorm/*"])


class TestConformanceOfTheSweep(TestConformance):
    hparams: ClassVar[Mapping[str, Any]] = {"lam_choice": "sweep"}


class TestConformanceOfCycles(TestConformance):
    hparams: ClassVar[Mapping[str, Any]] = {"cycles": 2, "lam": 1.3}
    epochs = 5


@pytest.fixture
def trial(network: Callable[[str], str], tmp_path: Path, one_thread: None) -> Callable[..., Run]:
    def make(kind: str = "vit", epochs: int = 2, **hparams: Any) -> Run:
        task = Task(store="m", model=ModelSpec(name=network(kind)), epochs=epochs, batch_size=16, cache=str(tmp_path))
        spec = TrialSpec(task=task, strategy="layernorm", hparams={**RATES, **hparams})
        return Run(spec, store=shapes(), device="cpu")

    return make


def finish(run: Run) -> dict[str, Any]:
    """Metrics of the last unit."""
    metrics: dict[str, Any] = {}
    while not run.finished:
        metrics = run.step()
    return metrics


def changed(before: Mapping[str, Tensor], run: Run) -> set[str]:
    """Names of the tensors that are no longer the same bits."""
    return {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("train", "kinds"), [("both", ("weight", "bias")), ("gamma", ("weight",)), ("beta", ("bias",))]
)
@pytest.mark.parametrize("norms", ["all", "attention"])
def test_nothing_but_the_chosen_norms_and_the_head_moves(
    trial: Callable[..., Run], train: str, kinds: tuple[str, ...], norms: str
) -> None:
    run = trial(train=train, norms=norms)
    before = copies(run.model)
    finish(run)
    owners = component_kinds(run.model)
    wanted = {f"{layer}.{kind}" for layer in layer_norms(run.model) for kind in kinds}
    if norms == "attention":
        wanted = {name for name in wanted if owners[name] == "ln1"}
    assert wanted
    assert changed(before, run) == wanted | {"head.weight", "head.bias"}


def test_lambda_1_is_the_tuned_network_bit_for_bit_and_lambda_0_the_source(trial: Callable[..., Run]) -> None:
    run = trial()
    images, _ = next(run.data.batches("test"))
    source = copies(run.model)
    finish(run)
    tuned, model = copies(run.model), run.model.eval()
    rescale_layer_norm(model, source, 1.0, "both")
    assert changed(tuned, run) == set()
    rescale_layer_norm(model, source, 0.0, "both")
    with torch.no_grad():
        assert torch.equal(model.features(images), run.data.backbone.module(images))
    assert layer_norm_shift(source, model).total == 0.0
    put_back(model, tuned)
    rescale_layer_norm(model, source, 0.0)
    assert layer_norm_shift(source, model).gamma == 0.0
    assert layer_norm_shift(source, model).beta > 0.0


def test_fsr_of_a_sample_against_itself_is_1(trial: Callable[..., Run]) -> None:
    shift, again = (finish(trial())["ln_shift/last/total"] for _ in range(2))
    assert shift > 0
    assert fine_tuning_shift_ratio(shift, again) == 1.0


def test_lambda_scales_the_shift_of_gamma_and_leaves_beta(trial: Callable[..., Run]) -> None:
    run = trial()
    source = copies(run.model)
    finish(run)
    tuned, model = copies(run.model), run.model
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


def test_a_fixed_lambda_counts_in_the_accuracy_that_selects(trial: Callable[..., Run]) -> None:
    metrics = finish(trial(lam=0.0, rescale="both", lr_backbone=1.0))
    run = trial(lam=1.0, rescale="both", lr_backbone=1.0)
    plain = finish(run)
    assert plain["best/val/acc"] == plain["layernorm/val_acc_at_1"] == metrics["layernorm/val_acc_at_1"]
    source = {f"backbone.{name}": value for name, value in run.data.reference.state_dict().items()}
    rescale_layer_norm(run.model, source, 0.0, "both")
    assert metrics["best/val/acc"] == validation_scores(run.model, run.data)["val/acc"]
    assert metrics["test/acc"] == final_scores(run.model, run.data)["test/acc"]


class TestSweep:
    def test_the_curve_is_that_of_21_networks_made_by_hand_and_validation_chooses(
        self, trial: Callable[..., Run]
    ) -> None:
        run = trial(lam_choice="sweep", lr_backbone=0.5)
        metrics = finish(run)
        columns = metrics["curves"]["lambda"]["columns"]
        assert columns["lambda"] == list(GRID)
        assert len(GRID) == 21
        by_hand = trial(lam=1.0, lr_backbone=0.5)
        assert finish(by_hand)["best/val/acc"] == columns["val/acc"][GRID.index(1.0)]
        source = {f"backbone.{name}": value for name, value in run.data.reference.state_dict().items()}
        tuned = copies(by_hand.model)
        for i, lam in enumerate(GRID):
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
        assert metrics["test/acc"] == columns["test/acc"][GRID.index(ranked[0][2])]

    def test_it_takes_no_training_step(self, trial: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
        steps: list[int] = []
        step = torch.optim.SGD.step
        monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a, **k: (steps.append(1), step(self, *a, **k))[1])
        plain = trial()
        finish(plain)
        alone = len(steps)
        finish(trial(lam_choice="sweep"))
        assert len(steps) == 2 * alone == 2 * 2 * plain.data.steps_per_epoch

    def test_it_costs_one_pass_over_every_split_and_value(
        self, trial: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passes: Counter[str] = Counter()
        score = scoring.score

        def counted(model: Any, data: Any, split: str, *rest: Any) -> dict[str, float]:
            passes[split] += 1
            return score(model, data, split, *rest)

        monkeypatch.setattr(scoring, "score", counted)
        finish(trial())
        plain = passes.copy()
        passes.clear()
        finish(trial(lam_choice="sweep"))
        passes.subtract(plain)
        assert passes == {"val": 20, "test": 21, "ood/inverted": 21, "ood/noisy": 21}  # λ = 1 is validated anyway

    @pytest.mark.parametrize("cycles", [0, 2])
    def test_its_curve_leaves_every_tensor_as_it_was(self, trial: Callable[..., Run], cycles: int) -> None:
        run = trial(lam_choice="sweep", lr_backbone=0.5, epochs=4, cycles=cycles)
        metrics = finish(run)
        finished = copies(run.model)
        curve = run.strategy.curves(run.model, run.data)["lambda"]
        assert isinstance(curve, Curve)
        assert changed(finished, run) == set()
        assert curve.columns == metrics["curves"]["lambda"]["columns"]
        at = GRID.index(1.0 if cycles else metrics["layernorm/lambda"])
        assert metrics["test/acc"] == curve.columns["test/acc"][at]
        assert len(set(curve.columns["val/nll"])) > 10


class TestLearned:
    @pytest.fixture
    def plain(self, trial: Callable[..., Run]) -> Run:
        """The tuned network whose λ is learned below, at λ = 1."""
        run = trial(lr_backbone=1.0)
        finish(run)
        return run

    def test_one_lambda_is_at_the_minimum_of_the_validation_loss_and_nothing_else_moves(
        self, trial: Callable[..., Run], plain: Run
    ) -> None:
        run = trial(lam_choice="learned", lr_backbone=1.0)
        lam = finish(run)["layernorm/lambda"]
        tuned = copies(plain.model)
        assert changed(tuned, run) == {f"{layer}.weight" for layer in layer_norms(run.model)}
        source = {f"backbone.{name}": value for name, value in run.data.reference.state_dict().items()}
        losses = {}
        for step in range(-10, 11):
            put_back(plain.model, tuned)
            rescale_layer_norm(plain.model, source, lam + 0.02 * step)
            losses[step] = validation_scores(plain.model, run.data)["val/nll"]
        assert min(losses, key=lambda step: losses[step]) == 0
        put_back(plain.model, tuned)
        assert losses[0] < validation_scores(plain.model, run.data)["val/nll"]

    def test_it_is_the_same_again_and_does_not_depend_on_the_batches(
        self, trial: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, again = (finish(trial(lam_choice="learned"))["layernorm/lambda"] for _ in range(2))
        assert first == again != 1.0
        run = trial(lr_backbone=1.0)
        finish(run)
        source = {f"backbone.{name}": value for name, value in run.data.reference.state_dict().items()}
        names = {name: source[name] for group in scaled_names(run.model, "gamma").values() for name in group}
        found = []
        for size in (5, 32):
            task = dataclasses.replace(run.spec.task, batch_size=size)
            data = copy.copy(run.data)
            data.spec = dataclasses.replace(run.spec, task=task)
            found.append(fitted(run.model, data, names, "gamma", per_layer=False))
        assert torch.allclose(found[0], found[1], atol=1e-3)
        sizes, call = [], torch.func.functional_call

        def little_memory(model: nn.Module, state: Any, args: tuple[Tensor]) -> Any:
            if len(args[0]) > 8:
                raise torch.OutOfMemoryError
            sizes.append(len(args[0]))
            return call(model, state, args)

        monkeypatch.setattr(torch.func, "functional_call", little_memory)
        assert torch.allclose(fitted(run.model, data, names, "gamma", per_layer=False), found[1], atol=1e-3)
        assert set(sizes) == {8}

    def test_one_per_layer_is_better_still_and_1_where_nothing_moved(
        self, trial: Callable[..., Run], plain: Run
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


class TestCycles:
    def test_head_and_norms_take_turns_and_lambda_ends_each_cycle(self, trial: Callable[..., Run]) -> None:
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

    def test_too_few_units(self, trial: Callable[..., Run]) -> None:
        with pytest.raises(ValueError) as error:
            trial(epochs=3, cycles=2).step()
        assert str(error.value) == (
            "2 cycles of head and norms take at least 4 units, but the trial has 3. Give it more epochs, or fewer "
            "cycles."
        )


def test_a_network_without_layer_norm_is_refused(trial: Callable[..., Run]) -> None:
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
def test_impossible_values(trial: Callable[..., Run], hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        trial(**hparams)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("lam", "rescale", "message"),
    [
        (float("nan"), "gamma", "λ must be finite, but got nan."),
        (torch.ones(3), "gamma", "λ is one number, or one for each of the 5 LayerNorms, but got 3."),
        (0.5, "beta", "rescale must be one of 'gamma', 'both', but got 'beta'."),
    ],
)
def test_what_cannot_be_rescaled(trial: Callable[..., Run], lam: Any, rescale: Any, message: str) -> None:
    model = trial().model
    with pytest.raises(ValueError) as error:
        rescale_layer_norm(model, copies(model), lam, rescale)
    assert str(error.value) == message


def test_a_source_that_does_not_fit_changes_nothing(trial: Callable[..., Run]) -> None:
    run = trial()
    source = {name: value + 1 for name, value in copies(run.model).items()}
    last, before = f"{list(layer_norms(run.model))[-1]}.weight", copies(run.model)
    for wrong, got in (({}, "none"), ({last: torch.ones(3)}, "one of shape (3,)")):
        given = {name: value for name, value in source.items() if name != last} | wrong
        with pytest.raises(ValueError) as error:
            rescale_layer_norm(run.model, given, 0.5)
        assert str(error.value) == (
            f"Rescaling needs the source tensor {last!r} of shape (16,), but the source has {got}."
        )
        assert changed(before, run) == set()


def test_lambda_is_searched_only_where_it_is_fixed_for_a_trial() -> None:
    assert "lam" in search_spaces.searched("layernorm")
    assert "lam" not in search_spaces.searched("layernorm", {"lam_choice": "sweep"})
    assert search_spaces.default_point("layernorm")["lam"] == 1.0
    assert "lam" not in search_spaces.searched("layernorm", {"train": "beta"})
    assert "lam" in search_spaces.searched("layernorm", {"train": "beta", "rescale": "both"})


@pytest.mark.parametrize("name", search_spaces.presets("layernorm"))
def test_every_point_of_a_preset_is_a_trial(name: str) -> None:
    preset = search_spaces.preset("layernorm", name)
    for point in preset.points(0):
        strategy_class("layernorm").from_hparams({**preset.fixed, **point})
