"""Tasks unlike classification go through every part of a trial."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.toy_tasks import TOY_TASKS, DigitNames, InkMasks, digits
from tests.support.trials import MakeTrial, history_of, same_numbers, same_tensors
from trainables.engine.trial import Trial
from trainables.specs.metrics import task_metrics
from trainables.storage.checkpoint_format import load_state, save_state
from trainables.tasks.registry import register

STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {"lr_backbone": 0.02, "lr_head": 1.0},
    "daft": {"lr_head": 0.5},
    "layernorm": {"lam_choice": "sweep", "lr_head": 1.0},
    "lora": {"wise": 0.5},
    "bitfit": {},
    "components": {"kinds": "fc1", "wise": "sweep"},
    "lp_ft": {"head_init": "random"},
}
"""All that train by gradient, each with something that only it does."""
CASES = [(task, strategy, "cnn" if strategy == "daft" else "vit") for task in TOY_TASKS for strategy in STRATEGIES]


@pytest.fixture
def trial(make_trial: MakeTrial) -> Callable[..., Trial]:
    """`trial(InkMasks, "full", kind="vit", **settings)`: two units on small digits, tested after each."""
    for task in TOY_TASKS:
        register(task)

    def make(task: Any, strategy: str, kind: str = "vit", hparams: Any = None, **settings: Any) -> Trial:
        shared = {"task": task.name(), "evaluate_at": (1,), **settings}
        given = STRATEGIES.get(strategy, {}) if hparams is None else hparams
        return make_trial(strategy, kind, store=digits(), task=shared, **given)

    return make


@pytest.mark.parametrize(("task", "strategy", "kind"), CASES)
def test_a_trial_records_the_metrics_of_its_task_and_no_other(
    trial: Callable[..., Trial], task: Any, strategy: str, kind: str
) -> None:
    history = history_of(trial(task, strategy, kind))
    table = task_metrics(task.name())
    last = history[-1]
    for metric in table.reported:
        assert {metric.on("test"), metric.on("ood/inverted")} <= last.keys()
    assert {table.validation, table.best_validation, table.ood_mean, table.ood_worst} <= last.keys()
    assert {metric.on("train") for metric in table.training} | {"train/loss"} <= last.keys()
    foreign = {name for name in last if name.rpartition("/")[2] in ("acc", "nll", "ece") or "val_acc" in name}
    assert foreign == set()
    values = [unit[table.validation] for unit in history]
    best = max(values, key=table.selection.score)
    assert values[int(last["best/epoch"]) - 1] == best


@pytest.mark.parametrize(("task", "strategy", "kind"), CASES)
def test_p28_a_trial_cut_off_in_the_middle_of_a_unit_continues_bit_for_bit(
    trial: Callable[..., Trial], tmp_path: Path, task: Any, strategy: str, kind: str
) -> None:
    whole = trial(task, strategy, kind, augment=("flip",))
    expected = history_of(whole)
    first = trial(task, strategy, kind, augment=("flip",))
    steps = 0

    def save() -> None:
        nonlocal steps
        steps += 1
        if steps == 6:  # of four steps a unit: the second one of the second unit
            save_state(tmp_path / "state", first.state())

    first.after_step = save
    history_of(first)
    again = trial(task, strategy, kind, augment=("flip",))
    again.load_state(load_state(tmp_path / "state"))
    assert same_numbers(expected[1:], history_of(again))
    assert same_tensors(whole.model.state_dict(), again.model.state_dict())


LEARNING = {"optimizer": "adamw", "lr_backbone": 1e-2, "schedule": "constant"}


def test_masks_are_learned(trial: Callable[..., Trial]) -> None:
    history = history_of(trial(InkMasks, "full", hparams=LEARNING, epochs=8))
    assert history[-1]["val/bce"] < 0.8 * history[0]["val/bce"]
    assert history[-1]["best/val/iou"] > 0.4


def test_names_are_spelled(trial: Callable[..., Trial]) -> None:
    """A name that is spelled right after right letters need not be generated right: both figures are apart."""
    history = history_of(trial(DigitNames, "full", hparams=LEARNING, epochs=10))
    assert history[0]["val/exact"] == 0
    assert history[-1]["best/val/exact"] > 0.4
    assert history[-1]["train/wrong"] < history[-1]["val/wrong"] < history[0]["val/wrong"]


def test_image_and_mask_are_flipped_together(trial: Callable[..., Trial]) -> None:
    data = trial(InkMasks, "full", augment=("flip",)).data
    (plain, mask), (flipped, flipped_mask) = (
        next(data.batches("train", batch_size=8, augment_seed=seed)) for seed in (None, 3)
    )
    turned = [i for i in range(8) if not torch.equal(plain[i], flipped[i])]
    assert turned
    for i in turned:
        assert torch.equal(plain[i].flip(2), flipped[i])
        assert torch.equal(mask[i].flip(1), flipped_mask[i])


def test_a_head_on_pooled_features_trains_on_the_cached_ones_and_spells_the_same(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LayerNorm tuning in cycles trains the head alone first."""
    hparams = {"cycles": 1, "lr_head": 1.0}
    cached = history_of(trial(DigitNames, "layernorm", hparams=hparams))
    monkeypatch.setattr("trainables.engine.phase_trainer.is_pristine", lambda module, reference: False)
    monkeypatch.setattr("trainables.engine.evaluation.is_pristine", lambda module, reference: False)
    computed = history_of(trial(DigitNames, "layernorm", hparams=hparams))
    assert cached[-1]["val/exact"] == computed[-1]["val/exact"]
    assert cached[0]["train/loss"] == pytest.approx(computed[0]["train/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "hparams", "asked"),
    [("linear_probe", {}, "linear_probe"), ("lp_ft", {}, "head_init='linear_probe'")],
)
@pytest.mark.parametrize("task", TOY_TASKS)
def test_a_closed_form_is_refused_before_anything_is_loaded(
    trial: Callable[..., Trial], task: Any, strategy: str, hparams: Any, asked: str
) -> None:
    with pytest.raises(ValueError) as error:
        trial(task, strategy, hparams=hparams)
    assert str(error.value) == (
        f"{asked} solves the head in closed form, which needs a task with a closed-form probe, but {task.name()!r} has "
        "none. Train the head by gradient instead."
    )


def test_label_smoothing_is_refused_where_the_loss_does_not_know_it(trial: Callable[..., Trial]) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing needs .* 'ink_masks' does not, and got 0\.1"):
        trial(InkMasks, "full", hparams={"label_smoothing": 0.1})


def test_distortion_of_dense_features_is_left_out_with_a_sentence(
    trial: Callable[..., Trial], caplog: pytest.LogCaptureFixture
) -> None:
    last = history_of(trial(InkMasks, "full"))[-1]
    assert not any(name.startswith("distortion/") for name in last)
    assert "change/total" in last
    assert "Feature distortion is left out: it compares pooled features, and task 'ink_masks' has none" in caplog.text


def test_another_task_of_the_same_name_is_refused() -> None:
    register(InkMasks)
    register(InkMasks)

    class Other(InkMasks):
        pass

    with pytest.raises(ValueError, match="A task's name is unique, but 'ink_masks' is registered as another class"):
        register(Other)
