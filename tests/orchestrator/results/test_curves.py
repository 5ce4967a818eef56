"""Curves become artifacts of their run: numbers always, a picture where one can be drawn, nothing twice."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from orchestrator.record.journal import Journal
from orchestrator.record.records import TrialRecord
from orchestrator.results import curve_plot
from orchestrator.results.curve_plot import draw, figure_of, without_shared_path
from orchestrator.results.curves import chosen_at, curve_texts, pictures, stem
from orchestrator.tracking.follower import MlflowFollower
from tests.support.tracking import follower

LAMBDA: dict[str, Any] = {
    "columns": {
        "lambda": [0.0, 1.0, 2.0],
        "val/acc": [0.5, 0.9, 0.7],
        "val/nll": [1.0, 0.2, 0.5],
        "test/acc": [0.4, 0.8, None],
        "ood/noisy/acc": [0.1, 0.2, 0.3],
    },
    "note": "λ is chosen on val/acc.",
}
SHIFT = {
    "columns": {"layer": ["blocks.0.norm1", "blocks.1.norm1"], "gamma": [0.5, 0.25], "beta": [0.1, 0.2]},
    "note": "",
}


def trial(**fields: Any) -> TrialRecord:
    return TrialRecord(**{"trial_id": "t", "number": 0, "strategy": "layernorm", "label": "ln", **fields})


class TestArtifacts:
    def test_the_numbers_are_json_with_the_chosen_point(self) -> None:
        texts = curve_texts({"lambda": LAMBDA}, trial(metrics={"layernorm/lambda": 1.5}))
        assert list(texts) == ["curves/lambda.json"]
        assert json.loads(texts["curves/lambda.json"]) == {**LAMBDA, "chosen": 1.5}

    def test_a_curve_without_a_choice_has_none(self) -> None:
        assert "chosen" not in json.loads(curve_texts({"ln_shift": SHIFT}, trial())["curves/ln_shift.json"])
        (picture,) = pictures({"ln_shift": SHIFT}).values()
        assert picture.chosen is None

    def test_the_chosen_points_of_lambda_and_alpha(self) -> None:
        record = trial(metrics={"layernorm/lambda": 1.5, "wise/alpha": 0.7})
        assert (chosen_at(record, "lambda"), chosen_at(record, "wise"), chosen_at(record, "cka")) == (1.5, 0.7, None)
        cyclic = trial(metrics={"layernorm/lambda": 1.5}, hparams={"cycles": 2})
        assert chosen_at(cyclic, "lambda") == 1.0

    def test_a_row_per_tensor_is_kept_as_numbers_only(self) -> None:
        assert list(curve_texts({"change": SHIFT})) == ["curves/change.json"]
        assert pictures({"change": SHIFT}) == {}

    def test_names_fit_every_store(self) -> None:
        assert stem("../a b/ä") == "curves/_a_b_"
        assert stem("") == "curves/_"


class TestPictures:
    def test_a_sweep_has_a_panel_per_unit_and_accuracies_in_per_cent(self) -> None:
        figure = figure_of("lambda", LAMBDA, chosen=1.0)
        accuracy, likelihood = figure.axes
        assert accuracy.get_ylabel() == "accuracy (%)"
        assert likelihood.get_ylabel() == "negative log-likelihood (nats)"
        assert likelihood.get_xlabel() == "λ"
        lines = {line.get_label(): line for line in accuracy.get_lines()}
        assert list(lines["val"].get_ydata()) == [50.0, 90.0, 70.0]  # type: ignore[arg-type]
        assert {"test", "ood/noisy"} <= set(lines)
        assert [line.get_xdata() for line in likelihood.get_lines()][-1] == [1.0, 1.0]
        assert accuracy.get_title(loc="right") == "λ = 1 chosen"

    def test_beside_accuracy_only_id_is_drawn(self) -> None:
        columns = {"alpha": [0.0, 1.0], "test/acc": [0.1, 0.2], "test/nll": [1.0, 2.0], "ood/noisy/nll": [3.0, 4.0]}
        _, likelihood = figure_of("wise", {"columns": columns, "note": ""}).axes
        assert [list(line.get_ydata()) for line in likelihood.get_lines()] == [[1.0, 2.0]]  # type: ignore[arg-type]

    def test_single_measurements_beside_a_fit_are_dots(self) -> None:
        columns = {"images": [1, 2, 3, 4, 5], "shift": [None, 1.0, None, None, 2.0], "fit": [0.5, 1.0, 1.5, 1.8, 2.0]}
        (axes,) = figure_of("fsr", {"columns": columns, "note": ""}).axes
        assert [line.get_linestyle() for line in axes.get_lines()] == ["None", "-"]
        assert axes.get_xlabel() == "training images"

    def test_names_are_the_axis_of_layers(self) -> None:
        (axes,) = figure_of("ln_shift", SHIFT).axes
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0.norm1", "1.norm1"]
        assert axes.get_ylabel() == "shift (L2 norm)"
        assert [line.get_label() for line in axes.get_lines()] == ["γ", "β"]

    def test_of_many_names_a_readable_number_is_written(self) -> None:
        many = {"layer": [f"l{i}" for i in range(150)], "gamma": [0.1] * 150}
        (axes,) = figure_of("ln_shift", {"columns": many, "note": ""}).axes
        assert [label.get_text() for label in axes.get_xticklabels()] == [f"l{i}" for i in range(0, 150, 5)]

    def test_quantiles_are_boxes(self) -> None:
        columns = {"component": ["mha", "fc1"], **{q: [1.0, 2.0] for q in curve_plot.BOX}}
        (axes,) = figure_of("plasticity_distribution", {"columns": columns, "note": ""}).axes
        assert len(axes.patches) == 2
        assert axes.get_ylabel() == "rate of change P"

    def test_rows_of_one_kind_share_a_colour_and_flags_are_not_drawn(self) -> None:
        columns = {"tensor": list("abc"), "kind": ["norm", "mlp", "norm"], "change": [1, 2, 3], "absolute": [0, 0, 1]}
        (axes,) = figure_of("change", {"columns": columns, "note": ""}).axes
        drawn = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}  # type: ignore[arg-type]
        assert drawn == {"norm": [0.0, 2.0], "mlp": [1.0]}

    def test_the_file_is_a_picture_and_the_same_every_time(self) -> None:
        content = draw("lambda", LAMBDA, 1.0)
        assert draw("lambda", LAMBDA, 1.0) == content
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "PNG"
            assert image.width > 500

    def test_nothing_to_draw_is_an_error(self) -> None:
        with pytest.raises(ValueError) as error:
            draw("x", {"columns": {"layer": ["a"], "value": [None]}, "note": ""})
        assert str(error.value) == (
            "A curve needs a column of numbers beside its x axis 'layer', but got ['layer', 'value']."
        )

    @pytest.mark.parametrize(
        ("names", "short"),
        [
            (["a.b.x", "a.b.y"], ["x", "y"]),
            (["a.b", "a.b.c"], ["b", "b.c"]),
            (["one", "two"], ["one", "two"]),
            (["only.one"], ["one"]),
        ],
    )
    def test_shared_paths_are_left_out(self, names: list[str], short: list[str]) -> None:
        assert without_shared_path(names) == short

    def test_matplotlib_keeps_its_settings(self) -> None:
        program = (
            "import matplotlib\nbefore = dict(matplotlib.rcParams)\n"
            "from orchestrator.results.curve_plot import draw\n"
            "draw('x', {'columns': {'x': [1, 2], 'y': [1, 2]}, 'note': ''})\n"
            "print(dict(matplotlib.rcParams) == before)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "True"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow database that the tests of this file share; each has an experiment of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.jsonl") as opened:
        yield opened


@pytest.fixture
def follow(server: str, journal: Journal, tmp_path: Path) -> Callable[[], MlflowFollower]:
    """Makes a follower of the test's journal."""

    def make() -> MlflowFollower:
        artifacts = (tmp_path / "artifacts").as_uri()
        return follower(journal.path, server, experiment=str(tmp_path), artifact_location=artifacts, all_pictures=True)

    return make


