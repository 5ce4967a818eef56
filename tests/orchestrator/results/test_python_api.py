"""Results in Python and in notebooks: models, predictions, figures, and how they show themselves."""

from __future__ import annotations

import doctest
import json
import logging
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import numpy as np
import pyarrow as pa
import pytest
import torch
from matplotlib.figure import Figure

from luthier import Model, Results, Study
from orchestrator.record.kept_paths import predictions_file, weights_folder
from orchestrator.record.records import TrialRecord
from orchestrator.results.predictions import PredictionsError
from tests.support.exports import confirmed_study
from tests.support.predictions import correctness, write_predictions
from tests.support.records import FULL, PROBE, shift_ratio
from tests.support.source_tree import ROOT
from trainables.engine.tuned_network import tuned_network
from trainables.storage.kept_weights import WeightsError, load_weights

HOSTILE = '<img src=x onerror="alert(1)">'
SPLITS = {"val": correctness(4), "test": correctness(10, (0, 1)), "ood/sketch": correctness(5, (2,))}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return confirmed_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Two entries of three confirmed seeds, of which `full` (trials 1, 2 and 3) has predictions."""
    for record in FULL:
        if record.role == "confirm":
            write_predictions(tmp_path, record.number, SPLITS)
    return Results([*FULL, *PROBE, *shift_ratio(0.5, 0.6, 0.7)], {"name": "pets"}, folder=tmp_path)


@pytest.mark.usefixtures("cpu_only")
class TestModel:
    def test_the_model_of_the_choice_is_the_confirmed_run_s_network(self, study: Study) -> None:
        best = study.results().best(label="full")
        assert (best.record.number, best.run.number) == (0, 1)
        model = best.model()
        assert isinstance(model, Model)
        kept = load_weights(weights_folder(study.folder, 1))
        images = torch.randn(3, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(model(images), tuned_network(kept)(images))
        assert model.classes == ("1", "2", "10", "11")
        assert repr(model) == "<Model of 4 classes (1, 2, 10 and 11), 32 px, on cpu>"

    def test_it_computes_the_recorded_accuracy_on_the_pixels_of_the_store(self, study: Study) -> None:
        best = study.results().best(label="linear_probe")
        store = study.prepare()
        predicted = best.model("cpu").logits(np.asarray(store.images("test"))).argmax(1)
        assert float((predicted == store.labels("test")).mean()) == best.run.metrics["test/acc"]

    def test_weights_that_are_not_kept(self, study: Study) -> None:
        folder = weights_folder(study.folder, 2)
        hidden = folder.with_name("hidden")
        folder.rename(hidden)
        try:
            with pytest.raises(WeightsError, match=r"but trial 2 \(linear_probe, search\) has none in .*`keep: all`"):
                study.results().best(label="linear_probe").model()
        finally:
            hidden.rename(folder)

    def test_results_without_a_folder_have_no_model(self) -> None:
        with pytest.raises(WeightsError, match="the folder is not known here"):
            Results(FULL).best().model()


@pytest.mark.usefixtures("cpu_only")
def test_the_examples_of_the_page(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the study at studies/pets and its pictures in pictures."""
    monkeypatch.chdir(study.folder.parent.parent)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testfile(str(ROOT / "docs/python.md"), module_relative=False, optionflags=flags)
    assert (failed, attempted > 10) == (0, True)


