"""Choice, leaderboard and findings of a study that keeps its predictions, and of one whose files cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from orchestrator.record.kept_paths import predictions_file
from orchestrator.record.records import TrialRecord
from orchestrator.results.predictions import PredictionsError, output_matrix, read_predictions
from orchestrator.results.study_results import Results
from tests.support.predictions import write_predictions
from trainables.tasks.classification_metrics import classification_metrics

SIZE = 500


def study(folder: Path, accuracies: dict[str, float], parameters: dict[str, float]) -> Results:
    """Entries with one search trial and three confirmations each; difficult samples are the same for all of them."""
    generator = np.random.default_rng(0)
    difficulty = {split: generator.uniform(size=SIZE) for split in ("val", "test", "ood/a")}
    records = []
    for index, (label, accuracy) in enumerate(accuracies.items()):
        shared = {"strategy": label, "label": label, "config_hash": label, "state": "complete"}
        search = {"best/val/acc": 0.99, "test/acc": 0.99, "ood/mean/acc": 0.99}
        records.append(TrialRecord(trial_id=label, number=10 * index, metrics=search, **shared))  # type: ignore[arg-type]
        for seed in range(3):
            number = 10 * index + seed + 1
            correct = {
                split: values + generator.normal(scale=0.05, size=SIZE) < accuracy
                for split, values in difficulty.items()
            }
            write_predictions(folder, number, correct)
            metrics = {
                "best/val/acc": float(correct["val"].mean()),
                "test/acc": float(correct["test"].mean()),
                "ood/a/acc": float(correct["ood/a"].mean()),
                "ood/mean/acc": float(correct["ood/a"].mean()),
                "ood/worst/acc": float(correct["ood/a"].mean()),
                "cost/trainable_parameters": parameters[label],
                "cost/total_seconds": 36.0,
            }
            records.append(
                TrialRecord(trial_id=str(number), number=number, seed=seed, role="confirm", metrics=metrics, **shared)  # type: ignore[arg-type]
            )
    return Results(records, {"name": "pets"}, folder=folder)


def test_equal_configurations_go_to_the_one_with_fewer_trained_parameters(tmp_path: Path) -> None:
    results = study(tmp_path, {"full": 0.8, "lora": 0.8}, {"full": 2e6, "lora": 1000.0})
    decision = results.decision()
    assert decision.choice.record.label == "lora"
    assert results.best().record.label == "lora"
    if decision.best is not decision.choice:
        assert "equals it and trains fewer parameters (1,000 against 2,000,000)." in decision.sentence
        assert decision.sentence.startswith(
            "Chosen by id_val: lora (trial 10). full (trial 0) has the best best/val/acc"
        )
    assert "not told apart from" in results.findings()[0]


@pytest.mark.parametrize(
    ("parameters", "ending"),
    [(5.0, "and none of these trains fewer parameters."), (6.0, "and trains the fewest parameters.")],
)
def test_the_sentence_of_a_best_that_stays_states_what_is_true_of_its_parameters(
    tmp_path: Path, parameters: float, ending: str
) -> None:
    results = study(tmp_path, {"full": 0.8, "lora": 0.8}, {"full": 5.0, "lora": parameters})
    decision = results.decision()
    assert decision.choice is decision.best
    assert decision.choice.record.label == "full"
    assert decision.sentence.endswith(ending)


def test_a_better_configuration_is_chosen_although_it_costs_more(tmp_path: Path) -> None:
    results = study(tmp_path, {"lora": 0.75, "full": 0.9}, {"full": 2e6, "lora": 1000.0})
    decision = results.decision()
    assert (decision.choice.record.label, list(decision.equal)) == ("full", [])
    assert decision.sentence.endswith("over 3 fresh seeds; by a paired bootstrap on validation none equals it.")
    first = results.findings()[0]
    assert first.startswith("Best in distribution: full (test ")
    assert ", n = 500 × 3 seeds), ahead by " in first
    assert first.endswith("; paired over the same samples and seeds, Holm-adjusted p < 0.001.")
    assert results.warnings() == []


def test_the_leaderboard_states_samples_basis_and_costs(tmp_path: Path) -> None:
    results = study(tmp_path, {"lora": 0.75, "full": 0.9}, {"full": 2e6, "lora": 1000.0})
    row = results.leaderboard().to_dict("records")[0]
    assert (row["label"], row["test/acc/n"], row["test/acc/interval"]) == ("full", 500, "samples and seeds")
    assert row["test/acc/low"] < row["test/acc"] < row["test/acc/high"]
    assert row["test/acc/ci95"] == max(row["test/acc"] - row["test/acc/low"], row["test/acc/high"] - row["test/acc"])
    assert row["ood/worst/acc/interval"] == "samples and seeds"
    assert row["calib/ece/interval"] == "none"
    assert row["device_hours"] == pytest.approx(0.03)
    assert "| 3 × 500 |" in results.markdown()
    assert "| 2.0 M |" in results.markdown()


def test_predictions_that_contradict_the_record_are_left_out_and_reported(tmp_path: Path) -> None:
    results = study(tmp_path, {"lora": 0.75, "full": 0.9}, {"full": 2e6, "lora": 1000.0})
    write_predictions(tmp_path, 1, {"val": np.ones(4, bool), "test": np.ones(4, bool)})
    warnings = results.warnings()
    assert warnings[0].startswith("Predictions and record of a trial must agree, but trial 1 has test/acc 0.7")
    assert warnings[1].startswith("No per-sample results are kept of trials 1: ")
    assert "over seeds alone" in results.findings()[0]


class TestMetricsThatAreNoMeans:
    """A study of two classes, 360 and 40 images, that selects by another metric."""

    TARGETS: ClassVar = {"test": [0] * 360 + [1] * 40}

    def results(self, folder: Path, metric: str, rare: int = 40) -> Results:
        targets = {"test": [0] * (400 - rare) + [1] * rare}
        generator = np.random.default_rng(0)
        chances = generator.uniform(0.6, 1, size=400)
        records = []
        for seed in range(4):
            correct = generator.uniform(size=400) < chances
            write_predictions(folder, seed, {"test": correct}, targets)
            table = read_predictions(predictions_file(folder, seed))
            logits = torch.tensor(output_matrix(table))
            values = classification_metrics(logits, torch.tensor(targets["test"]), [metric, "ece"])
            metrics = {"best/val/acc": 0.5, f"best/val/{metric}": 0.5, "calib/ece": values.pop("ece")}
            metrics |= {f"test/{key}": value for key, value in values.items()}
            records.append(
                TrialRecord(
                    trial_id=str(seed), number=seed, seed=seed, role="confirm" if seed else "search", metrics=metrics,
                    strategy="full", label="full", config_hash="h", state="complete",
                )
            )  # fmt: skip
        return Results(records, {"name": "pets", "search": {"metric": metric}}, folder=folder)

    @pytest.mark.parametrize("metric", ["macro_f1", "auroc", "ap", "brier", "balanced_acc"])
    def test_the_leaderboard_has_intervals_over_samples_and_seeds(self, tmp_path: Path, metric: str) -> None:
        row = self.results(tmp_path, metric).leaderboard().to_dict("records")[0]
        for name in (f"test/{metric}", "calib/ece"):
            assert (row[f"{name}/interval"], row[f"{name}/n"]) == ("samples and seeds", 400)
            assert row[f"{name}/low"] < row[name] < row[f"{name}/high"]

    @pytest.mark.parametrize("metric", ["macro_f1", "auroc", "ap"])
    def test_a_class_of_one_image_leaves_an_interval_over_seeds(self, tmp_path: Path, metric: str) -> None:
        row = self.results(tmp_path, metric, rare=1).leaderboard().to_dict("records")[0]
        assert (row[f"test/{metric}/interval"], row["calib/ece/interval"]) == ("seeds", "samples and seeds")

    def test_other_predictions_are_left_out_and_reported(self, tmp_path: Path) -> None:
        results = self.results(tmp_path, "macro_f1")
        write_predictions(tmp_path, 1, {"test": np.ones(400, bool)}, self.TARGETS)
        assert results.leaderboard().to_dict("records")[0]["test/macro_f1/interval"] == "seeds"
        assert results.warnings()[0].startswith(
            "Predictions and record of a trial must agree, but trial 1 has calib/ece 0.0"
        )


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(PredictionsError, match=r"^There are no predictions at .*\. Run the study with `keep: all`"):
            read_predictions(predictions_file(tmp_path, 3))

    @pytest.mark.parametrize("keep", [0, 10, 200])
    def test_cut_off(self, tmp_path: Path, keep: int) -> None:
        path = write_predictions(tmp_path, 0, {"test": np.ones(5, bool)})
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(
            PredictionsError, match="must be an Arrow file of predictions, but it does not end like one"
        ):
            read_predictions(path)