def write_trial(journal: Journal, curves: dict[str, Any]) -> None:
    journal.append("study_started", study="pets", spec={})
    fields = {"trial_id": "t0", "number": 0, "strategy": "layernorm", "label": "ln", "seed": 1, "role": "search"}
    journal.append("trial_suggested", **fields, hparams={}, held_out=None, config_hash="h", search_values={})
    journal.append("trial_started", trial_id="t0")
    journal.append("result", trial_id="t0", unit=1, metrics={"val/acc": 0.5})
    metrics = {"val/acc": 0.75, "layernorm/lambda": 1.0}
    journal.append("result", trial_id="t0", unit=2, metrics=metrics, curves=curves)
    journal.append("trial_finished", trial_id="t0", state="complete")


def artifacts(tmp_path: Path) -> dict[str, bytes]:
    """Contents of the curve files of all runs, by name."""
    return {file.name: file.read_bytes() for file in tmp_path.glob("artifacts/*/artifacts/curves/*")}


def test_a_trials_curves_are_artifacts_of_its_run(
    journal: Journal, follow: Callable[[], MlflowFollower], tmp_path: Path
) -> None:
    write_trial(journal, {"lambda": LAMBDA, "ln_shift": SHIFT})
    assert follow().finish(60) == 0
    uploaded = artifacts(tmp_path)
    assert sorted(uploaded) == ["lambda.json", "lambda.png", "ln_shift.json", "ln_shift.png"]
    assert json.loads(uploaded["lambda.json"]) == {**LAMBDA, "chosen": 1.0}
    assert uploaded["lambda.png"] == draw("lambda", LAMBDA, 1.0)

    Path(f"{journal.path}.mlflow.json").unlink()  # delivered again from the start
    assert follow().finish(60) == 0
    assert artifacts(tmp_path) == uploaded


