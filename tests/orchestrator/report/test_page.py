"""The report of a study: its numbers are those of the journal, and a name in it is a name and nothing else."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.record.journal import Journal
from orchestrator.record.records import fold, measurements
from orchestrator.report import page
from orchestrator.report.page import report_html, write_report
from orchestrator.results import figures
from orchestrator.results.leaderboard import cells
from orchestrator.results.study_results import Results

HOSTILE = '<img src=x onerror="alert(1)">'
SCRIPT = "</script><script>alert(2)</script>"
SPEC: dict[str, Any] = {
    "name": "pets",
    "data": {"source": "folder", "root": "/data/pets"},
    "model": {"name": "vit_tiny_patch16_224"},
    "search": {"objective": "id_val", "epochs": 3},
    "tracking": {"uri": "http://user:hunter22hunter@mlflow:5000"},
}


def write(path: Path, labels: tuple[str, ...] = ("full", "lp_ft"), finish: bool = True, **header: Any) -> Path:
    """A search of three rates per label, a confirmation of the best on three seeds, and one failure."""
    path.mkdir(exist_ok=True)
    with Journal(path / "journal.jsonl") as journal:
        journal.append(
            "study_started", study="pets", spec=SPEC, versions={"ray": "2.60"}, dataset_digest="d" * 64,
            **{"dataset": "pets", **header},
        )  # fmt: skip
        number = 0
        for at, label in enumerate(labels):
            for role, seed, rate in [*(("search", 7, r) for r in (1, 3, 10)), *(("confirm", s, 3) for s in (1, 2, 3))]:
                score = 0.5 + at / 10 + (0.2 if rate == 3 else 0.1) + (seed / 100 if role == "confirm" else 0)
                _trial(journal, number, label, role, seed, rate, score)
                number += 1
        _suggest(journal, number, labels[0], "search", 7, 30)
        error = f"NotFiniteError: the loss {SCRIPT} is nan, token=hunter22hunter"
        journal.append("trial_failed", trial_id=f"t{number}", reason="nan", error=error)
        if finish:
            journal.append("study_finished", state="complete")
    return path


def _suggest(journal: Journal, number: int, label: str, role: str, seed: int, rate: float) -> None:
    journal.append(
        "trial_suggested", trial_id=f"t{number}", number=number, strategy="full", label=label, seed=seed, role=role,
        hparams={"lr_backbone": rate / 1e4, "lr_head": rate}, held_out=None, config_hash=f"{label}-{rate}",
        search_values={},
    )  # fmt: skip
    journal.append("trial_started", trial_id=f"t{number}", node=None, pid=None)


def _trial(journal: Journal, number: int, label: str, role: str, seed: int, rate: float, score: float) -> None:
    _suggest(journal, number, label, role, seed, rate)
    for unit in (1, 2, 3):
        metrics = {"val/acc": score - 0.1 + unit / 30}
        if unit == 3:
            metrics |= {"best/val/acc": score, "test/acc": score - 0.05, "ood/mean/acc": score - 0.2}
            metrics |= {"ood/worst/acc": score - 0.3, "calib/ece": 0.04}
        journal.append("result", trial_id=f"t{number}", unit=unit, metrics=metrics)
    journal.append("trial_finished", trial_id=f"t{number}", state="complete")


class Elements(HTMLParser):
    """Counts the elements of a page and keeps attributes, texts and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.count: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all_of(self, tag: str, name: str) -> list[str]:
        return [value for element, key, value in self.attributes if (element, key) == (tag, name)]


def test_the_leaderboard_is_that_of_the_results(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets")
    events = Journal.read(folder / "journal.jsonl")
    page = Elements(report_html(events))
    results = Results(fold(events), SPEC, measurements=measurements(events))
    texts = [text.strip() for text in page.texts]
    for row in results.leaderboard().to_dict("records"):
        label, _, *numbers = cells(row)
        at = next(i for i, t in enumerate(texts) if t == label and numbers[0] in texts[i : i + 3])
        assert [text for text in texts[at + 1 : at + 16] if text][: len(numbers)] == numbers
    for sentence in [*results.findings(), *results.warnings()]:
        assert sentence in texts
    assert any(results.regret_line() in text for text in texts)
    assert page.count["img"] == 3


def test_c8_names_and_messages_are_text_in_the_report_and_nothing_else(tmp_path: Path) -> None:
    """MLflow had this hole (CVE-2023-6568); names of classes, domains and entries come from anywhere."""
    plain = Elements(report_html(Journal.read(write(tmp_path / "a") / "journal.jsonl")))
    folder = write(tmp_path / "b", labels=(HOSTILE, "$x_$"), dataset=SCRIPT, backbone=HOSTILE)
    text = report_html(Journal.read(folder / "journal.jsonl"))
    page = Elements(text)
    assert page.count == plain.count
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.all_of("img", "src"))
    assert {"href", "action"} & {name for _, name, _ in page.attributes} == set()
    assert any(HOSTILE in part for part in page.texts)
    assert any(SCRIPT in part for part in page.texts)


def test_pictures_hold_no_text_of_theirs(tmp_path: Path) -> None:
    """SVG inside an image runs no script anyway; letters are paths, so that there is nothing to escape."""
    folder = write(tmp_path / "b", labels=(HOSTILE, SCRIPT))
    page = Elements(report_html(Journal.read(folder / "journal.jsonl")))
    for source in page.all_of("img", "src"):
        drawn = re.sub(r"<!--.*?-->", "", base64.b64decode(source.partition(",")[2]).decode(), flags=re.DOTALL)
        assert Elements(drawn).count.keys() & {"script", "img", "text", "a", "foreignobject"} == set()


