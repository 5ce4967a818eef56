"""`luthier fsr` on a whole study: what it runs, that it repeats nothing, and the λ that a later search begins with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.support.synthetic import write_images
from orchestrator import Study, cli
from orchestrator.commands.exit_status import OK, PREFLIGHT
from orchestrator.commands.fsr import FsrReport, measure_fsr
from orchestrator.errors import PreflightError
from orchestrator.record.journal import Journal
from orchestrator.record.records import measurements, study_header
from orchestrator.results.fsr import IMAGES, SHIFT, FsrEstimate, draw_of, estimates
from orchestrator.study_file.yaml_text import write_yaml

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from orchestrator.cluster.connection import connect

    with connect(cpus=2, dashboard=False):
        yield


@pytest.fixture(scope="module")
def make(network: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Study]:
    root = write_images(tmp_path_factory.mktemp("images"))
    storage = tmp_path_factory.mktemp("storage")

    def study(kind: str = "vit", fraction: float = 0.5, **changes: Any) -> Study:
        fields: dict[str, Any] = {
            "name": "shapes",
            "data": {
                "root": str(root),
                "id": ["bright", "dim"],
                "ood": ["inverted", "noisy"],
                "train_fraction": fraction,
            },
            "model": {"name": network(kind)},
            "strategies": [{"name": "layernorm", "fixed": {"lr_backbone": 0.1, "lr_head": 3.0, "cycles": 0}}],
            "search": {"trials": 3, "epochs": 2, "scheduler": "none", "seed": 3, "batch_size": 8},
            "confirm": {"top_k": 0, "seeds": 0},
            "diagnostics": {"fsr_seeds": 2, "plasticity": False},
            "resources": {"channels_last": False},
            "storage": str(storage),
        }
        return Study(**{**fields, **changes})

    return study


@pytest.fixture(scope="module")
def measured(make: Callable[..., Study]) -> tuple[Study, FsrReport]:
    study = make()
    return study, measure_fsr(study, progress=False)


def events(study: Study) -> list[dict[str, Any]]:
    return Journal.read(study.folder / "journal.jsonl")


def test_only_references_run_on_samples_of_the_right_size(measured: tuple[Study, FsrReport]) -> None:
    study, report = measured
    records = study.results().records
    assert {record.role for record in records} == {"reference"}
    assert all(record.state == "complete" for record in records)
    drawn = [draw_of(record.sample or "") for record in records]
    assert set(drawn) == {("0.25", 0), ("0.5", 0), ("1", 0), ("full", 0), ("0.25", 1), ("0.5", 1), ("1", 1)}
    sizes = {(sample, record.metric(IMAGES)) for (sample, _), record in zip(drawn, records, strict=True)}
    images = dict(sizes)
    assert len(sizes) == len(images), "every draw of a sample has the same size"
    assert images["full"] == 2 * (images["1"] or 0)
    assert images["1"] == pytest.approx(2 * (images["0.5"] or 0), abs=4)
    assert len(records) == 4 * 2
    assert {(r.hparams["lr_backbone"], r.hparams["lr_head"], r.hparams["lam"]) for r in records} == {(0.1, 3.0, 1.0)}
    assert [e.reference for e in report.estimates] == ["full", "extrapolated"]
    assert [e.n for e in report.estimates] == [f"n = 2 seeds, 2 training subsamples of {images['1']:.0f} images"] * 2
    by_seed = {(draw_of(r.sample or "")[0], r.seed): r.metric(SHIFT) for r in records}
    ratios = [(by_seed["1", s] or 0) / (by_seed["full", s] or 1) for s in {r.seed for r in records}]
    assert report.estimates[0].value == pytest.approx(sum(ratios) / 2)


def test_what_was_found_is_in_the_journal_for_the_record_of_the_study(measured: tuple[Study, FsrReport]) -> None:
    study, report = measured
    measurement = measurements(events(study))["fsr"]
    assert measurement["metrics"]["fsr/full"] == report.estimates[0].value
    columns = measurement["curves"]["fsr"]["columns"]
    assert list(columns) == ["images", "shift", "fit"]
    assert sum(value is not None for value in columns["shift"]) == 3


def test_a_second_call_trains_nothing_and_states_the_same(measured: tuple[Study, FsrReport]) -> None:
    study, report = measured
    before = len(study.results().records)
    again = measure_fsr(study, progress=False)
    assert len(study.results().records) == before
    assert again.to_dict() == report.to_dict()
    assert [event["what"] for event in events(study) if event["kind"] == "measured"] == ["fsr"]


def test_the_command(measured: tuple[Study, FsrReport], tmp_path: Path) -> None:
    study, report = measured
    file = tmp_path / "study.yaml"
    file.write_text(write_yaml(study.spec.model_dump(mode="json")))
    as_json = CliRunner().invoke(cli.app, ["fsr", str(file), "--json", "--no-progress"])
    assert as_json.exit_code == OK
    assert json.loads(as_json.stdout) == json.loads(json.dumps(report.to_dict()))
    console = Console(width=100, record=True)
    report.render(console)
    text = console.export_text()
    assert "1 (the study's own)" in text
    assert all(estimate.sentence() in text for estimate in report.estimates)


def test_the_search_that_follows_begins_with_the_lambda_that_the_references_suggest(
    measured: tuple[Study, FsrReport], make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, report = measured
    monkeypatch.setattr("orchestrator.planning.fsr.suggested", lambda ratios: report.estimates[0])
    expected = round(min(max(report.estimates[0].lam, 0.0), 2.0), 3)
    later = make(name="later", diagnostics={"fsr_from": "shapes", "plasticity": False})
    records = [r for r in later.run(progress=False).records if r.role == "search"]
    assert [r.hparams["lam"] for r in records[:2]] == [1.0, expected]
    header = study_header(events(later))
    assert header["hints"] == {"layernorm": {"lam": expected}}
    assert header["hints_from"] == f"shapes: {report.estimates[0].sentence()}"


def test_references_follow_the_search_and_no_scheduler_stops_them(make: Callable[..., Study]) -> None:
    search = {"trials": 3, "epochs": 2, "scheduler": "asha", "reduction": 2, "seed": 3, "batch_size": 8}
    diagnostics = {"fsr": ["full"], "fsr_seeds": 1, "plasticity": False}
    study = make(name="whole", diagnostics=diagnostics, search=search)
    results = study.run(progress=False)
    roles = [event["role"] for event in events(study) if event["kind"] == "trial_suggested"]
    assert roles == ["search"] * 3 + ["reference"] * 2
    references = [record for record in results.records if record.role == "reference"]
    assert [(record.state, record.unit) for record in references] == [("complete", 2)] * 2
    (estimate,) = estimates(results.records)
    assert (estimate.reference, estimate.seeds) == ("full", 1)
    best = results.best().record
    assert {record.hparams["lr_backbone"] for record in references} == {best.hparams["lr_backbone"]}
    assert measurements(events(study))["fsr"]["metrics"] == {"fsr/full": estimate.value}
    assert "hints" not in study_header(events(study))


def test_a_network_without_layer_norm(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make(kind="cnn", name="cnn", strategies=["linear_probe"])
    with pytest.raises(PreflightError) as error:
        measure_fsr(study, progress=False)
    assert str(error.value) == (
        f"The study 'cnn' cannot run here: model.name: FSR is measured by tuning LayerNorms, but "
        f"{study.spec.model.name} has none. `luthier run` reports the shift of its BatchNorms as bn_shift."
    )
    assert not study.folder.exists()
    file = tmp_path / "study.yaml"
    file.write_text(write_yaml(study.spec.model_dump(mode="json")))
    assert CliRunner().invoke(cli.app, ["fsr", str(file)]).exit_code == PREFLIGHT


def test_a_sample_too_small_for_shares_of_itself(make: Callable[..., Study], caplog: pytest.LogCaptureFixture) -> None:
    diagnostics = {"fsr": ["extrapolated"], "plasticity": False}
    study = make(name="small", fraction=0.02, strategies=["linear_probe"], diagnostics=diagnostics)
    with caplog.at_level(logging.WARNING), pytest.raises(PreflightError) as error:
        measure_fsr(study, progress=False)
    assert str(error.value) == (
        "The study 'small' cannot run here: diagnostics.fsr_fractions: FSR needs other samples to compare the study's "
        "own with, but there are none of another size. List other diagnostics.fsr_fractions, or train on more images."
    )
    assert "small has no layernorm entry: the strategy's default point is measured." in caplog.messages
    assert not study.folder.exists()


class TestReport:
    def test_what_is_printed(self) -> None:
        stored = [FsrEstimate("full", 0.61, 0.54, 0.68, 1.0, 1.6, 3)]
        console = Console(width=100, record=True)
        FsrReport("pets", stored, []).render(console)
        text = console.export_text()
        assert stored[0].sentence() in text
        assert (
            "Suggested λ = 1.64 [1.47, 1.85] (95 % interval over seeds; n = 3 seeds, 1 training subsample): a" in text
        )

    def test_c8_the_name_of_a_domain_is_no_markup(self, monkeypatch: pytest.MonkeyPatch) -> None:
        row = {"sample": "oracle:[/red]cat", "images": 4.0, "shift": 1.0, "ci95": None, "seeds": 1}
        monkeypatch.setattr(FsrReport, "samples", lambda self: [row])
        console = Console(width=100, record=True)
        FsrReport("pets", [FsrEstimate("full", 0.61, 0.54, 0.68, 1.0, 1.6, 3)], []).render(console)
        assert "oracle:[/red]cat" in console.export_text()

    def test_nothing_to_say(self) -> None:
        console = Console(width=100, record=True)
        FsrReport("pets", [], []).render(console)
        assert console.export_text() == (
            "Too few reference trials have finished for an FSR. `luthier status` shows why.\n"
        )
        assert FsrReport("pets", [], []).to_dict() == {
            "study": "pets",
            "samples": [],
            "fsr": [],
            "lambda": None,
            "lambda_interval": None,
        }
