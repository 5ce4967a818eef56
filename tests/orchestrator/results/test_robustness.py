"""Errors under corruptions of a study's entries: means, intervals and figures against the linear probe, by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.synthetic import write_images
from orchestrator.record.journal import Journal
from orchestrator.record.records import TrialRecord
from orchestrator.report.page import report_html
from orchestrator.results.robustness import Robustness
from orchestrator.results.study_results import Results
from orchestrator.results.summary import Summarizer
from tests.support.records import FULL, entry
from tests.support.reports import reported_study

PICTURES = 40


def curves(errors: Mapping[str, Sequence[float]], shift: float = 0.0, samples: bool = True) -> dict[str, Any]:
    """What a trial records: errors by corruption and severity, and of each picture."""
    columns: dict[str, list[Any]] = {"corruption": [], "severity": [], "error": []}
    for name, values in errors.items():
        columns["corruption"] += [name] * 5
        columns["severity"] += [1, 2, 3, 4, 5]
        columns["error"] += list(values)
    tables = {"corruptions": {"columns": columns, "note": ""}}
    if samples:
        spread = [10.0 if number % 2 else -10.0 for number in range(PICTURES)]
        of_pictures: dict[str, list[Any]] = {"sample": [f"{number}.png" for number in range(PICTURES)]}
        for name, values in errors.items():
            of_pictures[name] = [sum(values) / 5 + deviation for deviation in spread]
        tables["corruption_samples"] = {"columns": of_pictures, "note": ""}
    return tables


def robust_entry(
    number: int, label: str, fog: float, snow: float, clean: float, seeds: int = 3, samples: bool = True
) -> list[TrialRecord]:
    """Confirmed trials of which every seed has the error of the first plus its number."""
    tables = []
    metrics: dict[str, list[float]] = {
        "robust/fog/ce": [],
        "robust/snow/ce": [],
        "robust/mce": [],
        "robust/clean_error": [],
    }
    for seed in range(seeds):
        grid = {"fog": [fog + seed + step for step in (-2, -1, 0, 1, 2)], "snow": [snow + seed] * 5}
        tables.append(curves(grid, samples=samples))
        metrics["robust/fog/ce"].append(fog + seed)
        metrics["robust/snow/ce"].append(snow + seed)
        metrics["robust/mce"].append((fog + snow) / 2 + seed)
        metrics["robust/clean_error"].append(clean)
    return entry(number, label, [0.8] * seeds, curves=tables, **metrics)


def results(*entries: Sequence[TrialRecord]) -> Results:
    return Results([record for records in entries for record in records], {"name": "pets"})


def measured(*entries: Sequence[TrialRecord]) -> dict[str, Robustness]:
    return {row.label: row for row in results(*entries).corrupted()}


class TestNumbers:
    def test_means_over_severities_corruptions_and_seeds(self) -> None:
        row = measured(robust_entry(0, "full", fog=30.0, snow=50.0, clean=9.0))["full"]
        assert row.mce.mean == pytest.approx(41.0)
        assert {name: score.mean for name, score in row.errors.items()} == pytest.approx({"snow": 51.0, "fog": 31.0})
        assert row.grid["fog"] == pytest.approx([29.0, 30.0, 31.0, 32.0, 33.0])
        assert row.clean == 9.0
        assert row.group("weather") == pytest.approx(41.0)
        assert math.isnan(row.group("noise"))

    def test_against_the_linear_probe(self) -> None:
        rows = measured(
            robust_entry(0, "full", fog=30.0, snow=50.0, clean=10.0, seeds=1),
            robust_entry(1, "linear_probe", fog=40.0, snow=80.0, clean=20.0, seeds=1),
        )
        # Relative: (30 − 10) / (40 − 20) and (50 − 10) / (80 − 20); over the probe: 30 / 40 and 50 / 80.
        assert rows["full"].relative_mce == pytest.approx(100 * (20 / 20 + 40 / 60) / 2)
        assert rows["full"].normalised_mce == pytest.approx(100 * (30 / 40 + 50 / 80) / 2)
        assert rows["linear_probe"].relative_mce == pytest.approx(100.0)
        assert rows["linear_probe"].normalised_mce == pytest.approx(100.0)
        assert list(rows) == ["full", "linear_probe"]

    def test_a_probe_that_corruption_does_not_hurt_is_no_baseline(self) -> None:
        rows = measured(
            robust_entry(0, "full", fog=30.0, snow=50.0, clean=10.0, seeds=1),
            robust_entry(1, "linear_probe", fog=20.0, snow=80.0, clean=20.0, seeds=1),
        )
        assert math.isnan(rows["full"].relative_mce)
        assert rows["full"].normalised_mce == pytest.approx(100 * (30 / 20 + 50 / 80) / 2)

    def test_without_a_probe_there_is_nothing_to_compare_with(self) -> None:
        row = measured(robust_entry(0, "full", fog=30.0, snow=50.0, clean=9.0))["full"]
        assert math.isnan(row.relative_mce)
        assert math.isnan(row.normalised_mce)


class TestIntervals:
    def test_over_pictures_and_seeds_where_the_pictures_errors_are_kept(self) -> None:
        score = measured(robust_entry(0, "full", fog=30.0, snow=50.0, clean=9.0))["full"].mce
        assert (score.basis, score.seeds, score.samples) == ("samples and seeds", 3, PICTURES)
        assert score.low < 41.0 < score.high

    def test_over_pictures_for_one_seed(self) -> None:
        score = measured(robust_entry(0, "full", fog=30.0, snow=50.0, clean=9.0, seeds=1))["full"].mce
        # Student's t with 39 degrees of freedom times the standard error of values ± 10.
        assert score.basis == "samples"
        assert score.half == pytest.approx(
            2.0227 * 10 * math.sqrt(PICTURES / (PICTURES - 1)) / math.sqrt(PICTURES), rel=1e-3
        )

    def test_over_seeds_alone_without_them(self) -> None:
        score = measured(robust_entry(0, "full", fog=30.0, snow=50.0, clean=9.0, samples=False))["full"].mce
        assert score.basis == "seeds"
        assert score.half == pytest.approx(2.4842, rel=1e-3)


class TestShown:
    ENTRIES = (
        robust_entry(0, "full", fog=30.0, snow=50.0, clean=10.0),
        robust_entry(1, "linear_probe", fog=40.0, snow=80.0, clean=20.0),
    )

    def test_the_leaderboard_has_a_column(self) -> None:
        table = results(*self.ENTRIES).leaderboard().set_index("label")
        assert table.loc["full", "robust/mce"] == pytest.approx(41.0)
        assert table.loc["full", "robust/mce/interval"] == "samples and seeds"
        assert table.loc["linear_probe", "robust/mce_over_probe"] == pytest.approx(100.0)
        markdown = results(*self.ENTRIES).markdown()
        assert "| mCE |" in markdown
        assert "## Robustness to corruptions" in markdown

    def test_a_study_without_corruptions_has_none(self) -> None:
        plain = results(FULL)
        assert "robust/mce" not in plain.leaderboard()
        assert plain.robustness().empty
        assert "mCE" not in plain.markdown()
        with pytest.raises(ValueError, match=r"The figure needs a confirmed configuration with `evaluate.corruptions`"):
            plain.plot.robustness()

    def test_an_entry_without_them_has_no_number(self) -> None:
        mixed = results(*self.ENTRIES, entry(2, "lora", (0.7, 0.7, 0.7)))
        table = mixed.leaderboard().set_index("label")
        assert math.isnan(table.loc["lora", "robust/mce"])
        assert list(mixed.robustness()["label"]) == ["full", "linear_probe"]

    def test_json_has_every_severity(self) -> None:
        values = json.loads(json.dumps(results(*self.ENTRIES).to_dict()))["robustness"]
        assert [row["label"] for row in values] == ["full", "linear_probe"]
        assert values[0]["corruptions"]["fog"]["severities"] == pytest.approx([29.0, 30.0, 31.0, 32.0, 33.0])
        assert values[0]["robust/mce"]["mean"] == pytest.approx(41.0)

    def test_the_figure_has_a_panel_per_entry_with_every_number(self) -> None:
        figure = results(*self.ENTRIES).plot.robustness()
        assert [axes.get_title(loc="left") for axes in figure.axes] == ["full: mCE 41.0", "linear_probe: mCE 61.0"]
        assert [text.get_text() for text in figure.axes[0].texts][5:] == ["29", "30", "31", "32", "33"]

    def test_the_studys_run_has_them(self) -> None:
        records = [record for records in self.ENTRIES for record in records]
        summary = Summarizer().study({"study": "pets", "spec": {}}, records, {})
        assert summary.metrics["robust/mce"] == pytest.approx(41.0)
        assert b"robust/fog/ce" in summary.files["robustness.csv"]()  # type: ignore[operator]


@pytest.mark.thorough
def test_a_study_from_its_file_to_its_report(network: Callable[[str], str], tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    hparams = {"lr_backbone": 0.01, "lr_head": 1.0}
    study = reported_study(
        tmp_path / "studies",
        {"root": str(images), "id": ["bright", "dim"], "ood": ["inverted"]},
        network("cnn"),
        trials=(
            {"strategy": "full", "hparams": hparams, "seed": 1},
            {"strategy": "full", "hparams": hparams, "seed": 2, "role": "confirm"},
            {"strategy": "full", "hparams": hparams, "seed": 3, "role": "confirm"},
            {"strategy": "linear_probe", "seed": 4},
            {"strategy": "linear_probe", "seed": 5, "role": "confirm"},
        ),
        evaluate={"corruptions": ["contrast", "fog"], "images": 12},
    )
    outcome = study.results()
    by_role = {record.role: record for record in outcome.records}
    assert "robust/mce" in by_role["confirm"].metrics
    assert "robust/mce" not in by_role["search"].metrics
    table = outcome.robustness().set_index("label")
    runs = [record for record in outcome.records if record.role == "confirm" and record.label == "full"]
    assert table.loc["full", "robust/mce"] == pytest.approx(sum(run.metrics["robust/mce"] for run in runs) / 2)
    assert outcome.corrupted()[0].mce.samples == 12
    page = report_html(Journal.read(study.folder / "journal.jsonl"), study.folder)
    assert "Robustness to corruptions" in page
    assert "Error by corruption and severity" in page
