"""Gradient norms against a loop that keeps every gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.trials import MakeTrial, same_numbers, same_tensors
from trainables.diagnostics.gradients import GradientNorms, moving_kinds
from trainables.engine import trial as run_module
from trainables.engine.contract import ParamGroup, Phase, Strategy, TrainingConfig
from trainables.engine.loop import PhaseSteps, train_unit
from trainables.engine.optim import build_optimizer
from trainables.engine.trial import Trial
from trainables.models.transformer_blocks import COMPONENTS
from trainables.specs.seeds import stream_seed
from trainables.storage.checkpoint_format import load_state, save_state
from trainables.tasks.base import TargetSpec
from trainables.tasks.classification import Classification


class HeadThenAll(Strategy):
    """The head alone on cached features for a unit, then everything."""

    measures: ClassVar[frozenset[str]] = frozenset({"gradients"})

    def phases(self, units: int) -> list[Phase]:
        return [Phase("head", 1, groups=frozenset({"head"})), Phase("all", units - 1)]


@pytest.fixture
def make(make_trial: MakeTrial) -> Callable[..., Trial]:
    """`make("full", diagnostics=("gradients",), hparams={…})`: three units on the tiny networks."""

    def make(strategy: str = "full", kind: str = "vit", hparams: Any = None, **fields: Any) -> Trial:
        return make_trial(strategy, kind, seed=1, task={"epochs": 3, **fields}, **(hparams or {}))

    return make


def norms(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k.removeprefix("grad_norm/"): v for k, v in metrics.items() if k.startswith("grad_norm/")}


def length(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(value) ** 2 for gradient in gradients for value in gradient.flatten()))


def test_they_are_means_over_the_steps_before_clipping(make: Callable[..., Trial]) -> None:
    run = make(diagnostics=("gradients",), hparams={"clip_norm": 1e-3, "lr_backbone": 0.05, "schedule": "constant"})
    model = copy.deepcopy(run.model).train()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    expected: dict[str, list[float]] = {kind: [] for kind in moving_kinds(model, run.data.reference)}
    for images, labels in run.data.batches("train", shuffle_seed=stream_seed(1, "shuffle", 0), drop_last=True):
        sgd.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        for kind, parameters in moving_kinds(model, run.data.reference).items():
            expected[kind].append(length([p.grad for p in parameters if p.grad is not None]))
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        sgd.step()
    assert len(expected["head"]) == 4
    measured = norms(run.step())
    assert measured.keys() == expected.keys() == {*COMPONENTS, "final_norm", "embed", "head"}
    assert measured == pytest.approx({kind: sum(values) / 4 for kind, values in expected.items()}, rel=1e-4)
    assert measured["head"] > 1e-3


def test_only_what_moves_is_measured_and_only_when_asked_for(
    make: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert norms(make().step()) == {}
    monkeypatch.setattr(run_module, "strategy_class", lambda name, task: HeadThenAll)
    run = make()  # the strategy itself asks
    assert norms(run.step()).keys() == {"head"}
    assert norms(run.step()).keys() > {"head", "mha", "ln1"}


def test_injected_parameters_have_the_kind_of_their_layer(make: Callable[..., Trial]) -> None:
    model = make().model
    reference = make().data.reference
    qkv: Any = model.backbone.get_submodule("blocks.0.attn.qkv")
    qkv.adapter = nn.Module()
    qkv.adapter.down = nn.Linear(16, 2, bias=False)
    model.backbone.prompt = nn.Parameter(torch.zeros(1))
    kinds = {kind: {id(p) for p in parameters} for kind, parameters in moving_kinds(model, reference).items()}
    assert id(qkv.adapter.down.weight) in kinds["mha"]
    assert kinds["other"] == {id(model.backbone.prompt)}
    model.requires_grad_(False)
    model.head.bias.requires_grad_(True)
    assert moving_kinds(model, reference) == {"head": [model.head.bias]}


def test_kinds_of_a_convolutional_network(make: Callable[..., Trial]) -> None:
    run = make(kind="cnn", diagnostics=("gradients",))
    assert norms(run.step()).keys() == {"conv", "norm", "head"}


def test_watching_changes_no_number(make: Callable[..., Trial]) -> None:
    plain, watched = make(diagnostics=("distortion",)), make(diagnostics=("distortion", "gradients"))
    for _ in range(3):
        a = plain.step()
        b = watched.step()
        assert same_numbers([a], [{k: v for k, v in b.items() if not k.startswith("grad_norm/")}])
    assert same_tensors(plain.model.state_dict(), watched.model.state_dict())


@pytest.mark.parametrize("units", [1, 2])
def test_a_resumed_trial_reports_the_same(
    make: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, units: int
) -> None:
    monkeypatch.setattr(run_module, "strategy_class", lambda name, task: HeadThenAll)
    whole, first, second = make(), make(), make()
    history = [whole.step() for _ in range(3)]
    start = [first.step() for _ in range(units)]
    save_state(tmp_path / "state", first.state())
    second.load_state(load_state(tmp_path / "state"))
    rest = [second.step() for _ in range(3 - units)]
    assert same_numbers(history, start + rest)
    assert norms(history[-1])


def test_a_parameter_without_gradient_counts_as_zero() -> None:
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    observed = GradientNorms({"one": [a, b], "two": [c], "none": []})
    assert observed.means() == {}
    observed()
    a.grad, c.grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    observed()
    b.grad = torch.tensor([0.0, 12.0])
    observed()
    assert observed.means() == {"grad_norm/one": (0 + 5 + 13) / 3, "grad_norm/two": (0 + 2 + 2) / 3}


def test_nothing_that_moves_is_an_error() -> None:
    with pytest.raises(ValueError) as error:
        GradientNorms({"head": []})
    assert str(error.value) == "Gradient norms need at least one parameter that moves, but got none."


def test_the_device_is_read_once_per_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a value is what makes a host wait for a GPU; steps must not."""
    model = nn.Linear(3, 2)
    observed = GradientNorms({"head": list(model.parameters())})
    functional.cross_entropy(model(torch.ones(4, 3)), torch.tensor([0, 1, 0, 1])).backward()  # type: ignore[no-untyped-call]
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, _name: str = name, _original: Any = original) -> Any:
            reads.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(Tensor, name, read)
    for _ in range(3):
        observed()
    assert reads == []
    observed.means()
    assert reads == ["tolist"]


def test_the_loop_calls_the_observer_once_per_step() -> None:
    class Counter:
        calls = 0

        def __call__(self) -> None:
            self.calls += 1

        def means(self) -> dict[str, float]:
            return {"grad_norm/head": float(self.calls)}

    model = nn.Linear(3, 2)
    config = TrainingConfig()
    optimizer = build_optimizer([ParamGroup("head", list(model.parameters()), 0.1)], config, lambda: 1.0)
    batches = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))] * 5
    task = Classification(TargetSpec(("a", "b")))
    steps = PhaseSteps(
        forward=lambda inputs, targets: model(inputs), optimizer=optimizer, config=config, task=task, total_steps=5
    )
    result = train_unit(steps, batches, 0, observer=Counter())
    assert result.observed == {"grad_norm/head": 5.0}
