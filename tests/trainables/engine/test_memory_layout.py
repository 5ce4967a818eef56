"""Channels last: the same training in another memory layout, and the measurement that chooses between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.support.synthetic import write_shapes
from tests.support.trials import MakeTrial, finish, history_of, same_numbers, same_tensors
from trainables import strategies
from trainables.engine import memory_layout
from trainables.engine.memory_layout import LayoutSeconds, measure_layouts
from trainables.engine.trial import Trial
from trainables.specs.trial_spec import DIAGNOSTICS, ModelSpec, SharedTrialSettings
from trainables.storage.checkpoint_format import load_state, save_state

LAST: dict[str, Any] = {"channels_last": True}


def is_last(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def test_weights_and_images_lie_as_the_settings_have_it(make_trial: MakeTrial) -> None:
    for task, expected in (({}, False), ({"channels_last": False}, False), (LAST, True)):
        run = make_trial("full", "cnn", task=task)
        convolutions = [m for m in run.model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
        images = [batch for batch, _ in run.data.batches("val")]
        assert {is_last(tensor) for tensor in (*(m.weight for m in convolutions), *images)} == {expected}
        run.step()
        assert {is_last(m.weight) for m in convolutions} == {expected}


def test_both_layouts_are_the_same_training(make_trial: MakeTrial) -> None:
    last = finish(make_trial("full", "cnn", task=LAST, lr_backbone=0.02))
    plain = finish(make_trial("full", "cnn", lr_backbone=0.02))
    for name in ("train/loss", "val/nll", "test/nll", "ood/noisy/nll"):
        assert last[name] == pytest.approx(plain[name], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_trial_has_the_same_bits(make_trial: MakeTrial, tmp_path: Path, optimizer: str) -> None:
    def make() -> Trial:
        hparams = {"lr_backbone": 0.01, "optimizer": optimizer, "clip_norm": 1.0}
        return make_trial("full", "cnn", task={"epochs": 3, **LAST}, **hparams)

    whole = make()
    history = history_of(whole)
    first = make()
    first.step()
    save_state(tmp_path / "state", first.state())
    resumed = make()
    resumed.load_state(load_state(tmp_path / "state"))
    assert same_numbers(history_of(resumed), history[1:])
    assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("strategy", strategies())
def test_every_strategy_and_diagnostic_works_channels_last(make_trial: MakeTrial, strategy: str) -> None:
    kind = "vit" if strategy in ("components", "layernorm", "lora") else "cnn"
    measure = tuple(name for name in DIAGNOSTICS if kind == "vit" or name != "plasticity")
    task = {"diagnostics": measure, "plasticity_pairs": 4, "evaluate_at": (1,), **LAST}
    run = make_trial(strategy, kind, task=task)
    metrics = finish(run)
    assert 0 <= metrics["test/acc"] <= 1
    assert run.kept_weights(0).tensors.keys() <= run.model.state_dict().keys()


@pytest.fixture
def settings(network: Callable[[str], str], tmp_path: Path) -> Callable[..., SharedTrialSettings]:
    store = write_shapes(tmp_path / "shapes")

    def make(kind: str = "cnn", **fields: Any) -> SharedTrialSettings:
        model = ModelSpec(name=network(kind))
        shared = {"epochs": 2, "batch_size": 16, "cache": str(tmp_path / "cache"), **fields}
        return SharedTrialSettings(store=str(store), model=model, **shared)

    return make


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_any_network_is_measured(settings: Callable[..., SharedTrialSettings], kind: str) -> None:
    measured = measure_layouts(settings(kind, augment=("flip",)))
    assert measured["device"] == "cpu"
    assert measured["channels_last"] in (True, False)
    assert list(measured["seconds"]) == ["contiguous", "channels_last"]
    for seconds in measured["seconds"].values():
        assert seconds.keys() == {"training_step", "evaluation_batch"}
        assert all(value > 0 for value in seconds.values())


def times(contiguous: tuple[float, float], last: tuple[float, float]) -> Callable[[Any], LayoutSeconds]:
    """Seconds of both layouts, in the measurement's place; the second round is a little slower than the others."""
    rounds: dict[bool, Iterator[float]] = {layout: iter((9.0, 1.0, 1.5, 1.2)) for layout in (False, True)}

    def seconds(sample: Any) -> LayoutSeconds:
        layout = bool(sample._data.spec.shared.channels_last)
        factor = next(rounds[layout])
        step, batch = last if layout else contiguous
        return LayoutSeconds(factor * step, factor * batch)

    return seconds


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize(
    ("contiguous", "last", "answer"),
    [
        ((1.0, 1.0), (0.9, 0.9), True),
        ((1.0, 1.0), (1.0, 1.0), False),
        ((1.0, 1.0), (0.98, 0.98), False),  # less than the margin
        ((1.0, 0.1), (1.1, 0.01), False),  # of 8 steps and 5 evaluation batches, the steps decide
        ((0.1, 1.0), (0.15, 0.5), True),
    ],
)
def test_the_layout_that_is_faster_over_a_trial_is_chosen(
    settings: Callable[..., SharedTrialSettings],
    monkeypatch: pytest.MonkeyPatch,
    contiguous: tuple[float, float],
    last: tuple[float, float],
    answer: bool,
) -> None:
    monkeypatch.setattr(memory_layout._Sample, "seconds", times(contiguous, last))
    measured = measure_layouts(settings())
    assert measured == {
        "channels_last": answer,
        "device": "cpu",
        "seconds": {
            "contiguous": {"training_step": contiguous[0], "evaluation_batch": contiguous[1]},
            "channels_last": {"training_step": last[0], "evaluation_batch": last[1]},
        },
    }


def test_a_gpu_is_not_measured(settings: Callable[..., SharedTrialSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_layout, "training_device", lambda: torch.device("cuda"))
    assert measure_layouts(settings()) == {"channels_last": True, "device": "cuda"}
