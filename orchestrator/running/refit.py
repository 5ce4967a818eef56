"""A chosen configuration, trained once more on training and validation images together, in this process.

    <study>/weights/refit-<configuration>-<seed>/      see `trainables.storage.kept_weights`

The weights appear whole or not at all; those that are there are used again if they come from the same training.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.export.errors import RefusedExportError
from orchestrator.planning.build import make_task, planned_units
from orchestrator.record.kept_files import refit_folder
from orchestrator.record.records import TrialRecord
from orchestrator.wording import counted
from trainables.engine.trial import Trial
from trainables.specs.errors import NonFiniteError
from trainables.specs.metrics import LAYERNORM_LAMBDA, PROBE_C, TEMPERATURE, WISE_ALPHA
from trainables.specs.trial_spec import TrialSpec
from trainables.storage.compute_once import compute_once
from trainables.storage.kept_weights import KeptWeights, WeightsError, load_weights, save_weights

if TYPE_CHECKING:
    from orchestrator.study_file.schema import StudySpec
    from trainables.data.store import Store

logger = logging.getLogger("luthier")

REFIT = "refit"
"""Key of the kept weights' `meta` with what the refit stands on."""
ROLES = frozenset({"search", "confirm"})
"""Roles of the trials whose configuration can be trained again."""
TAKEN_OVER = (PROBE_C.name, LAYERNORM_LAMBDA.name, WISE_ALPHA.name, TEMPERATURE.name)
"""What a trial chose or fitted on validation, and a refit states: C, λ, α and the temperature."""

OnUnit = Callable[[int, int], object]
"""Called after every unit with its number and the number of all."""


def refit(
    study: Path,
    spec: StudySpec,
    record: TrialRecord,
    store: Store,
    on_unit: OnUnit | None = None,
    device: torch.device | str | None = None,
) -> KeptWeights:
    """Train a trial's configuration once more on training and validation images, or load what was trained before.

    Strategy, hyperparameters, seed and units of budget are the trial's; what it chose on validation (C, λ, α,
    components) is taken over from its record. No validation, no early stopping: the weights are those of the last unit.

    Args:
        study: folder of the study.
        spec: of the study when the trial ran.
        record: of a complete trial of the search or its confirmation.
        store: the trial's data.
        on_unit: reports the progress.
        device: None = the GPU if there is one.

    Raises:
        RefusedExportError: the configuration cannot be trained again.
        NonFiniteError: the training diverged.
        OSError: the disk refused a write.
    """
    trial = _trial(spec, record, store, device)
    basis = {
        "trial": record.number,
        "units": record.unit,
        "settings": _settings(trial.spec),
        "store_digest": store.digest,
        "taken_over": {name: value for name in TAKEN_OVER if (value := record.metric(name)) is not None},
    }
    folder = refit_folder(study, record.config_hash, record.seed)
    return compute_once(
        folder,
        lambda path: _load(path, basis),
        lambda: _train(trial, record.number, basis, on_unit),
        lambda kept, path: _save(path, kept),
    )


def _trial(spec: StudySpec, record: TrialRecord, store: Store, device: torch.device | str | None) -> Trial:
    """The trial to run; nothing is loaded yet.

    Raises:
        RefusedExportError: see `refit`.
    """
    if record.role not in ROLES:
        raise RefusedExportError(
            f"A refit trains a configuration of the search on the study's own images, but trial {record.number} "
            f"({record.label}) is a {record.role} on others. Choose a search trial or a confirmed one."
        )
    shared = dataclasses.replace(make_task(spec, store), evaluate_at=(), interim_splits=None, diagnostics=())
    trial_spec = TrialSpec(
        shared=shared,
        strategy=record.strategy,
        hparams=dict(record.hparams),
        seed=record.seed,
        label=record.label,
        role="refit",
    )
    try:
        trial = Trial(trial_spec, store=store, device=device, recorded=dict(record.metrics))
    except (ValueError, ImportError) as error:
        raise RefusedExportError(
            f"A refit trains with the code and the hyperparameters of its trial, but {record.strategy} of trial "
            f"{record.number} cannot be trained here: {error}"
        ) from error
    units = planned_units(shared)(record)
    if units != record.unit:
        raise RefusedExportError(
            f"A refit repeats the budget of its trial, but trial {record.number} took {counted(record.unit, 'unit')} "
            f"and the study's settings give {units} today. Run the study again, or export the trial's own weights."
        )
    return trial


def _settings(spec: TrialSpec) -> dict[str, Any]:
    """Everything in a trial's specification that its numbers depend on, as JSON values."""
    values = spec.to_dict()
    without_effect = ("store", "cache", "interim_splits")
    shared = {name: value for name, value in values["shared"].items() if name not in without_effect}
    if shared["channels_last"] is None:
        del shared["channels_last"]  # refits from before it could be set do not have it
    # As JSON returns them: tuples are lists.
    settings: dict[str, Any] = json.loads(json.dumps({**values, "shared": shared}))
    return settings


def _load(folder: Path, basis: Mapping[str, Any]) -> KeptWeights | None:
    """Weights of an earlier refit; None where there are none, or they are damaged or of another training."""
    if not folder.is_dir():
        return None
    try:
        kept = load_weights(folder)
    except WeightsError as error:
        logger.warning("%s The configuration is trained again.", error)
        return None
    if kept.meta.get(REFIT) != basis:
        logger.warning("The refit in %s is of other settings or data. The configuration is trained again.", folder)
        return None
    return kept


def _train(trial: Trial, number: int, basis: Mapping[str, Any], on_unit: OnUnit | None) -> KeptWeights:
    try:
        while not trial.finished:
            trial.step()
            if on_unit is not None:
                on_unit(trial.unit, int(basis["units"]))
    except NonFiniteError:
        raise
    except ValueError as error:
        raise RefusedExportError(f"Trial {number} cannot be trained again: {error}") from error
    kept = trial.kept_weights(number)
    tensors = {name: value.detach().cpu() for name, value in kept.tensors.items()}
    adapter = {name: value.detach().cpu() for name, value in kept.adapter.items()}
    return KeptWeights(tensors, adapter, {**kept.meta, REFIT: dict(basis)})


def _save(folder: Path, kept: KeptWeights) -> None:
    save_weights(folder, kept)
