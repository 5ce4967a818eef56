"""What happens around the end of a phase and of a trial: finish, finalize, curves, and which numbers they change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.support.synthetic import shapes
from tests.support.trials import MakeTrial, same_numbers, same_tensors
from trainables.engine import trial as run_module
from trainables.engine.contract import Phase, Prepared, Strategy, TrainingConfig, Tuned
from trainables.engine.evaluation import validation_scores
from trainables.engine.trial import Trial
from trainables.specs.measurements import Curve, Report
from trainables.storage.checkpoint_format import bitwise_equal

CALLS: list[str] = []


class Watched(Strategy):
    """Two phases that report when they finish; a curve over the scale of the head."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        lr_backbone: float = 0.02

    def prepare(self, model: Any, data: Any) -> Prepared:
        return Prepared({"plasticity/mha": 2.0, "start": Curve({"block": [0, 1], "value": [0.5, None]})})

    def phases(self, units: int) -> list[Phase]:
        return [
            Phase("head", 2, groups=frozenset({"head"}), finish=self._finish),
            Phase("all", units - 2, finish=self._finish),
        ]

    def _finish(self, model: Any, data: Any) -> Report:
        CALLS.append("finish")
        with torch.no_grad():
            model.head.bias.zero_()
        return {"watched/finished": float(len(CALLS))}

    def curves(self, model: Any, data: Any, tuned: Any = None) -> Report:
        CALLS.append("curves")
        accuracy = validation_scores(model, data)["val/acc"]
        return {"watched/points": 1.0, "scale": Curve({"scale": [1.0], "val/acc": [accuracy]})}


class Spoiling(Watched):
    """A post-step that makes the network useless."""

    def finalize(self, model: Any, data: Any, prepared: Any = None) -> Tuned:
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        return Tuned({"watched/spoiled": 1.0})


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, make_trial: MakeTrial) -> Any:
    def make(strategy: type[Strategy], **fields: Any) -> Trial:
        monkeypatch.setattr(run_module, "strategy_class", lambda name, task: strategy)
        CALLS.clear()
        return make_trial("watched", seed=3, task={"epochs": 4, **fields})

    return make


def test_a_phase_is_finished_after_its_last_unit_and_before_its_validation(make: Any) -> None:
    run = make(Watched)
    assert "watched/finished" not in run.step()
    metrics = run.step()
    assert metrics["watched/finished"] == 1.0
    assert not run.model.head.bias.any()
    assert metrics["val/nll"] == validation_scores(run.model, run.data)["val/nll"]
    assert "watched/finished" not in run.step()
    assert run.step()["watched/finished"] == 2.0
    assert CALLS == ["finish", "finish", "curves"]


def test_curves_are_reported_once_beside_the_metrics(make: Any) -> None:
    run = make(Watched)
    first = run.step()
    assert first["curves"] == {"start": {"columns": {"block": [0, 1], "value": [0.5, None]}, "note": ""}}
    assert first["plasticity/mha"] == 2.0
    assert "start" not in first
    assert "curves" not in run.step()
    run.step()
    last = run.step()
    assert last["watched/points"] == 1.0
    curve = last["curves"]["scale"]["columns"]
    assert curve == {"scale": [1.0], "val/acc": [last["best/val/acc"]]}


def test_the_accuracy_that_selects_is_that_of_the_finalised_network(make: Any) -> None:
    run = make(Spoiling, evaluate_at=(3,))
    history = [run.step() for _ in range(4)]
    assert max(unit["val/acc"] for unit in history) > 0.5
    for unit in history[2:]:
        assert unit["best/val/acc"] == 0.25
        assert unit["test/acc"] == 0.25
    kept = make(Watched)
    assert [kept.step() for _ in range(4)][-1]["best/val/acc"] > 0.5


def test_an_early_end_happens_on_a_copy(make: Any) -> None:
    early = make(Spoiling, evaluate_at=(3,))
    plain = None
    for _ in range(3):
        early.step()
    plain = make(Spoiling)
    for _ in range(3):
        plain.step()
    assert same_tensors(early.model.state_dict(), plain.model.state_dict())


def test_a_curve_has_columns_of_one_length() -> None:
    with pytest.raises(ValueError) as error:
        Curve({"x": [1, 2], "y": [1]})
    assert str(error.value) == (
        "The columns of a curve must be equally long, and at least one, but got {'x': 2, 'y': 1}."
    )


def test_an_oracle_reference_trains_on_the_ood_domain_it_names(make: Any) -> None:
    run = make(Watched, train_on="noisy", train_fraction=0.25)
    assert run.step()["cost/training_images"] == 32.0
    assert run.data.labels("train").tolist() == shapes().labels("ood/noisy").tolist()
    assert make(Watched, train_fraction=0.25).step()["cost/training_images"] == 16.0
    with pytest.raises(ValueError) as error:
        make(Watched, train_on="dim").step()
    assert str(error.value) == "An oracle reference trains on an OOD domain (inverted, noisy), but got 'dim'."


RUNGS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("cnn", {"wise": 0.5}),
    "daft": ("cnn", {}),
    "layernorm": ("vit", {"train": "gamma", "rescale": "both", "lam": 0.5}),
    "lora": ("vit", {"targets": "all", "wise": "sweep"}),
    "bitfit": ("vit", {"wise": 0.0}),
    "components": ("vit", {"kinds": "mha"}),
    "lp_ft": ("cnn", {"bn_conversion": True}),
}
"""Strategy → network and hyperparameters with which its evaluation changes most."""


@pytest.mark.parametrize("strategy", RUNGS)
def test_a_rung_leaves_tensors_modules_and_optimiser_bit_for_bit(make_trial: MakeTrial, strategy: str) -> None:
    kind, hparams = RUNGS[strategy]
    plain = make_trial(strategy, kind, task={"epochs": 3}, **hparams)
    tested = make_trial(strategy, kind, task={"epochs": 3, "evaluate_at": (1, 2)}, **hparams)
    for _ in range(2):
        plain.step()
        modules = list(tested.model.named_modules())
        metrics = tested.step()
        assert "test/acc" in metrics
        assert [(name, id(module)) for name, module in tested.model.named_modules()] == [
            (name, id(module)) for name, module in modules
        ]
        expected = plain.state().tensors
        state = tested.state().tensors
        assert state.keys() == expected.keys()
        assert all(bitwise_equal(state[name], expected[name]) for name in expected)
    assert same_numbers([plain.step()], [tested.step()])
    assert same_tensors(plain.model.state_dict(), tested.model.state_dict())
