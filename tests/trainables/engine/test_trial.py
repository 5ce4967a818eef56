"""One trial without ray, against strategies made here: order, best unit, resume, frozen phases, determinism."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.support.trials import MakeTrial, history_of, same_numbers, same_tensors
from trainables.engine import trial as run_module
from trainables.engine.contract import ParamGroup, Phase, Prepared, Strategy, TrainingConfig, Tuned
from trainables.engine.trial import Trial
from trainables.specs.errors import NonFiniteError
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec
from trainables.storage.checkpoint_format import CheckpointError, load_state, save_state

CALLS: list[str] = []


class Everything(Strategy):
    """Backbone and head at one rate, as full fine-tuning."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        lr_backbone: float = 0.02

    def prepare(self, model: Any, data: Any) -> Prepared:
        CALLS.append("prepare")
        return Prepared({"once/prepared": 1.0})

    def param_groups(self, model: Any, prepared: Any = None) -> list[ParamGroup]:
        CALLS.append("param_groups")
        return super().param_groups(model, prepared)

    def phases(self, units: int) -> list[Phase]:
        CALLS.append("phases")
        return super().phases(units)

    def finalize(self, model: Any, data: Any, prepared: Any = None) -> Tuned:
        CALLS.append("finalize")
        return Tuned({"once/finalized": 1.0})


class HeadThenAll(Everything):
    """The head alone for two units, then everything."""

    def phases(self, units: int) -> list[Phase]:
        return [Phase("head", 2, groups=frozenset({"head"})), Phase("all", units - 2)]


class HeadOnly(Everything):
    def phases(self, units: int) -> list[Phase]:
        return [Phase("head", units, groups=frozenset({"head"}))]


