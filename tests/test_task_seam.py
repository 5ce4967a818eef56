"""Studies of tasks unlike classification: searched, recorded, selected and reported without an edit anywhere else.

The driver's side runs without a cluster: a searcher proposes, the engine trains in this process, the journal keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.record.journal import Journal
from orchestrator.record.records import TrialRecord, declared_metrics, fold
from orchestrator.report.page import report_html
from orchestrator.results.study_results import Results
from orchestrator.search.stages import ConfirmStage
from tests.support.driving import drive, searcher
from tests.support.toy_tasks import TOY_TASKS, digits
from trainables.engine.trial import Trial
from trainables.specs.metrics import TaskMetrics
from trainables.specs.trial_spec import ModelSpec, SharedTrialSettings, TrialSpec
from trainables.tasks.base import Task
from trainables.tasks.registry import register

STRATEGIES = ("full", "layernorm")


@dataclass
class ToyStudy:
    """A finished study."""

    metrics: TaskMetrics
    spec: dict[str, Any]
    events: list[Any]
    records: list[TrialRecord]


@pytest.fixture(scope="module", params=TOY_TASKS, ids=lambda task: str(task.name()))
def study(
    request: pytest.FixtureRequest, network: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> ToyStudy:
    """Two strategies, four search trials, the best of each confirmed on two seeds."""
    task: type[Task] = request.param
    register(task)
    folder = tmp_path_factory.mktemp(task.name())
    shared = SharedTrialSettings(
        store="memory",
        model=ModelSpec(name=network("vit")),
        epochs=2,
        batch_size=16,
        cache=str(folder / "cache"),
        task=task.name(),
        diagnostics=("shift",),
    )
    spec = {"name": "toy", "task": task.name(), "search": {"objective": "id_val", "epochs": 2}}
    with Journal(folder / "journal.jsonl") as journal:
        journal.append("study_started", study="toy", spec=spec, versions={}, dataset_digest="d" * 64, dataset="digits")
        _search(journal, folder, shared, task.metrics)
        journal.append("study_finished", state="complete")
        events = journal.events()
    return ToyStudy(task.metrics, spec, events, list(fold(events)))


def _search(journal: Journal, folder: Path, shared: SharedTrialSettings, metrics: TaskMetrics) -> None:
    def best_of_each(records: Any) -> list[TrialRecord]:
        complete = [record for record in records if record.state == "complete"]
        score = lambda record: metrics.selection.score(record.metrics[metrics.best_validation])  # noqa: E731
        return [max((r for r in complete if r.label == name), key=score) for name in STRATEGIES]

    def train(config: dict[str, Any]) -> dict[str, Any]:
        """One trial in this process, journalled as the driver's callback does."""
        (trial_id,) = (r.trial_id for r in fold(journal.events()) if r.number == config["_number"])
        journal.append("trial_started", trial_id=trial_id, node=None, pid=None)
        trial = Trial(TrialSpec.from_dict(config), store=digits(), device="cpu")
        result: dict[str, Any] = {}
        while not trial.finished:
            result = trial.step()
            declared = declared_metrics(result)
            journal.append("result", trial_id=trial_id, unit=result["unit"], metrics=declared)
        journal.append("trial_finished", trial_id=trial_id, state="complete")
        return result

    search = searcher(
        folder,
        STRATEGIES,
        task=shared,
        trials=4,
        sampler="random",
        metrics=metrics,
        stages=[ConfirmStage(shared, best_of_each, seeds=2, seed=3)],
        journal=journal,
    )
    drive(search, train)


def test_every_trial_is_recorded_with_the_metrics_of_its_task(study: ToyStudy) -> None:
    assert [record.role for record in study.records] == ["search"] * 4 + ["confirm"] * 4
    names = {metric.on("test") for metric in study.metrics.reported} | {study.metrics.best_validation}
    for record in study.records:
        assert record.state == "complete"
        assert names <= record.metrics.keys()
        assert study.metrics.validation in record.history[0]
        assert not any(name.endswith(("/acc", "/nll", "/ece")) for name in record.metrics)


def test_the_best_validation_score_of_the_task_selects(study: ToyStudy) -> None:
    choice = Results(study.records, study.spec).best()
    searched = [record for record in study.records if record.role == "search"]
    values = [record.metrics[study.metrics.best_validation] for record in searched]
    best = max(values, key=study.metrics.selection.score)
    assert study.metrics.best_validation in choice.record.metrics
    assert choice.record.metrics[study.metrics.best_validation] == best


def test_the_leaderboard_has_the_mean_over_the_confirmed_seeds(study: ToyStudy) -> None:
    table = Results(study.records, study.spec).leaderboard()
    assert sorted(table["label"]) == sorted(STRATEGIES)
    for _, row in table.iterrows():
        confirmed = [r for r in study.records if r.label == row["label"] and r.role == "confirm"]
        values = [record.metrics[study.metrics.test] for record in confirmed]
        assert any(value == pytest.approx(sum(values) / len(values)) for value in row if isinstance(value, float))


def test_the_report_shows_the_values_of_the_task_and_no_other_metric(study: ToyStudy) -> None:
    page = report_html(study.events)
    rows = Results(study.records, study.spec).leaderboard()
    for value in rows[study.metrics.test]:
        assert study.metrics.selection.text(value).split()[0] in page
    assert "accuracy" not in page
    assert "val/acc" not in page