def test_the_page_may_load_nothing_and_run_only_its_own_script(tmp_path: Path) -> None:
    text = report_html(Journal.read(write(tmp_path / "pets") / "journal.jsonl"))
    policy = Elements(text).all_of("meta", "content")[0]
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1
    allowed = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert policy == (f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'")


def test_c9_passwords_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22hunter")
    text = report_html(Journal.read(write(tmp_path / "pets") / "journal.jsonl"))
    assert "hunter22hunter" not in text
    assert "http://***@mlflow:5000" in text


def test_a_study_that_still_runs_and_one_without_a_result(tmp_path: Path) -> None:
    running = report_html(Journal.read(write(tmp_path / "a", finish=False) / "journal.jsonl"))
    assert "a study by Luthier, running" in running
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.append("study_started", study="none", spec=SPEC, dataset_digest="d" * 64)
    text = report_html(Journal.read(tmp_path / "journal.jsonl"))
    assert Elements(text).count["img"] == 0
    with pytest.raises(ValueError, match=r"needs a study, but this journal does not tell of one\. Run the study first"):
        report_html([])


def test_a_picture_that_cannot_be_drawn_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(figures, "training", lambda *_: 1 / 0)
    text = report_html(Journal.read(write(tmp_path / "pets") / "journal.jsonl"))
    assert Elements(text).count["img"] == 2
    assert "without the picture 'Training' (ZeroDivisionError: division by zero)" in caplog.text


def test_of_a_large_study_the_first_trials_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_TRIALS", 4)
    text = report_html(Journal.read(write(tmp_path / "pets") / "journal.jsonl"))
    assert "9 more trials: <code>luthier results --json</code>" in text


def test_the_rings_stand_at_the_chosen_rates(tmp_path: Path) -> None:
    events = Journal.read(write(tmp_path / "pets") / "journal.jsonl")
    records = fold(events)
    chosen = {label: Results(records, SPEC).best("id_val", label) for label in ("full", "lp_ft")}
    figure = figures.learning_rates(records, chosen)
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == ["full", "lp_ft"]
    for axes in panels:
        points, ring = axes.collections
        assert len(points.get_offsets()) == 3  # the one that failed has no accuracy
        assert ring.get_offsets().tolist() == [[3.0, 3e-4]]


def test_a_relative_rate_is_drawn_as_an_absolute_one_is(tmp_path: Path) -> None:
    records = [
        dataclasses.replace(record, hparams={"lr_head": 0.1 * (i + 1), "lr_backbone_relative": 0.01 * (i + 1)})
        for i, record in enumerate(fold(Journal.read(write(tmp_path / "pets") / "journal.jsonl")))
        if record.label == "lp_ft"
    ]
    figure = figures.learning_rates(records, {"lp_ft": Results(records, SPEC).best("id_val", "lp_ft")})
    assert figure is not None
    assert figure.axes[0].get_ylabel() == "backbone learning rate × curvature"


def test_settings_that_earlier_trials_had_stand_beside_the_study_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets")
    with Journal(folder / "journal.jsonl") as journal:
        changed = {"search.batch_size": [64, 32], "strategies.full.fixed.lr": [None, SCRIPT]}
        journal.append(
            "study_started", study="pets", spec=SPEC, dataset="pets", dataset_digest="d" * 64, changed=changed
        )
    page = Elements(report_html(Journal.read(folder / "journal.jsonl")))
    texts = [text.strip() for text in page.texts]
    assert "the study file, as of the last run" in texts
    assert "Changed before trial 13: search.batch_size: 64 -> 32" in texts
    assert f"Changed before trial 13: strategies.full.fixed.lr: none -> {SCRIPT}" in texts
    assert "the study file" in [text.strip() for text in Elements(report_html(_events(tmp_path))).texts]


def _events(tmp_path: Path) -> list[Any]:
    return list(Journal.read(write(tmp_path / "unchanged") / "journal.jsonl"))


def test_a_stopped_trial_has_its_validation_and_no_test(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets", finish=False)
    with Journal(folder / "journal.jsonl") as journal:
        _suggest(journal, 20, "full", "search", 7, 0.3)
        for unit, value in ((1, 0.31), (2, 0.42)):
            journal.append("result", trial_id="t20", unit=unit, metrics={"val/acc": value})
        journal.append("trial_finished", trial_id="t20", state="pruned")
    events = Journal.read(folder / "journal.jsonl")
    texts = [text.strip() for text in Elements(report_html(events)).texts]
    at = texts.index("pruned")
    assert [text for text in texts[at + 1 : at + 10] if text][:4] == ["42.0", "not evaluated", "not evaluated", "2"]
    records = fold(events)
    chosen = {"full": Results(records, SPEC).best("id_val", "full")}
    figure = figures.learning_rates(records, chosen)
    assert figure is not None
    assert len(figure.axes[0].collections[0].get_offsets()) == 4


def test_the_command_writes_it_and_prints_the_path(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets")
    (folder / "study.yaml").write_text(
        "name: pets\ndata: {source: digits}\nmodel: {name: digits_vit}\nstrategies: [full]\n"
    )
    result = CliRunner().invoke(app, ["report", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    elsewhere = tmp_path / "new" / "page.html"
    write_report(Journal.read(folder / "journal.jsonl"), elsewhere)
    assert elsewhere.exists()
    none = CliRunner().invoke(app, ["report", str(tmp_path / "nothing.yaml")])
    assert none.exit_code == 2
