"""From the study file to the parts that run it: data request, task, entries, scheduler, stages."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.ingest.pipeline import IngestRequest
    from orchestrator.planning.fsr import ReferenceStage
    from orchestrator.record.records import TrialRecord
    from orchestrator.search.stages import Entry, Stage
    from orchestrator.study_file.schema import StudySpec
    from trainables.data.store import Store
    from trainables.specs.trial_spec import ModelSpec, Task


FOLDED = 5
"""Configurations, the best by ID validation, that leave-one-domain-out looks at: each costs a trial per ID domain."""


def model_of(spec: StudySpec) -> ModelSpec:
    """The backbone of the study."""
    from trainables.specs.trial_spec import ModelSpec

    return ModelSpec(name=spec.model.name, pretrained=spec.model.pretrained, weights=spec.model.weights)


def ingest_request(spec: StudySpec) -> IngestRequest:
    """What to read, at the side that the backbone's evaluation view is cropped from (image size / crop share)."""
    from orchestrator.ingest.pipeline import IngestRequest
    from trainables.models.backbone import backbone_data_config

    data = spec.data
    view = backbone_data_config(model_of(spec), data.image_size)
    return IngestRequest(
        source=data.source,
        root=data.root,
        id=tuple(data.id),
        ood=tuple(data.ood),
        image_size=math.floor(view.image_size / view.crop_pct),
        interpolation=view.interpolation,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=data.seed,
        on_bad=data.on_bad,
        on_leak=data.on_leak,
        label=data.label,
    )


def make_built_in(model: ModelSpec) -> None:
    """Pretrain a built-in network here, where a person sees it, not in the first trial, for which others wait."""
    from trainables.demo.backbones import is_pretrained_here, pretrained_folder

    if is_pretrained_here(model):
        pretrained_folder(model.name)


def make_task(spec: StudySpec, store: Store) -> Task:
    """What all trials share."""
    from trainables.specs.trial_spec import Task

    search = spec.search
    return Task(
        store=str(store.path),
        model=model_of(spec),
        image_size=spec.data.image_size,
        epochs=search.epochs,
        steps_per_unit=search.steps_per_unit,
        batch_size=search.batch_size,
        train_fraction=spec.data.train_fraction,
        augment=tuple(spec.data.augment),
        evaluate_at=rungs_of(spec),
        precision=search.precision,
        diagnostics=tuple(spec.diagnostics.measure),
        plasticity_probe=spec.diagnostics.plasticity_probe,
        plasticity_source=spec.diagnostics.plasticity_source,
        plasticity_pairs=spec.diagnostics.plasticity_pairs,
    )


def entries_of(spec: StudySpec) -> list[Entry]:
    """The strategies that compete."""
    from orchestrator.search.stages import Entry

    return [Entry(label=s.label, strategy=s.name, fixed=dict(s.fixed), preset=s.preset) for s in spec.strategies]


def metric_of(spec: StudySpec) -> str:
    """The metric that the search maximises: ID validation accuracy, or that of a held-out validation domain."""
    domain = spec.search.validation_domain
    return f"ood/{domain}/acc" if domain else "val/acc"


def rungs_of(spec: StudySpec) -> tuple[int, ...]:
    """Units after which the scheduler may stop a trial."""
    from orchestrator.search.asha import rungs

    search = spec.search
    return rungs(search.epochs, search.grace, search.reduction) if search.scheduler == "asha" else ()


def planned_units(task: Task) -> Callable[[TrialRecord], int]:
    """Trial → units that it takes: its budget, or fewer where its strategy needs no more (linear probing takes one)."""
    from trainables import strategy_class
    from trainables.engine.budget import Plan

    @functools.cache
    def units(strategy: str, hparams: str) -> int:
        try:
            return Plan.of(strategy_class(strategy).from_hparams(json.loads(hparams)), task.epochs, 1).units
        except ValueError:  # the trial itself will say what is wrong
            return task.epochs

    return lambda record: units(record.strategy, json.dumps(dict(record.hparams)))


def make_scheduler(spec: StudySpec, history: Sequence[TrialRecord] = ()) -> Any:
    """ASHA as the study says, or Tune's plain first-in-first-out; `history` = trials of earlier runs."""
    from ray.tune.schedulers import FIFOScheduler

    from orchestrator.search.asha import StudyScheduler

    search = spec.search
    if search.scheduler == "none":
        return FIFOScheduler()
    return StudyScheduler(metric_of(spec), True, search.epochs, search.grace, search.reduction, history)


def stages_of(spec: StudySpec, task: Task, store: Store) -> list[Stage]:
    """What follows the search: folds for leave-one-domain-out, then the best configurations on fresh seeds."""
    from orchestrator.results.selection import top_candidates
    from orchestrator.search.stages import ConfirmStage, FoldStage

    seed, stages = spec.search.seed, list[Any]()
    rule = spec.search.objective
    if rule == "leave_one_domain_out":
        domains = tuple(domain for domain in store.domains if f"ood/{domain}" not in store.splits)
        stages.append(FoldStage(task, lambda records: top_candidates(records, FOLDED, "id_val"), domains, seed))
    if spec.confirm.top_k and spec.confirm.seeds:
        choose = lambda records: top_candidates(records, spec.confirm.top_k, rule)  # noqa: E731
        stages.append(ConfirmStage(task, choose, spec.confirm.seeds, seed))
    if spec.diagnostics.fsr:
        stages.append(references_of(spec, task, store, spec.diagnostics.fsr))
    return stages


def references_of(spec: StudySpec, task: Task, store: Store, references: Sequence[str]) -> ReferenceStage:
    """The reference trials of FSR."""
    from orchestrator.planning.fsr import STRATEGY, ReferenceStage

    wanted, rule, seed = spec.diagnostics, spec.search.objective, spec.search.seed
    fractions, seeds = tuple(wanted.fsr_fractions), wanted.fsr_seeds
    entry = next((entry for entry in entries_of(spec) if entry.strategy == STRATEGY), None)
    return ReferenceStage(task, store, rule, tuple(references), fractions, seeds, seed, entry)
