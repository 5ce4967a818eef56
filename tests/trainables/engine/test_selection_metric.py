"""Trials that select by another metric, with another loss or other batches; and all that a trial reports at its end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.support.imbalanced import imbalanced
from tests.support.trials import MakeTrial, finish, history_of, same_numbers, same_tensors
from trainables.engine.evaluation import final_scores, score
from trainables.engine.trial import Trial
from trainables.specs.metrics import CLASSIFICATION, TEST, VAL, id_domain, ood
from trainables.specs.trial_spec import LossSettings
from trainables.tasks.classification_metrics import classification_metrics, fitted_temperature

RATES = {"lr_backbone": 0.02, "lr_head": 1.0}
METRICS = [metric.key for metric in CLASSIFICATION.selectable]
BALANCED = LossSettings(class_weights="balanced")


def predictions(run: Trial, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the finished network, batch by batch."""
    run.model.eval()
    with torch.no_grad():
        rows = [(run.model(images), labels) for images, labels in run.data.batches(split)]
    return torch.cat([logits for logits, _ in rows]), torch.cat([labels for _, labels in rows])


@pytest.fixture(scope="module")
def strategy_of() -> dict[str, dict[str, Any]]:
    return {"linear_probe": {}, "full": RATES, "layernorm": {"lam_choice": "sweep", **RATES}}


class TestWhatATrialReportsAtItsEnd:
    @pytest.fixture
    def finished(self, make_trial: MakeTrial) -> tuple[Trial, dict[str, Any]]:
        run = make_trial("full", task={"evaluate_at": (1,)}, **RATES)
        first = run.step()
        assert "test/acc" in first
        assert "test/balanced_acc" not in first
        return run, run.step()

    def test_every_metric_of_the_table_on_test_and_every_domain(self, finished: tuple[Trial, dict[str, Any]]) -> None:
        run, last = finished
        temperature = fitted_temperature(*predictions(run, VAL))
        assert last["calib/temperature"] == pytest.approx(temperature, rel=1e-4)
        metrics = [m for m in (*CLASSIFICATION.reported, *CLASSIFICATION.final) if m.key != "top5"]
        keys = [metric.key for metric in metrics]
        for split in (TEST, ood("inverted"), ood("noisy")):
            expected = classification_metrics(*predictions(run, split), keys, temperature)
            for metric in metrics:
                assert last[metric.on(split)] == pytest.approx(expected[metric.key], rel=1e-4, abs=1e-5)
        assert not any(name.endswith("top5") for name in last)

    def test_every_id_domain_by_itself(self, finished: tuple[Trial, dict[str, Any]]) -> None:
        run, last = finished
        logits, labels = predictions(run, TEST)
        domains = torch.from_numpy(run.data.domain_ids(TEST).copy())
        for number, domain in enumerate(("bright", "dim")):
            rows = domains == number
            expected = classification_metrics(logits[rows], labels[rows], ["acc", "balanced_acc", "auroc"])
            for key, value in expected.items():
                assert last[f"{id_domain(domain)}/{key}"] == pytest.approx(value, rel=1e-5)
        assert last["test/acc"] == pytest.approx((last["id/bright/acc"] + last["id/dim/acc"]) / 2)

    def test_the_tables_count_every_image_once(self, finished: tuple[Trial, dict[str, Any]]) -> None:
        _, last = finished
        confusion = last["curves"]["confusion"]["columns"]
        images = dict.fromkeys((TEST, "ood/inverted", "ood/noisy"), 0.0)
        right = dict.fromkeys(images, 0.0)
        for label, split, prediction, count in zip(*confusion.values(), strict=True):
            images[split] += count
            right[split] += count * (label == prediction)
        assert images == {TEST: 32, "ood/inverted": 32, "ood/noisy": 32}
        assert right[TEST] / 32 == pytest.approx(last["test/acc"])
        per_class = last["curves"]["per_class"]["columns"]
        recalls = [r for r, split in zip(per_class["recall"], per_class["split"], strict=True) if split == TEST]
        assert sum(recalls) / 4 == pytest.approx(last["test/balanced_acc"])

    def test_one_id_domain_has_no_entry_of_its_own(self, make_trial: MakeTrial) -> None:
        last = finish(make_trial("linear_probe", store=imbalanced()))
        assert not any(name.startswith("id/") for name in last)


