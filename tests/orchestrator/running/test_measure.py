"""The pretrained network is measured once per study, on the cluster, and never at the price of the study."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.support.synthetic import write_shapes
from orchestrator.record.journal import Journal
from orchestrator.record.records import measurements, study_header
from orchestrator.running import measure
from orchestrator.running.measure import measure_start, with_layout
from orchestrator.running.progress import event_line
from orchestrator.study_file.schema import StudySpec
from trainables.engine.memory_layout import measure_layouts
from trainables.engine.start_plasticity import pretrained_plasticity
from trainables.models.transformer_blocks import COMPONENTS
from trainables.specs.metrics import task_metrics
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings

REQUEST = {"cpu": 1.0, "gpu": 0.0}
FOUND = {"metrics": {"plasticity/mha": 1.5}, "curves": {}}


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.jsonl") as opened:
        yield opened


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("store") / "shapes")


def spec(model: str, **diagnostics: Any) -> StudySpec:
    fields: dict[str, Any] = {"name": "s", "data": {"source": "digits"}, "model": {"name": model}}
    return StudySpec.from_fields({**fields, "strategies": ["full"], "diagnostics": diagnostics})


def task(store: Path, model: str, **fields: Any) -> SharedTrialSettings:
    return SharedTrialSettings(store=str(store), model=ModelSpec(name=model), plasticity_pairs=8, **fields)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requests that would have gone to the cluster; each is answered with `FOUND`."""
    requests: list[Any] = []

    def answer(function: Any, task: SharedTrialSettings, request: Any) -> dict[str, Any]:
        requests.append(request)
        return FOUND

    monkeypatch.setattr(measure, "_on_cluster", answer)
    return requests


def test_a_measurement_is_in_the_journal_and_is_not_repeated(journal: Journal, asked: list[Any]) -> None:
    for _ in range(2):
        measure_start(spec("digits_vit"), task(Path("none"), "digits_vit"), journal, REQUEST)
    assert asked == [REQUEST]
    assert [e["kind"] for e in journal.events()] == ["measured"]
    assert measurements(journal.events()) == {"plasticity": FOUND}


def test_who_does_not_want_it_is_not_asked(journal: Journal, asked: list[Any]) -> None:
    measure_start(spec("digits_vit", plasticity=False), task(Path("none"), "digits_vit"), journal, REQUEST)
    assert (asked, journal.events()) == ([], [])


def test_a_network_without_blocks_is_one_line_and_no_failure(
    journal: Journal, asked: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "luthier"):
        measure_start(spec("digits_cnn"), task(Path("none"), "digits_cnn"), journal, REQUEST)
    assert (asked, journal.events()) == ([], [])
    (line,) = caplog.records
    assert (line.levelname, line.getMessage()) == (
        "INFO",
        "Plasticity is that of transformer blocks, and digits_cnn has none that are defined: it is left out.",
    )


