"""From the study file to the parts that run it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.planning import build
from orchestrator.record.records import TrialRecord
from orchestrator.search.sampling import maximised
from orchestrator.study_file.schema import StudySpec
from trainables.specs.trial_spec import LossSettings, ModelSpec


@pytest.mark.parametrize(
    ("model", "made"),
    [
        (ModelSpec(name="digits_cnn"), ["digits_cnn"]),
        (ModelSpec(name="digits_cnn", pretrained=False), []),
        (ModelSpec(name="digits_cnn", weights="/data/own.safetensors"), []),
        (ModelSpec(name="resnet18"), []),
    ],
)
def test_a_built_in_network_is_pretrained_only_where_its_weights_are_used(
    model: ModelSpec, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def folder(name: str, cache: Path | None = None) -> Path:
        asked.append(name)
        return Path()

    monkeypatch.setattr("orchestrator.planning.build.pretrained_folder", folder)
    build.make_built_in(model)
    assert asked == made


def study(**sections: Any) -> StudySpec:
    fields: dict[str, Any] = {
        "name": "digits",
        "data": {"source": "digits"},
        "model": {"name": "digits_vit"},
        "strategies": ["full"],
    }
    return StudySpec.from_fields(fields | sections)


@pytest.mark.parametrize(
    ("search", "objective", "mode"),
    [
        ({}, "val/acc", "max"),
        ({"metric": "balanced_acc"}, "val/balanced_acc", "max"),
        ({"metric": "nll"}, "val/nll", "min"),
        ({"metric": "brier", "objective": "val_domain:noisy"}, "ood/noisy/brier", "min"),
    ],
)
def test_the_metric_steers_trials_search_and_early_stopping(
    search: dict[str, Any], objective: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = study(search=search)
    store = SimpleNamespace(path="store", image_size=32)
    task = build.make_task(spec, store)  # type: ignore[arg-type]
    assert task.metric == search.get("metric")
    settings = build.settings_of(spec, task, {})
    assert settings.objectives == (objective,)
    assert maximised(objective, settings.metrics) == (mode == "max")
    monkeypatch.setattr("orchestrator.planning.build.StudyScheduler", lambda *arguments: arguments)
    assert build.make_scheduler(spec)[:2] == (objective, mode == "max")


def test_what_starts_at_an_optimum_is_not_stopped_at_the_first_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = study(strategies=["full", "lp_ft"], search={"epochs": 9, "grace": 1, "reduction": 3})
    monkeypatch.setattr("orchestrator.planning.build.StudyScheduler", lambda *arguments: arguments)
    assert build.make_scheduler(spec)[-1] == {"lp_ft": 3}


def test_objectives_reach_the_search_and_the_confirmation() -> None:
    objectives = ["id_val", "trainable_parameters", "peak_memory"]
    spec = study(search={"objectives": objectives, "scheduler": "none", "metric": "nll"})
    task = build.make_task(spec, SimpleNamespace(path="store", image_size=32))  # type: ignore[arg-type]
    settings = build.settings_of(spec, task, {})
    assert settings.objectives == ("val/nll", "trainable_parameters", "peak_memory")
    assert [maximised(name, settings.metrics) for name in settings.objectives] == [False, False, False]
    (stage,) = build.stages_of(spec, task, SimpleNamespace(domains=(), splits={}))  # type: ignore[arg-type]
    values = {0.1: (0.1, 1e6), 0.2: (0.2, 1e6), 0.3: (0.3, 1e4), 0.4: (0.4, 1e5)}
    records = [
        TrialRecord(
            trial_id=f"t{rate}", number=int(10 * rate), strategy="full", label="full", state="complete",
            config_hash=f"h{rate}", hparams={"lr_backbone": rate},
            metrics={"best/val/nll": nll, "cost/trainable_parameters": size, "cost/peak_host_bytes": 1e9},
        )
        for rate, (nll, size) in values.items()
    ]  # fmt: skip
    confirmed = {trial.hparams["lr_backbone"] for trial in stage.next(records)}
    assert confirmed == {0.1, 0.3}, "the best of the entry, and the other one on the front"


@pytest.mark.parametrize(
    ("sections", "units", "splits"),
    [
        ({}, (), None),
        ({"keep": "confirmed"}, (), None),
        ({"keep": "all"}, (1, 3), None),
        ({"search": {"evaluate_at_rungs": True}}, (1, 3), None),
        ({"search": {"objective": "val_domain:noisy"}}, (1, 3), ("ood/noisy",)),
        ({"search": {"objective": "val_domain:noisy", "evaluate_at_rungs": True}}, (1, 3), None),
        ({"search": {"objective": "val_domain:noisy"}, "keep": "all"}, (1, 3), None),
        ({"search": {"objective": "val_domain:noisy", "scheduler": "none"}}, (), ("ood/noisy",)),
    ],
)
def test_rungs_are_evaluated_where_something_reads_it(
    sections: dict[str, Any], units: tuple[int, ...], splits: tuple[str, ...] | None
) -> None:
    search = {"epochs": 9, **sections.get("search", {})}
    task = build.make_task(study(**{**sections, "search": search}), SimpleNamespace(path="store", image_size=32))  # type: ignore[arg-type]
    assert (task.evaluate_at, task.interim_splits) == (units, splits)


def test_loss_and_sampling_reach_the_trials() -> None:
    spec = study(loss={"class_weights": "balanced", "label_smoothing": 0.1})
    task = build.make_task(spec, SimpleNamespace(path="store", image_size=32))  # type: ignore[arg-type]
    assert task.loss == LossSettings(class_weights="balanced", label_smoothing=0.1)
    assert task.sampling is None
    balanced = study(data={"source": "digits", "sampling": "balanced"}, loss={"focal_gamma": 2.0})
    task = build.make_task(balanced, SimpleNamespace(path="store", image_size=32))  # type: ignore[arg-type]
    assert (task.loss, task.sampling) == (LossSettings(focal_gamma=2.0), "balanced")