class TestSelecting:
    @pytest.mark.parametrize("metric", METRICS)
    def test_the_metric_is_measured_where_accuracy_was(self, make_trial: MakeTrial, metric: str) -> None:
        run = make_trial("full", task={"metric": metric, "evaluate_at": (1,)}, held_out="dim", **RATES)
        table = CLASSIFICATION.selecting(metric)
        history = history_of(run)
        for unit in history:
            names = {table.validation, table.best_validation, table.test, table.ood_mean, table.ood_worst}
            assert names | {table.held_out, table.tie_breaker.on(VAL)} <= unit.keys()
        assert ("val/acc" in history[0]) == (table.tie_breaker.key == "acc")
        values = [unit[table.validation] for unit in history]
        best = max(values, key=table.selection.score)
        assert values[int(history[-1]["best/epoch"]) - 1] == best == history[-1][table.best_validation]
        domains = [history[-1][table.of_domain(name)] for name in ("inverted", "noisy")]
        assert history[-1][table.ood_worst] == table.selection.worst(domains)
        assert "train/acc" in history[-1]

    def test_the_best_unit_follows_the_metric(self, make_trial: MakeTrial) -> None:
        """The same training, whose best unit by NLL is another one than by accuracy."""
        rates = {"lr_backbone": 0.05, "lr_head": 3.0}
        by_accuracy = history_of(make_trial("full", "cnn", task={"epochs": 6}, **rates))
        by_nll = history_of(make_trial("full", "cnn", task={"epochs": 6, "metric": "nll"}, **rates))
        assert [unit["val/nll"] for unit in by_nll] == [unit["val/nll"] for unit in by_accuracy]
        values = [unit["val/nll"] for unit in by_nll]
        assert by_nll[-1]["best/epoch"] == values.index(min(values)) + 1

    def test_lambda_alpha_and_c_are_chosen_by_the_metric(self, make_trial: MakeTrial) -> None:
        swept = make_trial("layernorm", task={"metric": "brier"}, lam_choice="sweep", **RATES)
        last = finish(swept)
        curve = last["curves"]["lambda"]["columns"]
        distances = [abs(value - 1) for value in curve["lambda"]]
        rows = zip(curve["val/brier"], curve["val/nll"], distances, curve["lambda"], strict=True)
        assert last["layernorm/lambda"] == min(rows)[3]
        assert "layernorm/val_brier_at_1" in last
        probe = finish(make_trial("linear_probe", task={"metric": "macro_f1"}))
        assert probe["linear_probe/val_macro_f1"] == pytest.approx(probe["best/val/macro_f1"], abs=0.05)
        wise = finish(make_trial("full", task={"metric": "brier"}, wise="sweep", **RATES))
        curve = wise["curves"]["wise"]["columns"]
        assert min(curve["val/brier"]) == wise["best/val/brier"]

    def test_a_metric_that_cannot_select_is_refused_before_anything_is_loaded(self, make_trial: MakeTrial) -> None:
        with pytest.raises(ValueError) as error:
            make_trial("full", task={"metric": "balanced"})
        assert str(error.value) == (
            "The metric that selects is one of acc, balanced_acc, macro_f1, auroc, ap, nll, brier, but got 'balanced'. "
            "Did you mean 'balanced_acc'?"
        )

    def test_naming_the_default_changes_no_number(self, make_trial: MakeTrial) -> None:
        plain = history_of(make_trial("full", **RATES))
        assert same_numbers(plain, history_of(make_trial("full", task={"metric": "acc"}, **RATES)))

    def test_a_domain_without_a_value_leaves_mean_and_worst_without_one(self, make_trial: MakeTrial) -> None:
        store = imbalanced()
        store.targets["ood/inverted"][:] = 0
        run = make_trial("linear_probe", store=store, task={"metric": "auroc"})
        last = finish(run)
        assert all(math.isnan(last[f"{split}/auroc"]) for split in ("ood/inverted", "ood/mean", "ood/worst"))
        assert math.isfinite(last["test/auroc"])
        assert all(math.isnan(final_scores(run.model, run.data)[f"{s}/auroc"]) for s in ("ood/mean", "ood/worst"))