def test_a_picture_that_cannot_be_drawn_holds_nothing_back(
    journal: Journal, follow: Callable[[], MlflowFollower], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_trial(journal, {"odd": {"columns": {"layer": ["a"], "value": [None]}, "note": ""}, "lambda": LAMBDA})
    with caplog.at_level(logging.WARNING):
        assert follow().finish(60) == 0
    assert sorted(artifacts(tmp_path)) == ["lambda.json", "lambda.png", "odd.json"]
    assert "The artifact 'curves/odd.png' is left out (ValueError: A curve needs a column of numbers" in caplog.text


def test_an_artifact_store_that_is_down_holds_back_no_number(
    journal: Journal,
    follow: Callable[[], MlflowFollower],
    tmp_path: Path,
    server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow import MlflowClient

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no artifact store")

    write_trial(journal, {"lambda": LAMBDA})
    with monkeypatch.context() as broken:
        for name in ("log_artifact", "log_artifacts"):
            broken.setattr(MlflowClient, name, refuse)
        assert follow().finish(0.5) > 0
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name(str(tmp_path))
    (run,) = client.search_runs([experiment.experiment_id], "tags.`luthier.kind` = 'trial'")
    assert (run.info.status, run.data.metrics["layernorm/lambda"]) == ("FINISHED", 1.0)
    assert artifacts(tmp_path) == {}
    assert follow().finish(60) == 0
    assert sorted(artifacts(tmp_path)) == ["lambda.json", "lambda.png"]


def test_what_was_measured_of_the_study_is_on_its_own_run(
    journal: Journal, follow: Callable[[], MlflowFollower], tmp_path: Path, server: str
) -> None:
    from mlflow import MlflowClient

    journal.append("study_started", study="pets", spec={})
    curve = {"columns": {"block": ["blocks.0", "blocks.1"], "mha": [1.5, 2.5]}, "note": "P"}
    metrics = {"plasticity/mha": 2.0, "plasticity/fc1": float("nan"), "pid": 3}
    journal.append("measured", what="plasticity", metrics=metrics, curves={"plasticity": curve})
    for _ in range(2):
        Path(f"{journal.path}.mlflow.json").unlink(missing_ok=True)
        assert follow().finish(60) == 0
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name(str(tmp_path))
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics == {"plasticity/mha": 2.0}
    assert len(client.get_metric_history(run.info.run_id, "plasticity/mha")) == 1
    assert run.data.tags["status"] == "running"
    assert sorted(artifacts(tmp_path)) == ["plasticity.json", "plasticity.png"]


def test_drawing_is_loaded_when_something_is_drawn() -> None:
    modules = "orchestrator.tracking.follower, orchestrator.results.study_results, orchestrator.results.summary"
    program = f"import sys, {modules}\nprint('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
