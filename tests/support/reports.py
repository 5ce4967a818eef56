"""Finished studies with kept weights and predictions, trained in this process, for tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.planning.build import make_task
from orchestrator.record.journal import Journal
from orchestrator.record.kept_paths import predictions_file, weights_folder
from orchestrator.record.records import declared_metrics
from orchestrator.study import Study
from trainables.engine.trial import Trial
from trainables.specs.trial_spec import TrialSpec
from trainables.storage.kept_predictions import save_predictions
from trainables.storage.kept_weights import save_weights

TRIALS: tuple[Mapping[str, Any], ...] = (
    {"strategy": "full", "hparams": {"lr_backbone": 0.01, "lr_head": 1.0}, "seed": 1},
    {"strategy": "full", "hparams": {"lr_backbone": 0.01, "lr_head": 1.0}, "seed": 2, "role": "confirm"},
    {"strategy": "full", "hparams": {"lr_backbone": 0.01, "lr_head": 1.0}, "seed": 3, "role": "confirm"},
    {"strategy": "linear_probe", "seed": 4},
)


def reported_study(
    folder: Path, data: Mapping[str, Any], model: str, trials: Sequence[Mapping[str, Any]] = TRIALS, **sections: Any
) -> Study:
    """A complete study as a run leaves it: store, journal, kept weights and predictions.

    Args:
        folder: of all studies.
        data: the study's `data`.
        model: name of the network.
        trials: fields of each trial's `TrialSpec`.
        sections: further sections of the study.
    """
    study = Study(
        name="shapes",
        data=dict(data),
        model={"name": model},
        strategies=list(dict.fromkeys(str(trial["strategy"]) for trial in trials)),
        search={"trials": 2, "epochs": 1, "batch_size": 16},
        diagnostics={"measure": [], "plasticity": False},
        storage=str(folder),
        **sections,
    )
    store = study.prepare()
    shared = make_task(study.spec, store)
    study.folder.mkdir(parents=True)
    spec = study.spec.model_dump(mode="json")
    (study.folder / "study.yaml").write_text(json.dumps(spec))
    with Journal(study.folder / "journal.jsonl") as journal:
        journal.append("study_started", study="shapes", spec=spec, dataset="shapes", dataset_digest=store.digest)
        for number, fields in enumerate(trials):
            _train(journal, study, TrialSpec(shared=shared, **fields), number)
        journal.append("study_finished", state="complete")
    return study


def _train(journal: Journal, study: Study, spec: TrialSpec, number: int) -> None:
    trial_id = f"t{number}"
    journal.append(
        "trial_suggested", trial_id=trial_id, number=number, strategy=spec.strategy,
        label=spec.label or spec.strategy, hparams=dict(spec.hparams), seed=spec.seed, role=spec.role,
        config_hash=spec.config_hash,
    )  # fmt: skip
    journal.append("trial_started", trial_id=trial_id)
    trial = Trial(spec, device="cpu")
    trial.keeps_predictions = True
    curves: dict[str, Any] = {}
    while not trial.finished:
        metrics = dict(trial.step())
        curves |= metrics.pop("curves", {})
    weights = trial.kept_weights(number)
    kept = save_weights(weights_folder(study.folder, number), weights)
    meta = {key: weights.meta[key] for key in ("number", "config_hash", "seed", "task", "classes")}
    predictions = save_predictions(predictions_file(study.folder, number), trial.predictions, meta)
    journal.append(
        "result", trial_id=trial_id, unit=1, metrics=declared_metrics({**(trial.result or {}), **metrics}),
        curves=curves, weights={"sha256": kept.sha256, "bytes": kept.bytes},
        predictions={"sha256": predictions.sha256, "bytes": predictions.bytes},
    )  # fmt: skip
    journal.append("trial_finished", trial_id=trial_id, state="complete")
