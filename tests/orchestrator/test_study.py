"""Whole studies on a tiny image folder: one cluster, real trials, real records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.support.synthetic import write_images
from orchestrator import Study
from orchestrator.planning.build import make_task
from orchestrator.record.journal import Journal
from orchestrator.results.leaderboard import COSTS
from orchestrator.results.study_results import Results
from orchestrator.running import measure
from tests.support.trials import history_of
from trainables.engine.memory_layout import measure_layouts
from trainables.engine.trial import Trial
from trainables.specs.trial_spec import TrialSpec

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    from orchestrator.cluster.connection import connect

    with connect(cpus=2, dashboard=False):
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shapes()` as a folder root/<domain>/<class>/<n>.png."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def make(images: Path, network: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Study]:
    """A study of four strategies with a few fields changed; each in a storage folder of its own."""

    def study(**changes: Any) -> Study:
        fields: dict[str, Any] = {
            "name": "shapes",
            "data": {"root": str(images), "id": ["bright", "dim"], "ood": ["inverted", "noisy"]},
            "model": {"name": network("cnn")},
            "strategies": ["linear_probe", "full", "lp_ft", "daft"],
            "search": {"trials": 6, "epochs": 2, "scheduler": "none", "seed": 3, "batch_size": 16},
            "confirm": {"top_k": 4, "seeds": 1},
            "resources": {"concurrent": 1, "channels_last": False},
            "storage": str(tmp_path_factory.mktemp("storage")),
        }
        for key, value in changes.items():
            fields[key] = {**fields[key], **value} if isinstance(fields.get(key), dict) else value
        return Study(**fields)

    return study


@pytest.fixture(scope="module")
def first(make: Callable[..., Study]) -> tuple[Study, Results]:
    study = make()
    return study, study.run(progress=False)


def numbers(results: Results) -> dict[tuple[str, int], dict[str, float]]:
    """Every trial's metrics but its costs, by configuration and seed."""
    return {
        (r.config_hash, r.seed): {k: v for k, v in r.metrics.items() if not k.startswith("cost/")}
        for r in results.records
    }


def test_a_study_runs_its_search_and_confirms_the_best_of_each_strategy(first: tuple[Study, Results]) -> None:
    _, results = first
    roles = [r.role for r in results.records]
    assert roles == ["search"] * 6 + ["confirm"] * 4
    assert {r.state for r in results.records} == {"complete"}
    table = results.leaderboard()
    assert set(table["label"]) == {"linear_probe", "full", "lp_ft", "daft"}
    assert table["ood/mean/acc"].between(0, 1).all()
    assert {"test/acc", "ood/inverted/acc", "ood/noisy/acc", "ood/worst/acc", "calib/ece"} <= set(
        results.records[0].metrics
    )


def without_costs(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns=list(COSTS))


def test_one_seed_one_trial_at_a_time_gives_the_same_study_twice(
    make: Callable[..., Study], first: tuple[Study, Results]
) -> None:
    again = make().run(progress=False)
    tables = [without_costs(results.leaderboard()) for results in (again, first[1])]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert numbers(again) == numbers(first[1])


def test_a_trial_depends_on_its_configuration_and_seed_only(
    make: Callable[..., Study], first: tuple[Study, Results]
) -> None:
    together = make(resources={"concurrent": 2}).run(progress=False)
    alone, beside = numbers(first[1]), numbers(together)
    shared = alone.keys() & beside.keys()
    assert len(shared) >= 4  # the default points, at the least
    assert {key: beside[key] for key in shared} == {key: alone[key] for key in shared}


def test_running_a_finished_study_again_adds_no_trial(first: tuple[Study, Results]) -> None:
    study, results = first
    assert numbers(study.run(progress=False)) == numbers(results)
    events = Journal.read(study.folder / "journal.jsonl")
    assert [e["kind"] for e in events].count("trial_suggested") == len(results.records)


def test_mlflow_has_one_run_per_trial_below_the_study(first: tuple[Study, Results]) -> None:
    from mlflow import MlflowClient

    study, results = first
    client = MlflowClient(study.spec.tracking_uri)
    experiment = client.get_experiment_by_name("shapes")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1
    assert len(children) == len(results.records)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.data.metrics["best/val/acc"] >= 0 for run in children)
    assert {run.data.tags["strategy"] for run in children} == {"linear_probe", "full", "lp_ft", "daft"}
    assert {(run.data.tags["n_classes"], run.data.tags["n_classes_present"]) for run in runs} == {
        ("4", "test 4, ood/inverted 4, ood/noisy 4")
    }


def test_leave_one_domain_out_runs_folds_and_chooses_by_them(make: Callable[..., Study]) -> None:
    study = make(
        search={"trials": 2, "objective": "leave_one_domain_out"}, strategies=["linear_probe", "full"],
        confirm={"top_k": 1},
    )  # fmt: skip
    results = study.run(progress=False)
    folds = [r for r in results.records if r.role == "fold"]
    assert sorted((r.label, r.held_out) for r in folds) == [
        ("full", "bright"), ("full", "dim"), ("linear_probe", "bright"), ("linear_probe", "dim"),
    ]  # fmt: skip
    assert all(0 <= r.metrics["held_out/acc"] <= 1 for r in folds)
    assert results.best("leave_one_domain_out").criterion == "held_out/acc"


def test_a_validation_domain_steers_the_choice(make: Callable[..., Study]) -> None:
    study = make(
        search={"trials": 2, "objective": "val_domain:noisy"}, strategies=["linear_probe", "full"],
        confirm={"top_k": 1},
    )  # fmt: skip
    results = study.run(progress=False)
    search = [r for r in results.records if r.role == "search"]
    best = max(search, key=lambda r: r.metrics["ood/noisy/acc"])
    assert results.best(results.rule).record.metrics["ood/noisy/acc"] == best.metrics["ood/noisy/acc"]


