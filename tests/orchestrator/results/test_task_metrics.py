"""Selection, tables, sentences, report and search for a task with a minimised metric of another name and unit."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
from rich.console import Console

from orchestrator.commands.status import Status
from orchestrator.record.records import TrialRecord, declared_metrics, metrics_of, validation_score
from orchestrator.report.page import page_of
from orchestrator.results import figures, selection
from orchestrator.results.comparison import Score
from orchestrator.results.curve_plot import figure_of
from orchestrator.results.findings import findings
from orchestrator.results.leaderboard import leaderboard, relative_gain
from orchestrator.results.study_results import Results
from orchestrator.running.progress import Progress
from orchestrator.search.sampling import maximised
from orchestrator.study_file.schema import StudySpec
from orchestrator.tracking.study_tracking import settings_of
from tests.support.driving import Config, drive, searcher, url
from tests.support.toy_task import ERROR, OVERLAP, TOY, toy_trial
from trainables.specs.metrics import TaskMetrics, register

SPEC = {"name": "boundaries", "task": "toy_boundaries"}
PROBE = toy_trial(0, "linear_probe", 4.0, 4.0)
FULL = toy_trial(1, "full", 2.0, 3.0)
LORA = toy_trial(2, "lora", 3.0, 1.0)
STUDY = [PROBE, FULL, LORA]


def text_of(results: Results, width: int = 160) -> str:
    stream = io.StringIO()
    results.render(Console(file=stream, width=width))
    return stream.getvalue()


class TestSelection:
    def test_the_smallest_error_is_chosen(self) -> None:
        ranked = selection.rank(STUDY, "id_val", TOY)
        assert [(choice.record.label, choice.value) for choice in ranked] == [
            ("full", 2.0), ("lora", 3.0), ("linear_probe", 4.0),
        ]  # fmt: skip
        assert ranked[0].criterion == "best/val/dist"

    def test_ties_go_to_the_larger_overlap(self) -> None:
        worse = toy_trial(0, "full", 2.0, 1.0)
        better = toy_trial(1, "lora", 2.0, 1.0)
        better = TrialRecord(**{**vars(better), "metrics": {**better.metrics, "val/overlap": 0.9}})
        assert selection.select([worse, better], metrics=TOY).record.label == "lora"

    def test_regret_is_not_negative_and_in_the_units_of_the_metric(self) -> None:
        regret = selection.regret(STUDY, metrics=TOY)
        assert (regret.chosen.record.label, regret.oracle.record.label) == ("full", "lora")
        assert (regret.criterion, regret.value) == ("ood/mean/dist", 2.0)

    def test_the_worst_domain_is_that_of_the_largest_error(self) -> None:
        record = toy_trial(0, "full", 1.0, 1.0)
        record = TrialRecord(**{**vars(record), "metrics": {**record.metrics, "ood/c/dist": 9.0}})
        (left,) = selection.without_validation_domain([record], "val_domain:c", TOY)
        assert (left.metrics["ood/mean/dist"], left.metrics["ood/worst/dist"]) == (2.0, 3.0)

    def test_folds_are_ranked_by_their_smallest_mean_error(self) -> None:
        folds = [
            toy_trial(10 + 2 * n + d, label, 1.0, 1.0, role="fold", config_hash=f"h{number}", held_out=domain,
                      metrics={"held_out/dist": error})
            for n, (number, label, error) in enumerate([(1, "full", 5.0), (2, "lora", 4.0)])
            for d, domain in enumerate("xy")
        ]  # fmt: skip
        best = selection.select([*STUDY, *folds], "leave_one_domain_out", metrics=TOY)
        assert (best.record.label, best.value) == ("lora", 4.0)


class TestTables:
    def test_the_leaderboard_has_the_names_of_the_task(self) -> None:
        table = leaderboard(STUDY, metrics=TOY)
        assert table["label"].to_list() == ["full", "lora", "linear_probe"]
        row = table.to_dict("records")[0]
        assert (row["val/dist"], row["test/dist"], row["ood/worst/dist"], row["test/overlap"]) == (2.0, 3.0, 5.0, 0.75)
        assert not [name for name in table.columns if "acc" in str(name) or "ece" in str(name)]

    def test_a_gain_is_positive_where_the_error_is_smaller(self) -> None:
        table = leaderboard(STUDY, metrics=TOY).set_index("label")
        assert table.loc["lora", "gain"] == pytest.approx(0.75)
        assert relative_gain(5.0, 4.0, ERROR) == -0.25

    def test_plain_numbers_are_not_shown_in_per_cent(self) -> None:
        text = text_of(Results(STUDY, SPEC))
        head = text.splitlines()[2]
        assert [word for word in ("val", "test", "OOD mean", "OOD worst", "IoU (%)") if word not in head] == []
        assert "3.000" in text
        assert "75.0" in text
        assert "per cent" not in text
        assert "gain = boundary distance relative to linear probing's" in text
        assert "Regret 2.000 of ood/mean/dist" in text

    def test_scores_and_differences_have_the_unit_of_their_metric(self) -> None:
        score = Score.symmetric(1.25, 0.5, seeds=3)
        assert (score.text(ERROR), score.difference(ERROR)) == ("1.250 ± 0.500", "+1.250 ± 0.500")
        assert Score(0.5).text(OVERLAP) == "50.0 %"


class TestSentences:
    def test_the_best_entry_has_the_smallest_error(self) -> None:
        first, second, gain, *_ = findings(STUDY, "id_val", metrics=TOY)
        assert first.startswith(
            "Best in distribution: lora (test 1.000, 1 seed), then full (3.000), with a difference of 2.000; one seed"
        )
        assert second.startswith("Best out of distribution: lora (OOD mean 2.000, 1 seed), then full (4.000)")
        assert "in distribution from full +25.0 %" in gain
        assert "to lora +75.0 %" in gain

    def test_progress_and_status_follow_the_smallest_error(self) -> None:
        progress = Progress(console=Console(file=io.StringIO()))
        progress.event({"kind": "study_started", "time": 0.0, "study": "s", "spec": SPEC})
        for record in STUDY:
            fields = {"trial_id": record.trial_id, "number": record.number, "strategy": record.strategy}
            progress.event({"kind": "trial_suggested", "time": 0.0, **fields})
            metrics = dict(record.metrics)
            progress.event({"kind": "result", "time": 0.0, "trial_id": record.trial_id, "unit": 1, "metrics": metrics})
        assert "best val 2.000 (full)" in progress.summary()
        status = Status("s", Path("j"), "running", STUDY, 0.0, 3, TOY)
        best = status.to_dict()["best"]
        assert (best["label"], best["val/dist"]) == ("full", 2.0)
        stream = io.StringIO()
        status.render(Console(file=stream, width=200))
        assert "trial 1 full, unit 2, val 2.000" in stream.getvalue()

    def test_a_trial_without_tested_weights_counts_with_its_last_unit(self) -> None:
        record = dataclasses.replace(toy_trial(0, "full", 1.0, 1.0, metrics={"val/dist": 7.0}), history=())
        assert validation_score(record, TOY) == 7.0

    def test_a_trial_that_has_not_ended_counts_with_its_best_unit(self) -> None:
        """Not with its last rung, at which `best/…` was reported."""
        units = ({"val/dist": 5.0, "best/val/dist": 5.0}, {"val/dist": 2.0}, {"val/dist": 3.0})
        history = tuple({"unit": float(unit), **values} for unit, values in enumerate(units, start=1))
        last = {"val/dist": 3.0, "best/val/dist": 5.0}
        record = TrialRecord(
            trial_id="t", number=0, strategy="full", label="full", state="running", history=history, metrics=last
        )
        assert validation_score(record, TOY) == 2.0
        assert Status("s", Path("j"), "running", [record], 0.0, 3, TOY).to_dict()["running"][0]["val/dist"] == 2.0
        ended = dataclasses.replace(record, history=(*history, {"unit": 4.0, **last}))
        assert validation_score(ended, TOY) == 5.0


class TestPictures:
    def test_axes_have_the_title_and_scale_of_the_metric(self) -> None:
        rows = leaderboard(STUDY, metrics=TOY).to_dict("records")
        figure = figures.id_and_ood(rows, figures.colours([row["label"] for row in rows]), TOY)
        assert figure is not None
        (axes,) = figure.axes
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("ID test boundary distance", "mean OOD boundary distance")
        curve = {"columns": {"lambda": [0.0, 1.0], "val/dist": [2.0, 3.0], "val/overlap": [0.5, 0.6]}, "note": ""}
        error, share = figure_of("lambda", curve, metrics=TOY).axes
        assert (error.get_ylabel(), share.get_ylabel()) == ("boundary distance", "overlap (%)")
        assert list(error.get_lines()[0].get_ydata()) == [2.0, 3.0]  # type: ignore[arg-type]
        assert list(share.get_lines()[0].get_ydata()) == [50.0, 60.0]  # type: ignore[arg-type]

    def test_the_report_names_no_other_metric(self) -> None:
        header: dict[str, Any] = {"study": "boundaries", "spec": SPEC, "state": "complete", "first_started": 0.0}
        page = page_of(header, STUDY, {})
        assert "IoU (%)" in page
        assert "3.000" in page
        assert "accuracy" not in page
        assert "Per cent" not in page


class TestSearch:
    def test_directions_come_from_the_table(self) -> None:
        assert not maximised("val/dist", TOY)
        assert maximised("val/overlap", TOY)
        assert not maximised("cost/total_seconds", TOY)
        with pytest.raises(
            ValueError, match=r"never looks at test data, but got the metric 'test/dist'\. Use val/dist"
        ):
            maximised("test/dist", TOY)

    def test_the_search_minimises(self, tmp_path: Path) -> None:
        def outcome(config: Config) -> dict[str, Any]:
            return {"val/dist": 2.0, "best/val/dist": 1.0 + config["_number"], "unit": 4, "finished": True}

        search = searcher(tmp_path, ("full",), metrics=TOY, trials=3)
        drive(search, outcome)
        study = optuna.load_study(study_name="s", storage=url(tmp_path))
        assert study.directions == [optuna.study.StudyDirection.MINIMIZE]
        assert study.best_value == 1.0
        assert search.metric == "val/dist"

    def test_its_metrics_are_recorded(self) -> None:
        assert declared_metrics({"val/dist": 1, "pid": 3}) == {"val/dist": 1.0}
        assert metrics_of(SPEC) is TOY
        with pytest.raises(ValueError, match=r"^A task is one of .*, but got 'depth'\.$"):
            metrics_of({"task": "depth"})


class TestAnotherMetricOfClassification:
    """`search.metric` chooses what selects; accuracy stays in the leaderboard."""

    SPEC: ClassVar[dict[str, Any]] = {"name": "pets", "search": {"metric": "balanced_acc"}}

    def trial(self, number: int, label: str, balanced: float, accuracy: float) -> TrialRecord:
        metrics = {
            "val/balanced_acc": balanced,
            "best/val/balanced_acc": balanced,
            "val/nll": 0.5,
            "test/balanced_acc": balanced,
            "test/acc": accuracy,
            "ood/a/balanced_acc": balanced,
            "ood/mean/balanced_acc": balanced,
            "ood/worst/balanced_acc": balanced,
            "calib/ece": 0.1,
        }
        return toy_trial(number, label, 0.0, 0.0, metrics=metrics)

    def test_choice_regret_and_leaderboard_follow_it(self) -> None:
        records = [self.trial(0, "full", 0.5, 0.95), self.trial(1, "lora", 0.75, 0.7)]
        results = Results(records, self.SPEC)
        best = results.best()
        assert (best.record.label, best.criterion, best.value) == ("lora", "best/val/balanced_acc", 0.75)
        assert results.regret().criterion == "ood/mean/balanced_acc"
        table = results.leaderboard().set_index("label")
        assert table.index.to_list() == ["lora", "full"]
        assert table.loc["lora", "test/balanced_acc"] == 0.75
        assert table.loc["full", "test/acc"] == 0.95
        head = text_of(results).splitlines()[2]
        assert [title for title in ("val", "OOD worst", "accuracy", "ECE") if title not in head] == []

    def test_every_rule_knows_it(self) -> None:
        records = [self.trial(0, "full", 0.5, 0.95), self.trial(1, "lora", 0.75, 0.7)]
        metrics = metrics_of(self.SPEC)
        for rule in ("id_val", "oracle", "val_domain:a"):
            assert selection.rank(records, rule, metrics)[0].record.label == "lora"
        folds = [
            toy_trial(10 + 2 * number + fold, label, 0, 0, role="fold", config_hash=f"h{number}", held_out=domain,
                      metrics={"held_out/balanced_acc": value})
            for number, (label, value) in enumerate([("full", 0.9), ("lora", 0.6)])
            for fold, domain in enumerate("xy")
        ]  # fmt: skip
        best = selection.select([*records, *folds], "leave_one_domain_out", metrics=metrics)
        assert (best.record.label, best.value) == ("full", 0.9)

    def test_test_data_never_steer_a_search(self) -> None:
        metrics = metrics_of(self.SPEC)
        assert maximised("val/balanced_acc", metrics)
        for name in ("id/photo/acc", "calib/ece_scaled", "test/auroc"):
            with pytest.raises(ValueError, match=rf"never looks at test data, but got the metric '{name}'"):
                maximised(name, metrics)

    def test_the_tracking_process_registers_the_table_of_the_task(self, tmp_path: Path) -> None:
        """Its process registers the row that it gets, which must be the one that it has."""
        fields = {"data": {"source": "digits"}, "model": {"name": "digits_vit"}, "strategies": ["full"]}
        spec = StudySpec.from_fields({**fields, **self.SPEC})
        sent = settings_of(spec, tmp_path / "journal.jsonl").task
        register(TaskMetrics.from_dict(json.loads(json.dumps(sent))))
        assert metrics_of(self.SPEC).selection.key == "balanced_acc"

    def test_new_names_are_recorded(self) -> None:
        found = {"id/photo/auroc": 0.5, "calib/temperature": 2.0, "test/top5": 1.0, "ood/a/ece_scaled": 0.1}
        assert declared_metrics({**found, "pid": 3}) == found
        assert [metrics_of(self.SPEC).named(name).key for name in found if "temperature" not in name] == [  # type: ignore[union-attr]
            "auroc", "top5", "ece_scaled",
        ]  # fmt: skip