class TestLoss:
    @pytest.mark.parametrize("loss", [BALANCED, LossSettings(focal_gamma=2.0), LossSettings(label_smoothing=0.1)])
    def test_training_minimises_the_loss_that_the_study_asks_for(
        self, make_trial: MakeTrial, loss: LossSettings
    ) -> None:
        """The loss of the first step of a unit of one batch is that of the network before it."""
        store = imbalanced()
        run = make_trial("bitfit", store=store, task={"loss": loss, "batch_size": 800, "epochs": 1})
        model, data = run.model, run.data
        images, labels = next(data.batches("train", batch_size=800))
        model.train()
        with torch.no_grad():
            logits = model(images)
        smoothing = loss.label_smoothing or 0.0
        expected = run.task.loss(logits, labels, label_smoothing=smoothing)
        plain = functional.cross_entropy(logits, labels)
        first = run.step()["train/loss"]
        assert first == pytest.approx(float(expected), rel=1e-4)
        assert first != pytest.approx(float(plain), rel=1e-3)

    def test_smoothing_of_the_study_is_smoothing_of_the_entry(self, make_trial: MakeTrial) -> None:
        of_study = make_trial("full", task={"loss": LossSettings(label_smoothing=0.1)}, **RATES)
        of_entry = make_trial("full", label_smoothing=0.1, **RATES)
        assert same_numbers(history_of(of_study), history_of(of_entry))
        assert same_tensors(of_study.model.state_dict(), of_entry.model.state_dict())

    def test_the_loss_of_a_solution_is_weighted(self, make_trial: MakeTrial) -> None:
        run = make_trial("linear_probe", store=imbalanced(), task={"loss": BALANCED})
        last = finish(run)
        logits, labels = predictions(run, "train")
        assert last["train/loss"] == pytest.approx(float(run.task.loss(logits.double(), labels)), rel=1e-4)
        assert last["train/acc"] == pytest.approx(classification_metrics(logits, labels)["acc"])

    @pytest.mark.parametrize("settings", [{"loss": BALANCED}, {"sampling": "balanced"}])
    @pytest.mark.parametrize("strategy", ["full", "lp_ft"])
    def test_a_trial_of_them_continues_bit_for_bit(
        self, make_trial: MakeTrial, strategy: str, settings: dict[str, Any]
    ) -> None:
        def make() -> Trial:
            shared = {"metric": "balanced_acc", "batch_size": 100, **settings}
            return make_trial(strategy, "cnn", store=imbalanced(), task=shared)

        whole = make()
        expected = history_of(whole)
        first = make()
        first.step()
        again = make()
        again.load_state(first.state())
        assert same_numbers(expected[1:], history_of(again))
        assert same_tensors(whole.model.state_dict(), again.model.state_dict())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"loss": LossSettings(focal_gamma=2.0)},
                "loss.focal_gamma needs a strategy that trains by gradient, but linear_probe solves in closed form, "
                "and got 2.0. Leave one of the two out, or use loss.class_weights: balanced.",
            ),
            (
                {"loss": LossSettings(label_smoothing=0.1)},
                "loss.label_smoothing needs a strategy that trains by gradient, but linear_probe solves in closed "
                "form, and got 0.1. Leave one of the two out.",
            ),
            (
                {"sampling": "balanced"},
                "data.sampling needs a strategy that trains by gradient, but linear_probe solves in closed form, and "
                "got 'balanced'. Leave one of the two out, or use loss.class_weights: balanced.",
            ),
        ],
    )
    def test_what_a_solution_cannot_honour_is_refused(
        self, make_trial: MakeTrial, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError) as error:
            make_trial("linear_probe", task=settings)
        assert str(error.value) == message

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (
                LossSettings(label_smoothing=0.1),
                "Label smoothing is set once, but full has label_smoothing 0.2 and the study loss.label_smoothing 0.1. "
                "Leave one of the two out.",
            ),
            (
                LossSettings(focal_gamma=2.0),
                "The focal loss is defined for one right class, but full has label_smoothing 0.2 and the study "
                "loss.focal_gamma 2.0. Leave one of the two out.",
            ),
        ],
    )
    def test_an_entry_that_smooths_by_itself(self, make_trial: MakeTrial, loss: LossSettings, message: str) -> None:
        with pytest.raises(ValueError) as error:
            make_trial("full", task={"loss": loss}, label_smoothing=0.2)
        assert str(error.value) == message


class TestARareClass:
    """95 : 5, hard to tell apart: the best accuracy is that of a classifier that never predicts the rare class."""

    def recall_of_rare(self, run: Trial) -> float:
        columns = finish(run)["curves"]["per_class"]["columns"]
        rows = zip(columns["class"], columns["split"], columns["recall"], strict=True)
        return next(recall for name, split, recall in rows if (name, split) == ("rare", TEST))

    def test_accuracy_chooses_the_constant_classifier(self, make_trial: MakeTrial) -> None:
        run = make_trial("linear_probe", store=imbalanced())
        assert self.recall_of_rare(run) == 0
        assert score(run.model, run.data, TEST, False, keys=["acc"])["acc"] == 0.95

    @pytest.mark.parametrize("strategy", ["linear_probe", "lp_ft", "full"])
    def test_balanced_accuracy_and_class_weights_do_not(self, make_trial: MakeTrial, strategy: str) -> None:
        shared = {"metric": "balanced_acc", "loss": BALANCED, "batch_size": 40, "epochs": 3}
        run = make_trial(strategy, store=imbalanced(), task=shared)
        assert self.recall_of_rare(run) > 0.4

    def test_nor_do_balanced_accuracy_and_balanced_sampling(self, make_trial: MakeTrial) -> None:
        shared = {"metric": "balanced_acc", "sampling": "balanced", "batch_size": 40, "epochs": 3}
        run = make_trial("full", store=imbalanced(), task=shared, **RATES)
        assert self.recall_of_rare(run) > 0.4