@pytest.mark.parametrize(
    ("changes", "of_stopped"),
    [
        ({}, set()),
        ({"search": {"objective": "val_domain:noisy"}}, {"ood/noisy/acc"}),
        ({"keep": "all"}, {"test/acc", "ood/inverted/acc", "ood/noisy/acc", "ood/mean/acc", "ood/worst/acc"}),
    ],
)
def test_test_images_are_looked_at_once_at_the_end_but_for_what_a_rule_reads(
    make: Callable[..., Study], changes: dict[str, Any], of_stopped: set[str]
) -> None:
    search = {"trials": 5, "epochs": 3, "scheduler": "asha", "reduction": 2, **changes.pop("search", {})}
    study = make(strategies=["full"], search=search, confirm={"top_k": 1}, diagnostics={"measure": []}, **changes)
    results = study.run(progress=False)
    assert results.metrics.test == "test/acc"
    tested = {
        (record.role, record.state, unit["unit"]): {n for n in unit if n.startswith(("test/", "ood/")) and "/acc" in n}
        for record in results.records
        for unit in record.history
    }
    every = {"test/acc", "ood/inverted/acc", "ood/noisy/acc", "ood/mean/acc", "ood/worst/acc"}
    stopped = [names for (_, state, _), names in tested.items() if state == "pruned"]
    assert stopped, "a search without stopped trials shows nothing"
    assert all(names == of_stopped for names in stopped)
    assert [tested["confirm", "complete", unit] for unit in (1.0, 2.0)] == [set(), set()]
    assert tested["confirm", "complete", 3.0] >= every
    assert tested["search", "complete", 3.0] >= every
    assert results.regret().value >= 0
    assert results.leaderboard()["pruned"].to_list() == [sum(r.state == "pruned" for r in results.records)]


@pytest.mark.usefixtures("cpu_only", "one_thread")
def test_the_layout_that_was_measured_is_that_of_every_trial_of_every_run(
    make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurement runs on the cluster; its answer is turned into the one that changes bits."""
    measured = measure._on_cluster
    runs: list[Any] = []

    def last(*arguments: Any) -> dict[str, Any]:
        runs.append(arguments[0])
        return {**measured(*arguments), "channels_last": True}

    monkeypatch.setattr(measure, "_on_cluster", last)
    search = {"trials": 1, "epochs": 1}
    fields: dict[str, Any] = {"strategies": ["full"], "resources": {"channels_last": "auto"}}
    fields["diagnostics"] = {"measure": [], "plasticity": False}
    study = make(search=search, confirm={"top_k": 0}, **fields)
    study.run(progress=False)
    again = Study(**{**study.spec.model_dump(mode="json"), "confirm": {"top_k": 1, "seeds": 1}})
    results = again.run(progress=False)
    assert runs == [measure_layouts]
    events = Journal.read(study.folder / "journal.jsonl")
    (decision,) = (event for event in events if event["kind"] == "memory_layout")
    assert decision["seconds"].keys() == {"contiguous", "channels_last"}
    shared = make_task(study.spec, study.prepare())
    for record in results.records:
        spec = TrialSpec(
            shared=dataclasses.replace(shared, channels_last=True), strategy=record.strategy, label=record.label,
            hparams=dict(record.hparams), seed=record.seed,
        )  # fmt: skip
        alone = history_of(Trial(spec, device="cpu"))
        kept = {name for name in record.history[-1] if not name.startswith("cost/")} - {"unit"}
        assert {name: alone[-1][name] for name in kept} == {name: record.history[-1][name] for name in kept}


def test_a_failing_configuration_is_recorded_and_the_study_continues(make: Callable[..., Study]) -> None:
    exploding = {"name": "full", "label": "exploding", "fixed": {"lr_backbone": 1e30, "lr_head": 1e30}}
    study = make(strategies=["linear_probe", exploding], search={"trials": 2}, confirm={"top_k": 1})
    results = study.run(progress=False)
    failed = [r for r in results.records if r.state == "failed"]
    assert [(r.label, r.reason) for r in failed] == [("exploding", "nan")]
    assert results.best().record.label == "linear_probe"
    assert any("exploding" in warning or "failed" in warning for warning in results.warnings())


def test_results_of_a_study_that_never_ran_state_it(make: Callable[..., Study]) -> None:
    study = make(name="never")
    with pytest.raises(FileNotFoundError, match=r"has no journal at .* Start it with `luthier run`"):
        study.results()


def test_the_pretrained_network_is_measured_once_and_spoken_of(
    make: Callable[..., Study], network: Callable[[str], str]
) -> None:
    study = make(
        model={"name": network("vit")}, strategies=["linear_probe"], search={"trials": 1}, confirm={"top_k": 0},
        diagnostics={"plasticity_source": "noisy", "plasticity_pairs": 8},
    )  # fmt: skip
    study.run(progress=False)
    again = study.run(progress=False)
    (event,) = [e for e in Journal.read(study.folder / "journal.jsonl") if e["kind"] == "measured"]
    assert again.measurements["plasticity"]["metrics"] == event["metrics"]
    (sentence,) = [sentence for sentence in again.findings() if "is the most plastic component" in sentence]
    assert sentence in again.markdown()
    pictures = (study.folder.parent / "mlartifacts").glob("*/artifacts/curves/plasticity.png")
    assert len(list(pictures)) == 1
