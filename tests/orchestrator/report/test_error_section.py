"""The report's section on errors: its numbers are those of the record, its pictures those of the data store."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks.support.synthetic import CLASSES, write_images
from orchestrator.cli import app
from orchestrator.commands.prune import prune
from orchestrator.record.journal import Journal
from orchestrator.record.kept_files import predictions_file, weights_folder
from orchestrator.record.records import TrialRecord, fold
from orchestrator.report import error_section, thumbnails
from orchestrator.report.error_section import representatives
from orchestrator.report.features import FeatureSimilarities, similarities
from orchestrator.report.page import report_html
from orchestrator.report.similarity import FeatureSimilarity
from orchestrator.results.errors import confident_errors, top_classes
from orchestrator.results.predictions import read_predictions
from orchestrator.study import Study
from tests.support.reports import reported_study
from trainables.data.store import Store
from trainables.engine.tuned_network import tuned_network
from trainables.models.backbone import load_pretrained
from trainables.specs.trial_spec import ModelSpec
from trainables.storage.kept_weights import load_weights

pytestmark = [pytest.mark.usefixtures("cpu_only"), pytest.mark.thorough]

HOSTILE_CLASS = '<img src=x onerror="alert(1)">'
HOSTILE_FILE = "<svg onload=alert(2)>'&amp;"
DATA = {"id": ["bright", "dim"], "ood": ["inverted", "noisy"]}


class Page(HTMLParser):
    """Elements with their attributes and the texts of the section on errors, up to the table of trials."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        start, end = text.index("<h2>Looking at errors</h2>"), text.index("<h2>Trials</h2>")
        self.feed(text[start:end])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    @property
    def pictures(self) -> list[tuple[str, Image.Image]]:
        """(alternative text, decoded) of the thumbnails."""
        return [
            (attributes["alt"], Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))))
            for tag, attributes in self.elements
            if tag == "img" and not attributes["src"].startswith("data:image/svg")
        ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, network: Callable[[str], str]) -> Study:
    folder = tmp_path_factory.mktemp("reported")
    root = write_images(folder / "images")
    (root / "noisy").rename(root / "x")
    return reported_study(
        folder / "studies", {"root": str(root), "id": DATA["id"], "ood": ["inverted", "x"]}, network("vit")
    )


@pytest.fixture
def study(finished: Study, tmp_path: Path) -> Study:
    """A copy, whose files a test may remove."""
    shutil.copytree(finished.spec.storage, tmp_path / "studies", dirs_exist_ok=True)
    return Study(**{**finished.spec.model_dump(mode="json"), "storage": str(tmp_path / "studies")})


def html(study: Study, measured: dict[int, FeatureSimilarity | str] | None = None) -> str:
    return report_html(Journal.read(study.folder / "journal.jsonl"), study.folder, measured)


def trial(study: Study, number: int) -> TrialRecord:
    return fold(Journal.read(study.folder / "journal.jsonl"))[number]


def test_each_entry_is_looked_at_by_the_trial_that_is_exported(study: Study) -> None:
    results = study.results()
    chosen = representatives(results)
    assert next(iter(chosen)) == results.decision().choice.record.label
    validation = {number: trial(study, number).metrics["best/val/acc"] for number in (1, 2)}
    lower = min(validation, key=lambda number: (validation[number], -number))
    assert {label: record.number for label, record in chosen.items()} == {"full": lower, "linear_probe": 3}


def test_the_tables_are_those_of_the_record(study: Study) -> None:
    """The trial itself has measured recall, precision, F1 and confusion, of the same predictions."""
    values = error_section.error_section(study.results(), study.prepare().digest)
    assert [entry["label"] for entry in values["entries"]][0] == "full"
    entry = values["entries"][0]
    record = representatives(study.results())["full"]
    columns = record.curves["per_class"]["columns"]
    assert entry["classes"]["groups"] == ["ID test", "OOD inverted", "OOD x"]
    splits = ["test", "ood/inverted", "ood/x"]
    assert len(entry["classes"]["rows"]) == len(CLASSES)
    for name, *cells in entry["classes"]["rows"]:
        for index, split in enumerate(splits):
            row = next(
                i
                for i, pair in enumerate(zip(columns["class"], columns["split"], strict=True))
                if pair == (name, split)
            )
            numbers = [columns[key][row] for key in ("recall", "precision", "f1")]
            shown = ["–" if number is None else f"{100 * number:.1f}" for number in numbers]
            assert cells[4 * index : 4 * index + 4] == [f"{columns['images'][row]:.0f}", *shown]
    confusion = record.curves["confusion"]["columns"]
    cells_on_record = {
        (split, label, predicted): count
        for label, split, predicted, count in zip(
            *(confusion[k] for k in ("label", "split", "prediction", "images")), strict=True
        )
    }
    cells_shown = {
        (split, row["name"], name): cell["count"]
        for split, part in zip(splits, entry["splits"], strict=True)
        for row in part["matrix"]["rows"]
        for name, cell in zip(part["matrix"]["classes"], row["cells"], strict=True)
        if cell["count"]
    }
    assert cells_shown == cells_on_record


def test_the_pictures_are_the_confident_errors_with_class_confidence_and_name(study: Study) -> None:
    page = Page(html(study))
    record = representatives(study.results())["full"]
    table = read_predictions(predictions_file(study.folder, record.number))
    store = study.prepare()
    shown = page.pictures
    assert shown
    for split in ("test", "ood/inverted", "ood/x"):
        top = top_classes(table, split)
        for position in confident_errors(top, error_section.MOST_ERRORS).tolist():
            pixels = next(np.asarray(image) for name, image in shown if name == top.names[position])
            shown = [pair for pair in shown if pair[0] != top.names[position]] + [
                pair for pair in shown if pair[0] == top.names[position]
            ][1:]
            assert (pixels == store.images(split)[position]).all()  # PNG at this size
            assert f"{store.classes[top.targets[position]]} →" in page.texts
            assert any(f"confidence {100 * top.confidence[position]:.1f} %" in text for text in page.texts)