class TestPredictions:
    def test_the_rows_of_a_trained_study_give_the_recorded_accuracy(self, study: Study) -> None:
        results = study.results()
        table = results.predictions("full", "test")
        assert table["trial"].unique().tolist() == [1]
        recorded = next(record for record in results.records if record.number == 1).metrics["test/acc"]
        assert float((table["target"] == table["predicted"]).mean()) == recorded
        assert table["name"].tolist() == study.prepare().names("test")

    def test_a_row_per_seed_and_sample(self, results: Results) -> None:
        table = results.predictions("full", "ood/sketch")
        columns = ["trial", "seed", "role", "name", "target", "target_label", "predicted", "predicted_label"]
        assert list(table.columns) == [*columns, "confidence", "a", "b"]
        assert len(table) == 15
        assert table["trial"].tolist() == [1] * 5 + [2] * 5 + [3] * 5
        assert table["seed"].unique().tolist() == [0, 1, 2]
        assert set(table["role"]) == {"confirm"}
        wrong = table[table["target"] != table["predicted"]]
        assert wrong["name"].tolist() == ["ood/sketch-2.png"] * 3
        assert wrong["predicted_label"].tolist() == ["b"] * 3
        assert (table["a"] + table["b"]).to_numpy() == pytest.approx(np.ones(15))
        # Logits of the file are (1, 0): softmax 1 / (1 + e^-1).
        assert table["confidence"].to_numpy() == pytest.approx(np.full(15, 0.7310585786))

    def test_the_test_split_is_the_default(self, results: Results) -> None:
        assert len(results.predictions("full")) == 30

    def test_the_search_trial_stands_in_where_nothing_was_confirmed(self, tmp_path: Path) -> None:
        write_predictions(tmp_path, FULL[0].number, SPLITS)
        table = Results(FULL[:1], {"name": "pets"}, folder=tmp_path).predictions("full", "val")
        assert table["role"].tolist() == ["search"] * 4

    def test_an_unknown_entry_or_split_is_answered_by_what_there_is(self, results: Results) -> None:
        with pytest.raises(ValueError, match=r"is one of full, linear_probe, but got 'ful'\. Did you mean 'full'\?"):
            results.predictions("ful")
        with pytest.raises(ValueError, match=r"one of val, test, ood/sketch, but got 'sketch'\. Did you mean 'ood/ske"):
            results.predictions("full", "sketch")

    def test_nothing_kept_is_answered_by_what_there_is(self, results: Results) -> None:
        text = (
            r"of trial 101, 102 and 103 none are kept in .*predictions\. There are predictions of full "
            r"\(trial 1, 2 and 3\)\. `keep: all` or `confirm` in the study file keeps more\."
        )
        with pytest.raises(PredictionsError, match=text):
            results.predictions("linear_probe")
        with pytest.raises(PredictionsError, match="the study's folder is not known"):
            Results(FULL).predictions("full")

    def test_a_seed_without_predictions_is_left_out_with_a_warning(
        self, results: Results, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert results.folder is not None
        predictions_file(results.folder, 2).unlink()
        with caplog.at_level(logging.WARNING, "luthier"):
            table = results.predictions("full")
        assert table["trial"].unique().tolist() == [1, 3]
        assert "No predictions are kept of trials 2 of full: they are left out." in caplog.text

    def test_classes_that_are_named_like_columns(self, results: Results) -> None:
        assert results.folder is not None
        path = predictions_file(results.folder, 1)
        table = pa.ipc.open_file(path.read_bytes()).read_all()
        table = table.replace_schema_metadata({"classes": json.dumps(["name", "trial"])})
        for number in (1, 2, 3):
            changed = predictions_file(results.folder, number)
            with pa.OSFile(str(changed), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        columns = list(results.predictions("full").columns)
        assert (columns[0], columns[3], columns[-2:]) == ("trial_", "name_", ["name", "trial"])

    def test_a_file_that_does_not_name_its_classes(self, results: Results) -> None:
        assert results.folder is not None
        path = predictions_file(results.folder, 1)
        table = pa.ipc.open_file(path.read_bytes()).read_all()
        for classes, problem in (("[]", "it names 0"), ("{", "does not"), ("3", "does not")):
            changed = table.replace_schema_metadata({"classes": classes})
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, changed.schema) as writer:
                writer.write_table(changed)
            with pytest.raises(PredictionsError, match=problem):
                results.predictions("full")


class TestPlots:
    def test_every_figure_is_drawn_without_pyplot(self, results: Results) -> None:
        plot = results.plot
        for figure in (
            plot.leaderboard(), plot.id_and_ood(), plot.fsr(), plot.reliability("full"), plot.confusion("full"),
        ):  # fmt: skip
            assert isinstance(figure, Figure)
            assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
        assert matplotlib.pyplot.get_fignums() == []

    def test_the_leaderboard_shows_the_means(self, results: Results) -> None:
        figure = results.plot.leaderboard()
        axes = figure.axes[0]
        points = [container.lines[0].get_xdata()[0] for container in axes.containers]  # type: ignore[attr-defined]
        assert points == pytest.approx([97.0, 90.0])
        assert [label.get_text() for label in axes.get_yticklabels()] == ["full", "linear_probe"]
        assert axes.get_xlabel() == "ID test accuracy (%)"

    def test_the_confusion_matrix_sums_over_the_seeds(self, results: Results) -> None:
        figure = results.plot.confusion("full", "test")
        axes = figure.axes[0]
        assert axes.images[0].get_array().tolist() == [[0.8, 0.2], [0.0, 0.0]]  # type: ignore[union-attr]
        assert [text.get_text() for text in axes.texts] == ["24", "6"]
        assert axes.get_title("left") == "full: test, 3 runs"

    def test_reliability_is_the_share_of_right_predictions_of_a_confidence(self, results: Results) -> None:
        figure = results.plot.reliability("full", "test")
        line = figure.axes[0].lines[1]
        assert line.get_xydata().tolist() == [[pytest.approx(73.10586), pytest.approx(80)]]  # type: ignore[union-attr]
        assert figure.axes[0].get_title("left") == "full: test, 3 runs"
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["as trained"]

    def test_curves_of_the_chosen_configuration_and_of_the_study(self) -> None:
        curve = {"columns": {"lambda": [0.0, 1.0, 2.0], "val/acc": [0.5, 0.9, 0.7]}, "note": ""}
        record = _trial(0, "layernorm", curves={"lambda": curve}, metrics={"layernorm/lambda": 1.0})
        measured = {"fsr": {"curves": {"fsr": {"columns": {"images": [1.0, 2.0], "fit": [0.5, 0.6]}, "note": ""}}}}
        plot = Results([record], {"name": "pets"}, measurements=measured).plot
        axes = plot.curve("lambda", "layernorm").axes[0]
        assert axes.lines[0].get_ydata().tolist() == pytest.approx([50.0, 90.0, 70.0])  # type: ignore[union-attr]
        assert axes.get_title("right") == "λ = 1 chosen"
        assert plot.curve("fsr").axes[0].get_xlabel() == "training images"
        with pytest.raises(ValueError, match=r"A curve of layernorm is one of lambda, but got 'wise'\."):
            plot.curve("wise", "layernorm")
        with pytest.raises(ValueError, match=r"A curve of this study is one of fsr, but got 'cka'\."):
            plot.curve("cka")
        with pytest.raises(ValueError, match=r"is one of layernorm, but got 'layer_norm'\. Did you mean 'layernorm'\?"):
            plot.curve("lambda", "layer_norm")

    def test_training_and_learning_rates(self) -> None:
        history = tuple({"unit": float(unit), "val/acc": 0.5 + unit / 10} for unit in (1, 2))
        records = [
            _trial(number, "full", history=history, hparams={"lr_backbone": rate}, config_hash=str(number))
            for number, rate in enumerate((0.01, 0.1))
        ]
        plot = Results(records, {"name": "pets"}).plot
        assert plot.training().axes[0].lines[0].get_ydata() == pytest.approx([60.0, 70.0])
        assert plot.learning_rates().axes[0].get_xlabel() == "backbone learning rate"

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("id_and_ood", "two entries with test/acc and ood/mean/acc, but this study has fewer"),
            ("training", "a run of two units, but this study has none"),
            ("learning_rates", "an entry that tried two learning rates, but this study has none"),
            ("fsr", "but this study has no FSR"),
        ],
    )
    def test_a_figure_that_the_study_cannot_have(self, name: str, text: str) -> None:
        plot = Results([_trial(0, "full")], {"name": "pets"}).plot
        with pytest.raises(ValueError, match=text):
            getattr(plot, name)()

    def test_figures_need_a_complete_trial(self) -> None:
        with pytest.raises(ValueError, match="at least one complete search trial"):
            Results([], {"name": "pets"}).plot  # noqa: B018


