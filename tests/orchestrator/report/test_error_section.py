"""The report's section on errors: its numbers are those of the record, its pictures those of the data store."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from benchmarks.support.synthetic import CLASSES, write_images
from orchestrator.cli import app
from orchestrator.commands.prune import prune
from orchestrator.record.journal import Journal
from orchestrator.record.kept_paths import predictions_file, similarities_file, weights_folder
from orchestrator.record.records import TrialRecord, fold
from orchestrator.report import error_section, thumbnails
from orchestrator.report import page as page_module
from orchestrator.report.error_section import representatives
from orchestrator.report.features import FeatureSimilarities, similarities
from orchestrator.report.page import report_html
from orchestrator.report.similarity import FeatureSimilarity
from orchestrator.results.errors import confident_errors, top_classes
from orchestrator.results.predictions import read_predictions
from orchestrator.results.reliability_figure import reliability_figure
from orchestrator.study import Study
from tests.support.reports import reported_study
from tests.support.toy_tasks import InkMasks
from trainables.engine.tuned_network import tuned_network
from trainables.models.backbone import load_pretrained
from trainables.specs.trial_spec import ModelSpec
from trainables.storage.checkpoint_format import save_tensors
from trainables.storage.kept_weights import load_weights
from trainables.tasks.registry import register

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

    def count(self, tag: str) -> int:
        return sum(element == tag for element, _ in self.elements)

    def class_names(self, rows: int) -> list[str]:
        """Names in the first table of classes; they are titles of their cells, too."""
        cells = [attributes["title"] for tag, attributes in self.elements if tag == "td" and "title" in attributes]
        return cells[:rows]

    @property
    def thumbnails(self) -> list[tuple[str, str]]:
        """(alternative text, source) of the thumbnails."""
        return [
            (attributes["alt"], attributes["src"])
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
    entry = error_section.error_section(study.results(), study.prepare().digest)["entries"][0]
    record = representatives(study.results())[entry["label"]]
    splits = {"ID test": "test", "OOD inverted": "ood/inverted", "OOD x": "ood/x"}
    assert entry["classes"]["groups"] == list(splits)
    recorded = {(row["class"], row["split"]): row for row in rows_of(record.curves["per_class"])}
    assert sorted(row[0] for row in entry["classes"]["rows"]) == sorted(CLASSES)
    for name, *cells in entry["classes"]["rows"]:
        for index, split in enumerate(splits.values()):
            row = recorded[name, split]
            numbers = [row[key] for key in ("recall", "precision", "f1")]
            expected = ["–" if number is None else f"{100 * number:.1f}" for number in numbers]
            assert cells[4 * index : 4 * index + 4] == [f"{row['images']:.0f}", *expected]
    cells_on_record = {
        (row["split"], row["label"], row["prediction"]): row["images"] for row in rows_of(record.curves["confusion"])
    }
    cells_on_page = {
        (splits[part["title"]], row["name"], name): cell["count"]
        for part in entry["splits"]
        for row in part["matrix"]["rows"]
        for name, cell in zip(part["matrix"]["classes"], row["cells"], strict=True)
        if cell["count"]
    }
    assert cells_on_page == cells_on_record


def rows_of(curve: Any) -> list[dict[str, Any]]:
    columns = curve["columns"]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_the_pictures_are_the_confident_errors_with_class_confidence_and_name(study: Study) -> None:
    values = error_section.error_section(study.results(), study.prepare().digest)
    store = study.prepare()
    for entry in values["entries"]:
        record = representatives(study.results())[entry["label"]]
        table = read_predictions(predictions_file(study.folder, record.number))
        for split, part in zip(("test", "ood/inverted", "ood/x"), entry["splits"], strict=True):
            top = top_classes(table, split)
            positions = confident_errors(top, error_section.MOST_ERRORS).tolist()
            assert [tile["name"] for tile in part["errors"]] == [top.names[position] for position in positions]
            for tile, position in zip(part["errors"], positions, strict=True):
                assert (decoded(tile["source"]) == store.images(split)[position]).all()  # PNG at this size
                assert tile["label"] == store.classes[store.labels(split)[position]]
                assert tile["predicted"] == store.classes[top.predicted[position]]
                assert tile["number"] == f"{100 * top.confidence[position]:.1f}\N{NO-BREAK SPACE}%"
    assert sum(len(part["errors"]) for entry in values["entries"] for part in entry["splits"]) > 10


def test_the_page_has_what_the_section_has(study: Study) -> None:
    page = Page(html(study))
    entry = error_section.error_section(study.results(), study.prepare().digest)["entries"][0]
    assert page.texts[:3] == ["Looking at errors", entry["label"], entry["title"]]
    assert [row[0] for row in entry["classes"]["rows"]] == page.class_names(rows=len(CLASSES))
    names = [tile["name"] for part in entry["splits"] for tile in part["errors"]]
    assert [name for name, _ in page.thumbnails][: len(names)] == names
    assert {attributes["src"][:14] for tag, attributes in page.elements if tag == "img"} == {
        "data:image/svg",
        "data:image/png",
    }


def test_the_recorded_calibration_errors_are_in_the_diagram(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    panels: list[Any] = []
    draw = reliability_figure
    monkeypatch.setattr(error_section, "reliability_figure", lambda splits: (panels.extend(splits), draw(splits))[1])
    entry = error_section.error_section(study.results(), study.prepare().digest)["entries"][0]
    metrics = representatives(study.results())[entry["label"]].metrics
    assert [panel.title for panel in panels[:3]] == ["ID test", "OOD inverted", "OOD x"]
    names = [("calib/ece", "calib/ece_scaled"), *((f"ood/{d}/ece", f"ood/{d}/ece_scaled") for d in ("inverted", "x"))]
    for panel, (before, after) in zip(panels, names, strict=False):
        assert panel.before.error == pytest.approx(metrics[before], abs=1e-5)
        assert panel.after.error == pytest.approx(metrics[after], abs=1e-5)


def test_similarities_are_those_of_the_restored_and_the_pretrained_network(study: Study) -> None:
    """By a plain loop over single images, and with another batch size."""
    store = study.prepare()
    records = list(representatives(study.results()).values())
    calls: list[tuple[str, int, int]] = []
    measured = similarities(
        records, FeatureSimilarities(study.folder, store, torch.device("cpu"), lambda *call: calls.append(call))
    )
    full, probe = (measured[record.number] for record in sorted(records, key=lambda record: record.label))
    assert isinstance(full, FeatureSimilarity)
    assert isinstance(probe, FeatureSimilarity)
    assert (probe.unchanged, dict(probe.cosines)) == (True, {})
    kept = load_weights(weights_folder(study.folder, next(r.number for r in records if r.label == "full")))
    pretrained = load_pretrained(ModelSpec(**kept.meta["model"]), kept.meta["requested_image_size"])
    tuned = tuned_network(kept)
    assert list(full.cosines) == ["test", "ood/inverted", "ood/x"]
    for split, cosines in full.cosines.items():
        images = torch.tensor(store.images(split)).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(kept.meta[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            before, after = (network((images - mean) / std) for network in (pretrained.module, tuned.backbone))
        expected = torch.nn.functional.cosine_similarity(before, after).numpy()
        np.testing.assert_allclose(cosines, expected, atol=1e-5)
        assert cosines.min() < 0.9999, "the features moved"
    total = sum(len(store.labels(split)) for split in full.cosines)
    assert calls[-1][1:] == (total, total)


def test_pictures_that_moved_most_and_least(study: Study) -> None:
    store = study.prepare()
    record = representatives(study.results())["full"]
    cosines = {split: np.linspace(1, -1, len(store.labels(split))) for split in ("test", "ood/inverted", "ood/x")}
    measured: dict[int, FeatureSimilarity | str] = {record.number: FeatureSimilarity(cosines)}
    values = error_section.error_section(study.results(), store.digest, measured)
    full, probe = sorted(values["entries"], key=lambda entry: entry["label"])
    most, least = full["splits"][0]["moved"]
    names = store.names("test")
    assert most["tiles"][0]["name"] == names[-1]
    assert least["tiles"][0]["name"] == names[0]
    labels = [tile["label"] for tile in most["tiles"]]
    assert max(labels.count(name) for name in CLASSES) - min(labels.count(name) for name in CLASSES) <= 1
    assert most["tiles"][0]["number"] == "cosine -1.000"
    assert probe["moved_note"].startswith("Features were compared for the chosen entry only")
    without = error_section.error_section(study.results(), store.digest)
    assert all("luthier report --features chosen" in entry["moved_note"] for entry in without["entries"])


def test_the_command_compares_features_of_the_chosen_entry_or_of_all(study: Study) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["report", str(study.folder), "--features", "all", "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    chosen = representatives(study.results())
    assert values["features"] == [f"trial {record.number}, {label}" for label, record in chosen.items()]
    page = Page((study.folder / "report.html").read_text(encoding="utf-8"))
    assert page.texts.count("Features moved most") == 3
    assert "Its features are those of the pretrained network: only the head was trained." in page.texts
    shutil.rmtree(study.folder / "weights")
    result = runner.invoke(app, ["report", str(study.folder), "--features", "chosen", "--json"])
    assert result.exit_code == 0, result.output
    (problem,) = json.loads(result.stdout)["problems"]
    assert problem.startswith(f"Features of trial {next(iter(chosen.values())).number}, {next(iter(chosen))}: ")
    predictions_file(study.folder, next(iter(chosen.values())).number).unlink()
    result = runner.invoke(app, ["report", str(study.folder), "--features", "chosen", "--json"])
    (problem,) = json.loads(result.stdout)["problems"]
    assert problem.endswith(": its predictions, which name the pictures, are not kept.")
    shutil.rmtree(study.folder.parent / "data")
    result = runner.invoke(app, ["report", str(study.folder), "--features", "chosen"])
    assert result.exit_code != 0
    assert "has no such store" in result.output


class TestStoredSimilarities:
    """Features of a trial are computed once; the file is of its weights and data, or it does not count."""

    def measured(self, study: Study, calls: list[str]) -> FeatureSimilarity:
        def report(what: str, done: int, total: int) -> None:
            calls.append(what)

        measure = FeatureSimilarities(study.folder, study.prepare(), torch.device("cpu"), report)
        return measure.of(representatives(study.results())["full"])

    def test_a_second_report_computes_nothing(self, study: Study) -> None:
        calls: list[str] = []
        first = self.measured(study, calls)
        assert calls
        again: list[str] = []
        second = self.measured(study, again)
        assert again == []
        assert second.unchanged == first.unchanged
        assert list(second.cosines) == list(first.cosines)
        for split, cosines in first.cosines.items():
            np.testing.assert_array_equal(second.cosines[split], cosines)

    @pytest.mark.parametrize("change", ["weights", "store", "length", "cut off"])
    def test_a_file_of_something_else_or_a_damaged_one_is_replaced(self, study: Study, change: str) -> None:
        expected = self.measured(study, [])
        record = representatives(study.results())["full"]
        path = similarities_file(study.folder, record.number)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            splits = file.keys()
            tensors = {split: file.get_tensor(split) for split in splits}
        if change == "cut off":
            path.write_bytes(path.read_bytes()[:20])
        elif change == "length":
            save_tensors({split: values[:-1] for split, values in tensors.items()}, path, metadata)
        else:
            wrong = {split: torch.zeros_like(values) for split, values in tensors.items()}
            save_tensors(wrong, path, {**metadata, change: "0" * 64})
        calls: list[str] = []
        again = self.measured(study, calls)
        assert calls
        np.testing.assert_array_equal(again.cosines["test"], expected.cosines["test"])
        third: list[str] = []
        self.measured(study, third)
        assert third == []

    def test_a_full_disk_costs_the_file_and_not_the_report(
        self, study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError("No space left on device")

        record = representatives(study.results())["full"]
        similarities_file(study.folder, record.number).unlink(missing_ok=True)
        monkeypatch.setattr("orchestrator.report.features.save_tensors", refuse)
        assert self.measured(study, []).cosines
        assert not similarities_file(study.folder, record.number).exists()
        assert "Compared features are not stored" in caplog.text

    def test_prune_removes_it(self, study: Study) -> None:
        self.measured(study, [])
        record = representatives(study.results())["full"]
        path = similarities_file(study.folder, record.number)
        size = path.stat().st_size
        pruned = {trial.number: trial.bytes for trial in prune(study.folder, dry_run=True).trials}
        others = [*weights_folder(study.folder, record.number).iterdir(), predictions_file(study.folder, record.number)]
        assert pruned[record.number] == size + sum(file.stat().st_size for file in others)
        prune(study.folder)
        assert not path.exists()


def test_predictions_that_are_not_kept_are_named_with_the_way_to_have_them(study: Study) -> None:
    record = representatives(study.results())["linear_probe"]
    predictions_file(study.folder, record.number).unlink()
    page = Page(html(study))
    expected = (
        f"Errors of linear_probe (trial {record.number}) are not shown, because their predictions are not kept: a "
        "study keeps those of each entry's best search trial and of every confirmed trial (`keep: best`, the default) "
        "until `luthier prune` removes them; run it again under another name to have them."
    )
    assert expected in page.texts
    assert page.count("details") == 1 + 3
    prune(study.folder)
    page = Page(html(study))
    assert page.count("details") == 0
    assert any(text.startswith("Errors of ") and "full (trial" in text for text in page.texts)


def test_damaged_predictions_cost_their_entry_and_not_the_page(study: Study) -> None:
    record = representatives(study.results())["full"]
    path = predictions_file(study.folder, record.number)
    path.write_bytes(path.read_bytes()[:200])
    page = Page(html(study))
    assert page.count("details") == 1 + 3
    assert any(str(path) in text for text in page.texts)


def test_a_section_that_cannot_be_made_costs_itself_alone(
    study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(page_module, "error_section", lambda *_: 1 / 0)
    page = Page(html(study))
    assert page.texts == ["Looking at errors", "The errors cannot be shown (ZeroDivisionError)."]
    assert "without its section on errors (ZeroDivisionError: division by zero)" in caplog.text


def test_without_the_data_store_there_are_tables_and_no_pictures(study: Study) -> None:
    shutil.rmtree(study.folder.parent / "data")
    page = Page(html(study))
    assert page.count("details") == 2 * (1 + 3)
    assert page.thumbnails == []
    assert any(
        "No pictures are shown, because the study's data store is not beside its folder" in t for t in page.texts
    )


def test_the_page_has_no_more_thumbnails_than_it_may(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails.Thumbnails.__init__, "__defaults__", (5,))
    page = Page(html(study))
    assert len(page.thumbnails) == 5
    assert "Pictures are left out from where the page had as many as it may have." in page.texts


def test_of_many_classes_the_pairs_that_are_confused_most(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_section, "MATRIX_CLASSES", 3)
    monkeypatch.setattr(error_section, "MOST_CLASSES", 2)
    entry = error_section.error_section(study.results(), study.prepare().digest)["entries"][0]
    record = representatives(study.results())[entry["label"]]
    wrong = [row for row in rows_of(record.curves["confusion"]) if row["label"] != row["prediction"]]
    part = entry["splits"][1]
    largest = max(row["images"] for row in wrong if row["split"] == "ood/inverted")
    assert part["matrix"] is None
    assert part["pairs"][0][2] == f"{largest:.0f}"
    assert len(entry["classes"]["rows"]) == 2
    assert entry["classes_note"].startswith("Lowest F1 on ID test first. 2 classes above are left out")
    assert "The classes that are confused most" in Page(html(study)).texts


def test_a_task_without_a_section_gets_one_sentence() -> None:
    register(InkMasks)
    spec = {"name": "masks", "task": "ink_masks"}
    page = Page(report_html([{"kind": "study_started", "time": 0.0, "study": "masks", "spec": spec}]))
    assert page.texts == [
        "Looking at errors",
        "Confusion, results per class and pictures of errors are shown for classification and segmentation; the task "
        "of this study is ink_masks.",
    ]


def test_c8_names_of_classes_and_samples_are_text_and_nothing_else(
    tmp_path: Path, network: Callable[[str], str]
) -> None:
    root = write_images(tmp_path / "images")
    for domain in root.iterdir():
        (domain / "disc").rename(domain / HOSTILE_CLASS)
        for file in list(domain.glob("*/*.png")):
            file.rename(file.with_name(f"{HOSTILE_FILE}{file.name}"))
    study = reported_study(tmp_path / "studies", {"root": str(root), **DATA}, network("vit"))
    text = html(study)
    page = Page(text)
    assert any(HOSTILE_CLASS in part for part in page.texts)
    assert any(HOSTILE_FILE in name for name, _ in page.thumbnails)
    assert any(HOSTILE_FILE in part for part in page.texts)
    tags = {tag for tag, _ in page.elements}
    assert tags <= {
        "h2", "h3", "h4", "details", "summary", "span", "figure", "figcaption", "img", "div", "table", "thead", "tbody",
        "tr", "th", "td", "p", "br",
    }  # fmt: skip
    names = {name for _, attributes in page.elements for name in attributes}
    assert names <= {"class", "style", "title", "alt", "src", "colspan", "open"}
    assert all(attributes["src"].startswith("data:image/") for tag, attributes in page.elements if tag == "img")
    styles = {attributes["style"] for _, attributes in page.elements if "style" in attributes}
    assert all(re.fullmatch(r"background: rgba\(\d+, \d+, \d+, [\d.]+\)", style) for style in styles)


def decoded(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
