"""Numbers of the model card: the exported trial's over pictures, and its configuration's over pictures and seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from orchestrator.commands.export import scores_of
from orchestrator.export.card import CardFacts, render_card, square_lines
from orchestrator.record.kept_paths import predictions_file
from orchestrator.record.records import TrialRecord
from orchestrator.results.leaderboard import leaderboard
from orchestrator.results.predictions import SampleTables, output_matrix, read_predictions
from tests.support.predictions import write_predictions
from trainables.data.store import Store
from trainables.models.backbone import DataConfig
from trainables.specs.metrics import CLASSIFICATION
from trainables.tasks.classification_metrics import classification_metrics

SIZES = {"val": 60, "test": 200, "ood/sketch": 80}
TARGETS = {split: [index % 4 == 0 for index in range(size)] for split, size in SIZES.items()}


@dataclass(frozen=True)
class Splits:
    """What the card needs of a data store."""

    @property
    def splits(self) -> list[str]:
        return list(SIZES)

    def labels(self, split: str) -> list[bool]:
        return TARGETS[split]


STORE = cast("Store", Splits())


def confirmed(folder: Path, seeds: int = 3) -> list[TrialRecord]:
    """Confirmations of one configuration with kept predictions."""
    generator = np.random.default_rng(0)
    difficulty = {split: generator.uniform(0.5, 1, size=size) for split, size in SIZES.items()}
    targets = {split: [int(target) for target in values] for split, values in TARGETS.items()}
    records = []
    for seed in range(seeds):
        correct = {split: generator.uniform(size=len(chance)) < chance for split, chance in difficulty.items()}
        write_predictions(folder, seed, correct, targets)
        logits = torch.tensor(output_matrix(read_predictions(predictions_file(folder, seed))))
        labels = torch.tensor([label for values in targets.values() for label in values])
        starts = np.cumsum([0, *SIZES.values()])
        metrics: dict[str, float] = {}
        for index, split in enumerate(SIZES):
            part = slice(int(starts[index]), int(starts[index + 1]))
            measured = classification_metrics(logits[part], labels[part], ["acc", "macro_f1"])
            metrics |= {f"{'best/' if split == 'val' else ''}{split}/{key}": value for key, value in measured.items()}
        records.append(
            TrialRecord(
                trial_id=str(seed), number=seed, seed=seed, role="confirm", metrics=metrics, strategy="full",
                label="full", config_hash="h", state="complete",
            )
        )  # fmt: skip
    return records


def test_the_trial_has_wilsons_interval_and_the_configuration_the_leaderboards(tmp_path: Path) -> None:
    records = confirmed(tmp_path)
    tables = SampleTables(tmp_path)
    scores = scores_of(records[1], records, STORE, CLASSIFICATION, tables)
    assert [(score.name, score.samples) for score in scores] == [
        ("val/acc", 60), ("test/acc", 200), ("ood/sketch/acc", 80),
    ]  # fmt: skip
    accuracy = records[1].metrics["test/acc"]
    wilson = binomtest(round(200 * accuracy), 200).proportion_ci(method="wilson")
    ends = f"{100 * wilson.low:.1f} to {100 * wilson.high:.1f}"
    assert scores[1].value == f"{100 * accuracy:.1f} % (95 % interval over pictures: {ends})"
    search = replace(records[0], role="search", number=9, trial_id="search")
    row = leaderboard([search, *records], tables=tables).to_dict("records")[0]
    ends = f"{100 * row['test/acc/low']:.1f} to {100 * row['test/acc/high']:.1f}"
    mean = f"{100 * row['test/acc']:.1f} %"
    assert scores[1].over_seeds == f"{mean} (3 seeds; 95 % interval over pictures and seeds: {ends})"


def test_another_metric_has_its_own_interval(tmp_path: Path) -> None:
    records = confirmed(tmp_path)
    scores = scores_of(records[0], records, STORE, CLASSIFICATION.selecting("macro_f1"), SampleTables(tmp_path))
    assert [score.name for score in scores] == ["val/macro_f1", "test/macro_f1", "ood/sketch/macro_f1"]
    assert all("95 % interval over pictures: " in score.value for score in scores)
    assert all("95 % interval over pictures and seeds: " in score.over_seeds for score in scores)


@pytest.mark.parametrize(("metric", "interval"), [("acc", True), ("macro_f1", False)])
def test_without_predictions_only_an_accuracy_has_an_interval_over_pictures(
    tmp_path: Path, metric: str, interval: bool
) -> None:
    records = confirmed(tmp_path)
    scores = scores_of(records[0], records, STORE, CLASSIFICATION.selecting(metric), SampleTables(tmp_path / "other"))
    assert ["over pictures" in score.value for score in scores] == [interval] * 3
    assert all("3 seeds; 95 % interval over seeds: " in score.over_seeds for score in scores)


def test_a_refit_has_no_interval_of_the_trial_whose_configuration_it_has(tmp_path: Path) -> None:
    records = confirmed(tmp_path)
    refit = replace(records[0], role="refit", metrics={"test/macro_f1": 0.5, "test/acc": 0.5})
    (score,) = scores_of(refit, records, STORE, CLASSIFICATION.selecting("macro_f1"), SampleTables(tmp_path))
    assert score.value == "50.0 %"


def test_the_columns_are_labelled(tmp_path: Path) -> None:
    records = confirmed(tmp_path)
    scores = scores_of(records[0], records, STORE, CLASSIFICATION, SampleTables(tmp_path))
    facts = CardFacts(study="pets", trial=0, label="full", strategy="full", choice="Chosen.", scores=scores)
    view = square_lines(DataConfig((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.875, 32))
    card = render_card(facts, ["a", "b"], view, "", [])
    assert "| metric | this model | its configuration, mean over seeds | pictures |" in card
    refit = render_card(replace(facts, taken_over={}), ["a", "b"], view, "", [])
    assert "mean over seeds, trained without the validation pictures | pictures |" in refit