class TestNotebook:
    def test_results_show_the_leaderboard_with_names_escaped(self) -> None:
        record = _trial(0, HOSTILE, strategy="full", hparams={"lr_head": 0.01, "note": "<b>"})
        shown = Results([record], {"name": HOSTILE})._repr_html_()
        assert "<img" not in shown
        assert "<b>" not in shown.replace("<p><b>", "")
        assert "<td>&lt;img src=x onerror=&quot;alert(1)&quot;&gt;</td>" in shown
        assert "<th>strategy</th>" in shown

    def test_results_without_a_complete_trial_show_why(self) -> None:
        shown = Results([_trial(0, "full", state="failed")], {"name": "pets"})._repr_html_()
        assert "Selection needs at least one complete search trial, but got 1 failed." in shown

    def test_the_choice_in_a_notebook(self) -> None:
        best = Results([_trial(0, HOSTILE, strategy="full", hparams={"lr_head": 0.01})], {"name": "pets"}).best()
        assert "<img" not in best._repr_html_()
        assert "<td>trial 0: lr_head=0.01</td>" in best._repr_html_()

    def test_texts(self) -> None:
        results = Results(FULL, {"name": "pets"})
        choice = "full, trial 0, best/val/acc 0.9, mean of 3 fresh seeds, -"
        assert repr(results.best()) == f"<BestConfiguration by id_val: {choice}>"
        assert repr(results) == f"<Results of 'pets': 4 trials (4 complete); best by id_val: {choice}>"
        assert repr(Results([], {"name": "pets"})) == "<Results of 'pets': no trials; no choice yet>"

    def test_the_choice_is_that_of_the_study_s_own_rule(self) -> None:
        records = [_trial(0, "full", test=0.5), _trial(1, "lora", test=0.9, val=0.8)]
        assert Results(records, {"name": "pets", "search": {"objective": "oracle"}}).best().record.label == "lora"
        assert Results(records, {"name": "pets"}).best().record.label == "full"


def _trial(number: int, label: str, val: float = 0.9, test: float = 0.8, **changes: Any) -> TrialRecord:
    metrics = {"best/val/acc": val, "test/acc": test} | changes.pop("metrics", {})
    fields: dict[str, Any] = {"strategy": label, "label": label, "state": "complete", "config_hash": f"h{number}"}
    return TrialRecord(trial_id=f"t{number}", number=number, metrics=metrics, **(fields | changes))