def test_a_measurement_that_fails_costs_a_warning_and_is_tried_again_by_the_next_run(
    journal: Journal, asked: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(function: Any, task: SharedTrialSettings, request: Any) -> dict[str, Any]:
        raise RuntimeError("CUDA out of memory\ntraceback")

    with monkeypatch.context() as broken:
        broken.setattr(measure, "_on_cluster", fail)
        measure_start(spec("digits_vit"), task(Path("none"), "digits_vit"), journal, REQUEST)
    assert journal.events() == []
    assert caplog.messages == [
        "The plasticity of the pretrained network could not be measured (RuntimeError: CUDA out of memory). The study "
        "continues without it."
    ]
    measure_start(spec("digits_vit"), task(Path("none"), "digits_vit"), journal, REQUEST)
    assert asked == [REQUEST]


def test_the_numbers_are_those_of_the_diagnostic(store: Path, network: Callable[[str], str], tmp_path: Path) -> None:
    plasticity = pretrained_plasticity(task(store, network("vit"), cache=str(tmp_path)))
    assert set(plasticity["metrics"]) == {f"plasticity/{kind}" for kind in COMPONENTS}
    assert all(value > 0 for value in plasticity["metrics"].values())
    columns = plasticity["curves"]["plasticity"]["columns"]
    for kind in COMPONENTS:
        assert sum(columns[kind]) / len(columns[kind]) == pytest.approx(plasticity["metrics"][f"plasticity/{kind}"])
    (kept,) = tmp_path.rglob("plasticity-*.json")
    before = kept.stat().st_mtime_ns
    assert pretrained_plasticity(task(store, network("vit"), cache=str(tmp_path))) == plasticity
    assert kept.stat().st_mtime_ns == before


def layout_spec(**resources: Any) -> StudySpec:
    fields: dict[str, Any] = {"name": "s", "data": {"source": "digits"}, "model": {"name": "digits_cnn"}}
    return StudySpec.from_fields({**fields, "strategies": ["full"], "resources": resources})


SECONDS = {
    "contiguous": {"training_step": 0.4, "evaluation_batch": 0.9},
    "channels_last": {"training_step": 0.33, "evaluation_batch": 0.64},
}


class Layout:
    """The measurement on the cluster: its answers in turn, and how often it was made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any] | Exception) -> None:
        self.count = 0
        self._answers = iter(answers)
        monkeypatch.setattr(measure, "_on_cluster", self._measure)

    def _measure(self, function: Any, task: SharedTrialSettings, request: Any) -> dict[str, Any]:
        self.count += 1
        assert (function, request) == (measure_layouts, REQUEST)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("answer", "channels_last", "line"),
    [
        (
            {"channels_last": True, "device": "cpu", "seconds": SECONDS},
            True,
            "memory layout: channels last; a training step and an evaluation batch took contiguous 0.4 s and 0.9 s, "
            "channels last 0.33 s and 0.64 s of CPU time",
        ),
        (
            {"channels_last": False, "device": "cpu", "seconds": SECONDS},
            None,
            "memory layout: contiguous; a training step and an evaluation batch took contiguous 0.4 s and 0.9 s, "
            "channels last 0.33 s and 0.64 s of CPU time",
        ),
        ({"channels_last": True, "device": "cuda"}, None, "memory layout: channels last, as on every GPU"),
    ],
)
def test_a_layout_is_decided_once_and_kept_by_every_run(
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
    answer: dict[str, Any],
    channels_last: bool | None,
    line: str,
) -> None:
    """None is the device's own layout: identity and checkpoints of trials in it are those of earlier versions."""
    layout = Layout(monkeypatch, answer)
    journal.append("study_started", study="s", spec={})
    shared = task(Path("none"), "digits_cnn")
    assert with_layout(layout_spec(), shared, journal, REQUEST).channels_last is channels_last
    journal.append("trial_suggested", trial_id="t", number=0, strategy="full")
    journal.append("trial_started", trial_id="t")
    journal.append("study_started", study="s", spec={})
    assert with_layout(layout_spec(), shared, journal, REQUEST).channels_last is channels_last
    assert layout.count == 1
    (event,) = (event for event in journal.events() if event["kind"] == "memory_layout")
    assert event_line(event, None, None, task_metrics()) == line
    assert study_header(journal.events())["memory_layout"]["channels_last"] == answer["channels_last"]


def test_a_layout_that_is_given_is_not_measured(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(monkeypatch)
    shared = task(Path("none"), "digits_cnn", channels_last=False)
    assert with_layout(layout_spec(channels_last=False), shared, journal, REQUEST) == shared
    assert (layout.count, journal.events()) == (0, [])


def test_trials_without_a_measured_layout_have_that_of_their_device(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study of an earlier version, which is continued with the bits that it has."""
    layout = Layout(monkeypatch)
    journal.append("trial_started", trial_id="t")
    shared = task(Path("none"), "digits_cnn")
    assert with_layout(layout_spec(), shared, journal, REQUEST) == shared
    assert layout.count == 0


def test_a_layout_that_cannot_be_measured_costs_a_warning(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Layout(monkeypatch, ValueError("no weights\ntraceback"))
    shared = task(Path("none"), "digits_cnn")
    assert with_layout(layout_spec(), shared, journal, REQUEST) == shared
    assert journal.events() == []
    assert caplog.messages == [
        "Which memory layout is faster could not be measured (ValueError: no weights). Trials have that of their "
        "device."
    ]


@pytest.mark.ray
def test_it_runs_as_a_task_of_the_cluster_with_a_trials_resources(
    store: Path, network: Callable[[str], str], journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from orchestrator.cluster.connection import connect

    shared = task(store, network("vit"), cache=str(tmp_path))
    with connect(cpus=1, dashboard=False):
        measure_start(spec(network("vit")), shared, journal, REQUEST)
        assert measurements(journal.events())["plasticity"] == pretrained_plasticity(shared)
        wrong = task(store, network("vit"), cache=str(tmp_path), plasticity_source="sketch")
        with Journal(tmp_path / "other.jsonl") as other:
            measure_start(spec(network("vit")), wrong, other, REQUEST)
            assert other.events() == []
    assert caplog.messages == [
        "The plasticity of the pretrained network could not be measured (ValueError: plasticity_source must be one of "
        "the OOD domains (inverted, noisy), but got 'sketch'.). The study continues without it."
    ]
