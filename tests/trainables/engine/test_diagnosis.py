"""Which diagnostics a trial takes, and that taking them changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from benchmarks.support.synthetic import MemoryStore, shapes
from tests.support.trials import MakeTrial, history_of, same_numbers, same_tensors
from trainables.diagnostics.cka import block_cka
from trainables.diagnostics.plasticity import plasticity_after
from trainables.engine import trial as run_module
from trainables.engine.trial import Trial
from trainables.full import Full
from trainables.storage.checkpoint_format import load_state, save_state

OWN = ("distortion/", "change/", "cka/", "grad_norm/")
CURVES = {"distortion": ("distortion", "change", "change_by_stage"), "cka": ("cka",)}


class Curious(Full):
    """Full fine-tuning that always wants CKA."""

    measures: ClassVar[frozenset[str]] = frozenset({"cka"})


@pytest.fixture
def make(make_trial: MakeTrial) -> Callable[..., Trial]:
    """`make("full", "cnn", diagnostics=(…))`: two units on the tiny networks."""

    def make(strategy: str = "full", kind: str = "vit", store: MemoryStore | None = None, **fields: Any) -> Trial:
        return make_trial(strategy, kind, seed=1, store=store, task=fields)

    return make


def measured(unit: dict[str, Any]) -> set[str]:
    """First segments of the names of diagnostics among a unit's metrics."""
    return {name.partition("/")[0] for name in unit if name.startswith(OWN)}


def scores_of(unit: dict[str, Any]) -> dict[str, Any]:
    """The unit's metrics without diagnostics and curves."""
    return {name: value for name, value in unit.items() if not name.startswith(OWN) and name != "curves"}


def test_only_what_the_task_names_is_measured_and_only_at_the_end(make: Callable[..., Trial]) -> None:
    for names, groups in (
        ((), set()),
        (("distortion",), {"distortion", "change"}),
        (("cka",), {"cka"}),
        (("distortion", "cka"), {"distortion", "change", "cka"}),
    ):
        first, last = history_of(make(diagnostics=names))
        assert measured(first) == set()
        assert measured(last) == groups
        drawn = {curve for name in names for curve in CURVES[name]}
        assert set(last["curves"]) == drawn | {"confusion", "per_class"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_d17_test_sets_of_a_few_images_cost_no_trial(
    make: Callable[..., Trial], count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder with three images per class gives two classes a test split of two images."""
    store = shapes()
    for split in ("val", "test", "ood/inverted", "ood/noisy"):
        store.pixels[split] = store.pixels[split][:count]
        store.targets[split] = store.targets[split][:count]
        store.sources[split] = store.sources[split][:count]
    last = history_of(make(store=store, diagnostics=("shift", "distortion", "cka")))[-1]
    assert measured(last) == {"distortion", "change"}
    assert math.isfinite(last["test/acc"])
    assert f"CKA is left out: it needs at least 4 images, but the ID test has {count}" in caplog.text


def test_a_strategy_may_measure_more(make: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "strategy_class", lambda name, task: Curious)
    assert measured(history_of(make(diagnostics=()))[-1]) == {"cka"}
    assert measured(history_of(make(diagnostics=("distortion",)))[-1]) == {"distortion", "change", "cka"}


@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_measuring_changes_no_score_and_no_weight(make: Callable[..., Trial], kind: str) -> None:
    plain, watched = make(kind=kind, diagnostics=()), make(kind=kind, diagnostics=("distortion", "cka", "gradients"))
    a, b = history_of(plain), history_of(watched)
    plain_scores, watched_scores = ([scores_of(unit) for unit in history] for history in (a, b))
    assert same_numbers(plain_scores, watched_scores)
    assert same_tensors(plain.model.state_dict(), watched.model.state_dict())


def test_a_rung_before_the_last_measures_nothing(make: Callable[..., Trial]) -> None:
    history = history_of(make(diagnostics=("distortion", "cka"), evaluate_at=(1,)))
    assert "test/acc" in history[0]
    assert measured(history[0]) == set()


def test_cka_compares_the_final_network_with_the_pretrained_one(make: Callable[..., Trial]) -> None:
    run = make(diagnostics=("cka",), kind="cnn")
    last = history_of(run)[-1]
    curve = last["curves"]["cka"]["columns"]
    images, _ = next(run.data.batches("test", batch_size=32))
    expected = block_cka(run.data.reference, copy.deepcopy(run.model.backbone).eval(), [images])
    assert dict(zip(curve["block"], curve["cka"], strict=True)) == pytest.approx(expected, rel=1e-3)
    assert last["cka/mean"] == pytest.approx(sum(curve["cka"]) / len(curve["cka"]))
    assert last["cka/mean"] < 0.999
    assert make("linear_probe", diagnostics=("cka",)).step()["cka/mean"] == 1.0


def test_plasticity_after_tuning_is_that_of_the_final_network(
    make: Callable[..., Trial], caplog: pytest.LogCaptureFixture
) -> None:
    run = make(diagnostics=("plasticity",))
    last = history_of(run)[-1]
    expected = plasticity_after(run.model, run.data)
    assert {k: v for k, v in last.items() if k.startswith("plasticity/")} == expected.metrics()
    assert last["curves"]["plasticity"] == expected.curve().to_dict()
    assert expected.mean != plasticity_after(run.data.reference, run.data).mean
    assert caplog.messages == []
    assert "test/acc" in history_of(make(kind="cnn", diagnostics=("plasticity",)))[-1]
    (message,) = caplog.messages
    assert message.startswith("Plasticity after tuning is left out: The components ln1, mha, ln2, fc1 and fc2 need")


def test_a_resumed_trial_measures_the_same(make: Callable[..., Trial], tmp_path: Path) -> None:
    fields = {"strategy": "daft", "kind": "cnn", "diagnostics": ("distortion", "cka")}
    whole, first, second = (make(**fields) for _ in range(3))
    history = history_of(whole)
    start = first.step()
    save_state(tmp_path / "state", first.state())
    second.load_state(load_state(tmp_path / "state"))
    torch.manual_seed(5)
    assert same_numbers(history, [start, *history_of(second)])


def test_components_report_their_gradient_norms_without_being_asked(make: Callable[..., Trial]) -> None:
    first = make("components", diagnostics=()).step()
    assert {name for name in first if name.startswith("grad_norm/")} > {"grad_norm/final_norm", "grad_norm/head"}


def test_plasticity_that_cannot_be_measured_costs_no_trial(
    make: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(model: object, data: object) -> None:
        raise ValueError("Its windows are filled up.")

    monkeypatch.setattr("trainables.engine.diagnosis.plasticity_after", refused)
    assert "test/acc" in history_of(make(diagnostics=("plasticity",)))[-1]
    assert "Plasticity after tuning is left out: Its windows are filled up." in caplog.text