class HeadOnlyOnImages(HeadOnly):
    """The same numbers, but an extra loss forbids the shortcut over cached features."""

    def extra_loss(self, model: Any, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor | None:
        assert images.ndim == 4
        return None


class Solved(Strategy):
    """A closed form: the head's bias becomes the log prior."""

    @dataclass(frozen=True)
    class Config:
        pass

    def param_groups(self, model: Any, prepared: Any = None) -> list[ParamGroup]:
        return [ParamGroup("head", list(model.head.parameters()), 0.0)]

    def phases(self, units: int) -> list[Phase]:
        return [Phase("solve", 1, solve=self.solve)]

    def solve(self, model: Any, data: Any) -> Mapping[str, float]:
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.fill_(-1.0)
        return {"once/solved": 1.0}


class Means(Solved):
    """Another closed form, that looks at the features: the nearest class mean."""

    def solve(self, model: Any, data: Any) -> Mapping[str, float]:
        features, labels = torch.tensor(data.features("train")), torch.tensor(data.labels("train"))
        means = torch.stack([features[labels == k].mean(0) for k in range(data.num_classes)])
        with torch.no_grad():
            model.head.weight.copy_(means)
            model.head.bias.copy_(-0.5 * means.square().sum(1))
        return {}


class Doubling(Everything):
    """`finalize` changes the weights: evaluating early must not let that reach training."""

    def finalize(self, model: Any, data: Any, prepared: Any = None) -> Tuned:
        with torch.no_grad():
            model.head.weight.mul_(2.0)
        return Tuned()


class Dropping(Everything):
    """Dropout before the head."""

    def prepare(self, model: Any, data: Any) -> Prepared:
        model.head.register_forward_pre_hook(lambda head, inputs: functional.dropout(inputs[0], 0.5, head.training))
        return Prepared()


_ALL = (Everything, HeadThenAll, HeadOnly, HeadOnlyOnImages, Solved, Means, Doubling, Dropping)
STRATEGIES: dict[str, type[Strategy]] = {c.__name__: c for c in _ALL}


@pytest.fixture(autouse=True)
def _strategies(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(run_module, "strategy_class", lambda name, task: STRATEGIES[name])
    CALLS.clear()


@pytest.fixture
def make(make_trial: MakeTrial) -> Callable[..., Trial]:
    """`make("Everything", kind="cnn", seed=1, hparams={…}, epochs=2, …)`: a run of a strategy above."""

    def make(strategy: str, kind: str = "cnn", seed: int = 0, hparams: Any = None, **fields: Any) -> Trial:
        held_out = fields.pop("held_out", None)
        settings = {"epochs": 3, **fields}
        return make_trial(strategy, kind, seed=seed, held_out=held_out, task=settings, **(hparams or {}))

    return make


def test_the_hooks_are_called_in_the_order_of_the_contract(make: Callable[..., Trial]) -> None:
    history = history_of(make("Everything"))
    assert CALLS[:2] == ["prepare", "phases"]
    assert set(CALLS[2:-1]) == {"param_groups"}
    assert CALLS[-1] == "finalize"
    assert [("test/acc" in unit, unit["finished"]) for unit in history] == [
        (False, False),
        (False, False),
        (True, True),
    ]
    assert history[0]["once/prepared"] == history[-1]["once/prepared"] == history[-1]["once/finalized"] == 1.0


def test_training_equals_a_loop_written_by_hand(make: Callable[..., Trial]) -> None:
    run = make("Everything", hparams={"lr_head": 0.5, "weight_decay": 0.01}, epochs=2)
    model = copy.deepcopy(run.model)
    data = run.data
    scale = float((torch.tensor(data.features("train")) ** 2).sum(1).mean())
    sgd = torch.optim.SGD(
        [{"params": model.backbone.parameters(), "lr": 0.02}, {"params": model.head.parameters(), "lr": 0.5 / scale}],
        momentum=0.9,
        weight_decay=0.01,
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=8)
    states = []
    for epoch in range(2):
        model.train()
        for images, labels in data.batches("train", shuffle_seed=stream_seed(0, "shuffle", epoch), drop_last=True):
            sgd.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            sgd.step()
            cosine.step()
        images, labels = next(data.batches("val"))
        with torch.no_grad():
            nll = float(functional.cross_entropy(model.eval()(images), labels))
        assert run.step()["val/nll"] == pytest.approx(nll, rel=1e-4)
        states.append(copy.deepcopy(model.state_dict()))
    kept = states[run.best.unit - 1]
    for name, value in run.model.state_dict().items():
        assert torch.allclose(value.float(), kept[name].float(), rtol=1e-4, atol=1e-6), name


def test_steps_per_unit_splits_epochs_without_changing_the_training(make: Callable[..., Trial]) -> None:
    whole, split = make("Everything", epochs=3), make("Everything", epochs=4, steps_per_unit=3)
    history_of(whole)
    history_of(split)
    assert whole.best.unit == 3
    assert split.best.unit == 4
    assert same_tensors(whole.model.state_dict(), split.model.state_dict())


def test_the_best_unit_is_put_back_before_the_test(make: Callable[..., Trial]) -> None:
    run = make("Everything", hparams={"lr_backbone": 0.3, "schedule": "constant"}, epochs=6)
    states, history = [], []
    while not run.finished:
        kept = None
        history.append(run.step())
        kept = copy.deepcopy(run.best)
        states.append(kept)
    accuracies = [(u["val/acc"], -u["val/nll"], -u["unit"]) for u in history]
    best = 1 + accuracies.index(max(accuracies))
    assert best < 6, "the problem must be one where the last unit is not the best"
    assert history[-1]["best/epoch"] == best
    assert history[-1]["best/val/acc"] == history[best - 1]["val/acc"]
    final = run.model.state_dict()
    assert all(torch.equal(final[name], value) for name, value in states[best - 1].tensors.items())


def test_an_early_evaluation_does_not_disturb_training(make: Callable[..., Trial]) -> None:
    plain, watched = make("Doubling"), make("Doubling", evaluate_at=(1, 2))
    a, b = history_of(plain), history_of(watched)
    assert [("test/acc" in unit) for unit in b] == [True, True, True]
    assert all(a[i][k] == b[i][k] for i in range(3) for k in ("train/loss", "val/nll"))
    assert same_tensors(plain.model.state_dict(), watched.model.state_dict())
    assert a[-1]["test/nll"] == b[-1]["test/nll"]


def test_an_early_evaluation_of_one_domain_scores_that_domain_alone(make: Callable[..., Trial]) -> None:
    """A mean and a worst over the domains are those of all of them."""
    every = history_of(make("Doubling", evaluate_at=(1, 2)))
    one = history_of(make("Doubling", evaluate_at=(1, 2), interim_splits=("ood/noisy",)))
    for unit in (0, 1):
        tested = {name: value for name, value in one[unit].items() if name.startswith(("test/", "ood/"))}
        assert "ood/noisy/acc" in tested
        assert tested == {name: value for name, value in every[unit].items() if name.startswith("ood/noisy/")}
        assert one[unit]["best/val/acc"] == every[unit]["best/val/acc"]
    assert {"test/acc", "ood/mean/acc", "ood/worst/acc"} <= one[2].keys()
    assert same_numbers(one[2:], every[2:])


@pytest.mark.parametrize("strategy", ["Everything", "HeadThenAll", "HeadOnly", "Doubling"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_continues_bit_for_bit(
    make: Callable[..., Trial], tmp_path: Path, strategy: str, optimizer: str
) -> None:
    fields: dict[str, Any] = {"epochs": 4, "augment": ("flip",), "hparams": {"optimizer": optimizer}}
    whole = make(strategy, **fields)
    history = history_of(whole)
    for units in (1, 2, 3):
        first = make(strategy, **fields)
        start = [first.step() for _ in range(units)]
        save_state(tmp_path / str(units), first.state())
        second = make(strategy, **fields)
        second.load_state(load_state(tmp_path / str(units)))
        assert same_numbers(history, start + history_of(second))
        assert same_tensors(whole.model.state_dict(), second.model.state_dict())


def test_a_finished_run_is_restored_as_finished(make: Callable[..., Trial]) -> None:
    run = make("Doubling")
    history_of(run)
    again = make("Doubling")
    again.load_state(run.state())
    assert again.finished
    assert same_tensors(run.model.state_dict(), again.model.state_dict())
    with pytest.raises(RuntimeError, match="finished after unit 3; it has no further step"):
        again.step()


def test_a_checkpoint_of_a_head_holds_no_backbone(make: Callable[..., Trial]) -> None:
    run = make("HeadOnly", kind="vit")
    run.step()
    names = run.state().tensors.keys()
    assert {n for n in names if n.startswith("model/")} == {"model/head.weight", "model/head.bias"}


def test_s10_a_checkpoint_of_another_trial_is_refused_with_every_difference(make: Callable[..., Trial]) -> None:
    run = make("Everything")
    run.step()
    with pytest.raises(CheckpointError) as error:
        make("Everything", seed=1).load_state(run.state())
    assert str(error.value) == (
        "A checkpoint continues its own trial only, but this one is of another: seed: 0 in the checkpoint, 1 here."
    )
    other = make("Everything", kind="vit")
    other.load_state(run.state())
    with pytest.raises(CheckpointError) as error:
        other.step()
    message = str(error.value)
    here = make("Everything", kind="vit").data.backbone.digest
    assert f"weights: '{run.data.backbone.digest}' in the checkpoint, '{here}' here" in message
    assert "tensors do not fit: backbone." in message
    assert "backbone.conv1.1.running_var is float32[8] in the checkpoint, missing here" in message


def test_s10_a_head_of_another_number_of_classes_does_not_fit(make: Callable[..., Trial]) -> None:
    run = make("HeadOnly")
    run.step()
    state = run.state()
    state.tensors["model/head.bias"] = torch.zeros(1)  # a copy in place would broadcast it silently
    other = make("HeadOnly")
    other.load_state(state)
    with pytest.raises(CheckpointError, match=r"head\.bias is float32\[1\] in the checkpoint, float32\[4\] here"):
        other.step()


def test_a_frozen_backbone_gets_no_gradient_and_stays_in_eval_mode(make: Callable[..., Trial]) -> None:
    run = make("HeadOnlyOnImages")
    before = {k: v.clone() for k, v in run.model.backbone.state_dict().items()}
    history_of(run)
    assert same_tensors(before, run.model.backbone.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in run.model.backbone.parameters())


def test_cached_features_give_the_head_what_images_give_it(make: Callable[..., Trial]) -> None:
    cached, plain = history_of(make("HeadOnly")), history_of(make("HeadOnlyOnImages"))
    for a, b in zip(cached, plain, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
        assert a["val/nll"] == pytest.approx(b["val/nll"], rel=1e-4)


def test_bn_mode_eval_keeps_the_statistics(make: Callable[..., Trial]) -> None:
    for mode, kept in (("eval", True), ("train", False)):
        run = make("Everything", hparams={"bn_mode": mode})
        buffers = {k: v.clone() for k, v in run.model.named_buffers()}
        history_of(run)
        after = dict(run.model.named_buffers())
        assert all(torch.equal(after[k], v) for k, v in buffers.items() if "running" in k) is kept


def test_a_closed_form_takes_one_unit_and_reports_training_scores(make: Callable[..., Trial]) -> None:
    (unit,) = history_of(make("Solved", epochs=5))
    assert unit["train/loss"] == pytest.approx(float(torch.tensor(4.0).log()))
    assert (unit["train/acc"], unit["lr/head"], unit["once/solved"]) == (0.25, 0.0, 1.0)
    assert unit["cost/trainable_parameters"] == 4 * 16 + 4


def test_scores_from_cached_features_are_those_of_the_images(make: Callable[..., Trial]) -> None:
    run = make("Means", kind="vit")
    (unit,) = history_of(run)
    right = total = 0
    loss = 0.0
    for images, labels in run.data.batches("ood/noisy"):
        with torch.no_grad():
            logits = run.model.eval()(images)
        right, total = right + int((logits.argmax(1) == labels).sum()), total + len(labels)
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
    assert unit["ood/noisy/acc"] == right / total
    assert unit["ood/noisy/nll"] == pytest.approx(loss / total, rel=1e-5)
    accuracies = [unit[f"ood/{domain}/acc"] for domain in ("inverted", "noisy")]
    assert (unit["ood/mean/acc"], unit["ood/worst/acc"]) == (sum(accuracies) / 2, min(accuracies))


def test_a_trial_that_diverges_raises(make: Callable[..., Trial]) -> None:
    run = make("Everything", hparams={"lr_backbone": 1e30})
    with pytest.raises(NonFiniteError, match="loss must be finite, but it was"):
        history_of(run)


def test_runs_side_by_side_do_not_touch_each_other(make: Callable[..., Trial]) -> None:
    alone = [history_of(make("Everything", seed=s, kind=k)) for s, k in ((0, "cnn"), (1, "cnn"), (0, "vit"))]
    runs = [make("Everything", seed=s, kind=k) for s, k in ((0, "cnn"), (1, "cnn"), (0, "vit"))]
    together: list[list[dict[str, Any]]] = [[], [], []]
    for _ in range(3):
        for history, run in zip(together, runs, strict=True):
            history.append(run.step())
    assert all(same_numbers(a, b) for a, b in zip(alone, together, strict=True))
    assert not same_numbers(alone[0], alone[1])


def test_dropout_is_drawn_from_the_trial_alone(make: Callable[..., Trial]) -> None:
    def history(noise: int) -> list[dict[str, Any]]:
        run = make("Dropping")
        units = []
        while not run.finished:
            torch.manual_seed(noise)
            units.append(run.step())
        return units

    assert same_numbers(history(1), history(2))


def test_a_plan_beyond_the_budget_is_an_error(make: Callable[..., Trial]) -> None:
    with pytest.raises(ValueError) as error:
        make("HeadThenAll", epochs=1).step()
    assert str(error.value).endswith(
        "must take between 1 and 1 units, but they take 1 (head: 2, all: -1). Give the trial more epochs."
    )


def test_a_held_out_domain_is_judged_and_not_trained_on(make: Callable[..., Trial]) -> None:
    run = make("Everything", held_out="dim")
    history = history_of(run)
    assert run.data.train_size == 32
    assert run.data.size("held_out") == 48
    assert "held_out/acc" in history[-1]
    assert "held_out/acc" not in history_of(make("Everything"))[-1]


def test_hyperparameters_are_checked_before_anything_is_loaded(network: Callable[[str], str]) -> None:
    task = SharedTrialSettings(store="/nowhere", model=ModelSpec(name="no_such_model"))
    with pytest.raises(ValueError, match="lr_backbone must be positive, but got -1"):
        Trial(TrialSpec(shared=task, strategy="Everything", hparams={"lr_backbone": -1}))
    assert dataclasses.is_dataclass(Trial(TrialSpec(shared=task, strategy="Everything")).strategy.config)
