"""WiSE-FT: end points bit for bit, the sweep by hand, with every kind of strategy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.trials import MakeTrial, copies, finish, same_numbers, same_tensors
from trainables.engine.best_weights import put_back
from trainables.engine.evaluation import final_scores, validation_scores
from trainables.engine.trial import Trial
from trainables.engine.weight_interpolation import ALPHA_GRID, interpolate
from trainables.storage.checkpoint_format import bitwise_equal, load_state, save_state

CASES = [("lp_ft", "vit"), ("daft", "cnn"), ("full", "cnn"), ("layernorm", "vit"), ("lora", "vit"), ("bitfit", "vit")]


@pytest.fixture
def trial(make_trial: MakeTrial) -> Callable[..., Trial]:
    return partial(make_trial, lr_backbone=0.02)


def start_of(run: Trial) -> dict[str, Tensor]:
    """Tensors when training starts; a network with adapters starts from the pretrained one."""
    state = copies(run.model)
    plain = {f"backbone.{name}": value for name, value in run.data.reference.state_dict().items()}
    names = {name: name for name in state if name in plain or name.startswith("head.")}
    return {**plain, **{name: state[name] for name in names}}


@pytest.mark.parametrize(("strategy", "kind"), CASES)
def test_alpha_1_is_the_tuned_network_and_alpha_0_the_start(
    trial: Callable[..., Trial], strategy: str, kind: str
) -> None:
    plain = trial(strategy, kind)
    tuned = finish(plain)
    whole = trial(strategy, kind, wise=1.0)
    assert finish(whole)["wise/alpha"] == 1.0
    assert same_tensors(whole.model.state_dict(), plain.model.state_dict())
    none = trial(strategy, kind, wise=0.0)
    start = start_of(none)
    metrics = finish(none)
    floating = {name: v for name, v in none.model.state_dict().items() if v.is_floating_point()}
    assert same_tensors(floating, {name: start[name] for name in floating})
    assert tuned["best/val/acc"] != metrics["best/val/acc"] or strategy == "lp_ft"


@pytest.mark.parametrize(("strategy", "kind"), [("lp_ft", "vit"), ("daft", "cnn"), ("lora", "vit")])
def test_the_sweep_is_that_of_networks_made_by_hand(trial: Callable[..., Trial], strategy: str, kind: str) -> None:
    run = trial(strategy, kind, wise="sweep")
    start = start_of(run)
    metrics = finish(run)
    columns = metrics["curves"]["wise"]["columns"]
    assert columns["alpha"] == list(ALPHA_GRID)
    by_hand = trial(strategy, kind)
    finish(by_hand)
    tuned = copies(by_hand.model)
    for i, alpha in enumerate(ALPHA_GRID):
        put_back(by_hand.model, tuned)
        with torch.no_grad():
            for name, value in by_hand.model.state_dict().items():
                if value.is_floating_point():
                    value.copy_(start[name] * (1 - alpha) + alpha * tuned[name])
        scores = {**validation_scores(by_hand.model, run.data), **final_scores(by_hand.model, run.data)}
        assert scores == {name: pytest.approx(columns[name][i], abs=1e-5) for name in scores}
    ranked = sorted(
        zip(columns["val/acc"], columns["val/nll"], columns["alpha"], strict=True),
        key=lambda row: (-row[0], row[1], -row[2]),
    )
    assert metrics["wise/alpha"] == ranked[0][2]
    assert metrics["best/val/acc"] == ranked[0][0]
    assert metrics["test/acc"] == columns["test/acc"][ALPHA_GRID.index(ranked[0][2])]


@pytest.mark.parametrize(("strategy", "kind"), [("daft", "cnn"), ("lora", "vit")])
def test_a_resumed_trial_restores_its_start(
    trial: Callable[..., Trial], tmp_path: Path, strategy: str, kind: str
) -> None:
    whole = trial(strategy, kind, wise="sweep")
    history = [whole.step(), whole.step()]
    first = trial(strategy, kind, wise="sweep")
    first.step()
    save_state(tmp_path / "checkpoint", first.state())
    second = trial(strategy, kind, wise="sweep")
    second.load_state(load_state(tmp_path / "checkpoint"))
    assert same_numbers(history[1:], [second.step()])
    assert same_tensors(whole.model.state_dict(), second.model.state_dict())


def test_the_ends_are_copies_of_the_bits_whatever_stands_at_the_other_end() -> None:
    model = nn.BatchNorm1d(2)
    start, tuned = copies(model), copies(model)
    start["running_mean"][:] = torch.tensor([-0.0, 1e38])
    tuned["running_mean"][:] = torch.tensor([1.0, -3e38])
    for alpha, end in ((0.0, start), (1.0, tuned)):
        interpolate(model, start, tuned, alpha)
        assert all(bitwise_equal(value, end[name]) for name, value in model.state_dict().items())


def test_counters_keep_their_tuned_value() -> None:
    model = nn.BatchNorm1d(2)
    start, tuned = copies(model), copies(model)
    tuned["num_batches_tracked"] += 7
    tuned["running_mean"] += 2.0
    interpolate(model, start, tuned, 0.5)
    assert model.num_batches_tracked is not None
    assert int(model.num_batches_tracked) == 7
    assert model.running_mean is not None
    assert model.running_mean.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [1.5, -0.1, "best", True])
def test_impossible_values(trial: Callable[..., Trial], value: Any) -> None:
    with pytest.raises(ValueError) as error:
        trial("full", "vit", wise=value)
    assert str(error.value) == f"wise must be 'sweep', a number from 0 to 1, or nothing, but got {value!r}."
