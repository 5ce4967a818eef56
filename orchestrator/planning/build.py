"""Construction of a study's parts from its study file: data request, task, entries, scheduler, stages."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import FIFOScheduler

from orchestrator.ingest.pipeline import IngestRequest
from orchestrator.planning.fsr import STRATEGY, ReferenceStage
from orchestrator.planning.objectives import metric_of, objectives_of
from orchestrator.planning.view import source_request, view_settings
from orchestrator.record.kept_files import Retention
from orchestrator.record.records import metrics_of
from orchestrator.results.front import front_candidates
from orchestrator.results.selection import top_candidates
from orchestrator.search.asha import StudyScheduler
from orchestrator.search.grace import later_graces
from orchestrator.search.promotion import Promotions
from orchestrator.search.promotion_scheduler import PromotionScheduler
from orchestrator.search.rungs import rungs
from orchestrator.search.searcher import SearchSettings
from orchestrator.search.stages import ConfirmStage, Entry, FoldStage
from orchestrator.search.warm_start import WarmStart
from trainables import strategy_class
from trainables.data.corruption_files import corruptions_in
from trainables.demo.backbones import is_pretrained_here, pretrained_folder
from trainables.engine.budget import BudgetPlan
from trainables.specs.corruptions import CorruptionSettings
from trainables.specs.metrics import CLASSIFICATION, ood
from trainables.specs.trial_spec import LossSettings, ModelSpec, SharedTrialSettings

if TYPE_CHECKING:
    from orchestrator.planning.view import Choices
    from orchestrator.record.records import TrialRecord
    from orchestrator.search.stages import Choose, Stage
    from orchestrator.study_file.schema import StudySpec
    from trainables.data.store import Store
    from trainables.models.backbone import DataConfig


LODO_CANDIDATES = 5
"""Configurations, the best by ID validation, that leave-one-domain-out evaluates: each costs a trial per ID domain."""


def model_of(spec: StudySpec) -> ModelSpec:
    """The backbone of the study."""
    return ModelSpec(name=spec.model.name, pretrained=spec.model.pretrained, weights=spec.model.weights)


def ingest_request(spec: StudySpec, view: DataConfig, recorded: Choices | None = None) -> IngestRequest:
    """The images to read, at the side that they are stored at.

    The evaluation crop is taken from that side (image size / crop share).

    Args:
        spec: the study.
        view: `orchestrator.planning.view.view_of` of it.
        recorded: what an earlier run has decided.
    """
    data = spec.data
    default = "near" if recorded is None else recorded.copies
    return dataclasses.replace(
        source_request(spec),
        image_size=view.stored_size,
        crop_size=view.image_size if view.crop_rounds else None,
        interpolation=view.interpolation,
        on_bad=data.on_bad,
        on_leak=data.on_leak,
        copies=default if data.copies is None else data.copies,
    )


def make_built_in(model: ModelSpec) -> None:
    """Pretrain a built-in network in the driver.

    Its progress is visible there, unlike in the first trial.
    """
    if is_pretrained_here(model):
        pretrained_folder(model.name)


def make_task(spec: StudySpec, store: Store) -> SharedTrialSettings:
    """The settings that all trials share."""
    search = spec.search
    return SharedTrialSettings(
        store=str(store.path),
        model=model_of(spec),
        image_size=spec.data.image_size,
        evaluation=spec.data.evaluation,
        epochs=search.epochs,
        steps_per_unit=search.steps_per_unit,
        batch_size=search.batch_size,
        train_fraction=spec.data.train_fraction,
        augment=tuple(spec.data.augment),
        evaluate_at=evaluated_units(spec),
        interim_splits=interim_splits(spec),
        precision=search.precision,
        # `auto` is decided when the study starts on its machines (`orchestrator.running.measure`).
        channels_last=None if spec.resources.channels_last == "auto" else spec.resources.channels_last,
        diagnostics=tuple(spec.diagnostics.measure),
        plasticity_probe=spec.diagnostics.plasticity_probe,
        plasticity_source=spec.diagnostics.plasticity_source,
        plasticity_pairs=spec.diagnostics.plasticity_pairs,
        task=spec.task,
        metric=spec.search.metric,
        loss=loss_of(spec),
        decoder=spec.model.decoder,
        schedule=search.schedule,
        evaluate_model=search.evaluate_model,
        sampling=spec.data.sampling,
        view=view_settings(spec, store.image_size),
        corruptions=corruptions_of(spec),
    )


def corruptions_of(spec: StudySpec) -> CorruptionSettings | None:
    """Corruptions that confirmed trials are measured under; None = none.

    Raises:
        ValueError: the folder of corrupted pictures is missing or has none.
    """
    evaluate = spec.evaluate
    if evaluate.corruptions is None:
        return None
    folder = evaluate.corruption_folder
    if folder is not None:
        return CorruptionSettings(names=corruptions_in(folder), images=evaluate.images, folder=folder)
    if isinstance(evaluate.corruptions, str):
        return CorruptionSettings(images=evaluate.images)
    return CorruptionSettings(names=tuple(evaluate.corruptions), images=evaluate.images)


def loss_of(spec: StudySpec) -> LossSettings:
    """The changes of the loss that the study asks for."""
    loss = spec.loss
    return LossSettings(
        class_weights=loss.class_weights,
        label_smoothing=loss.label_smoothing,
        focal_gamma=loss.focal_gamma,
        dice=loss.dice,
    )


def entries_of(spec: StudySpec) -> list[Entry]:
    """The strategies that compete."""
    return [
        Entry(label=s.label, strategy=s.name, fixed=dict(s.fixed), preset=s.preset, task=spec.task)
        for s in spec.strategies
    ]


def settings_of(
    spec: StudySpec,
    task: SharedTrialSettings,
    hints: Mapping[str, Mapping[str, Any]],
    warm_start: WarmStart | None = None,
) -> SearchSettings:
    """The search of a study.

    Args:
        task: `make_task` of the study.
        hints: see `orchestrator.planning.fsr.Hints`.
        warm_start: see `orchestrator.planning.warm_start.warm_start_of`.
    """
    return SearchSettings(
        entries=entries_of(spec),
        task=task,
        trials=spec.search.trials,
        sampler=spec.search.sampler,
        allocation=spec.search.allocation,
        seed=spec.search.seed,
        metrics=metrics_of(spec),
        objectives=objectives_of(spec),
        hints=hints,
        warm_start=warm_start or WarmStart(),
    )


def retention_of(spec: StudySpec) -> Retention:
    """Which trials retain their weights and predictions."""
    folds = spec.search.objective == "leave_one_domain_out"
    return Retention(spec.keep, metric_of(spec), metrics_of(spec), LODO_CANDIDATES if folds else 0)


def rungs_of(spec: StudySpec) -> tuple[int, ...]:
    """Units after which the scheduler may stop or pause a trial."""
    search = spec.search
    return () if search.scheduler == "none" else rungs(search.epochs, search.grace, search.reduction)


def evaluated_units(spec: StudySpec) -> tuple[int, ...]:
    """Units before the last at which search trials are evaluated on test or OOD images.

    They are the rungs, where the study asks for it or its objective is measured there. With `keep: all`, too: whether a
    trial is stopped is decided when its process has reported the unit, so that its scores must be there by then.
    """
    needed = spec.search.evaluate_at_rungs or spec.keep == "all" or spec.search.validation_domain is not None
    return rungs_of(spec) if needed else ()


def interim_splits(spec: StudySpec) -> tuple[str, ...] | None:
    """Splits that are evaluated at `evaluated_units`; None = all."""
    domain = spec.search.validation_domain
    if domain is None or spec.search.evaluate_at_rungs or spec.keep == "all":
        return None
    return (ood(domain),)


def planned_units(task: SharedTrialSettings) -> Callable[[TrialRecord], int]:
    """Trial → its units of budget.

    The task's, or fewer if its strategy needs fewer (linear probing takes one).
    """

    @functools.cache
    def units(strategy: str, hparams: str) -> int:
        try:
            chosen = strategy_class(strategy, task.task).from_hparams(json.loads(hparams))
            return BudgetPlan.of(chosen, task.epochs, 1).units
        except ValueError:  # the trial itself will fail with this error
            return task.epochs

    # As JSON: a mapping cannot be a key of the cache.
    return lambda record: units(record.strategy, json.dumps(dict(record.hparams)))


def make_promotions(spec: StudySpec, history: Sequence[TrialRecord] = ()) -> Promotions | None:
    """Which trials wait at their rungs; None = the study pauses none. `history` = trials of earlier runs."""
    if spec.search.scheduler != "promote":
        return None
    labels = [entry.label for entry in entries_of(spec)]
    maximise = metrics_of(spec).selection.direction == "max"
    return Promotions.replay(
        rungs_of(spec), spec.search.reduction, history, metric_of(spec), maximise, labels, _later_graces(spec)
    )


def _later_graces(spec: StudySpec) -> dict[str, float]:
    return later_graces(entries_of(spec), spec.search.grace, spec.search.reduction)


def make_scheduler(
    spec: StudySpec, history: Sequence[TrialRecord] = (), promotions: Promotions | None = None
) -> FIFOScheduler:
    """The study's scheduler: pause and promote, ASHA, or Tune's first-in-first-out.

    Args:
        spec: the study.
        history: trials of earlier runs.
        promotions: `make_promotions` of the study, shared with the searcher.
    """
    search = spec.search
    if search.scheduler == "none":
        return FIFOScheduler()
    maximise = metrics_of(spec).selection.direction == "max"
    rule = (metric_of(spec), maximise, search.epochs, search.grace, search.reduction)
    if promotions is not None:
        return PromotionScheduler(promotions, *rule)
    return StudyScheduler(*rule, history, _later_graces(spec))


def stages_of(spec: StudySpec, task: SharedTrialSettings, store: Store) -> list[Stage]:
    """The stages after the search: folds for leave-one-domain-out, confirmation on fresh seeds, FSR references."""
    stages: list[Stage] = []
    seed = spec.search.seed
    rule = spec.search.objective
    if rule == "leave_one_domain_out":
        domains = tuple(domain for domain in store.domains if ood(domain) not in store.splits)
        stages.append(FoldStage(task, _best_by(spec, LODO_CANDIDATES, "id_val"), domains, seed))
    costs = spec.search.costs
    count = spec.confirm.count(len(spec.strategies), bool(costs))
    if count and spec.confirm.seeds:
        alike = functools.partial(solved_in_closed_form, epochs=task.epochs, task=task.task)
        choose = _best_by(spec, count, rule)
        if costs:
            choose = functools.partial(front_candidates, k=count, costs=costs, rule=rule, metrics=metrics_of(spec))
        stages.append(ConfirmStage(task, choose, spec.confirm.seeds, seed, deterministic=alike))
    if spec.diagnostics.fsr:
        stages.append(references_of(spec, task, store, spec.diagnostics.fsr))
    return stages


def solved_in_closed_form(
    strategy: str, hparams: Mapping[str, Any], epochs: int, task: str = CLASSIFICATION.task
) -> bool:
    """Whether every phase of a configuration is solved, not trained.

    All seeds then give the same trial.
    """
    try:
        phases = strategy_class(strategy, task).from_hparams(hparams).phases(epochs)
    except ValueError:  # the trial itself will fail with this error
        return False
    return all(phase.solve is not None for phase in phases)


def _best_by(spec: StudySpec, count: int, rule: str) -> Choose:
    return functools.partial(top_candidates, k=count, rule=rule, metrics=metrics_of(spec))


def references_of(
    spec: StudySpec, task: SharedTrialSettings, store: Store, references: Sequence[str]
) -> ReferenceStage:
    """The reference trials of FSR."""
    diagnostics = spec.diagnostics
    return ReferenceStage(
        task=task,
        store=store,
        rule=spec.search.objective,
        references=tuple(references),
        fractions=tuple(diagnostics.fsr_fractions),
        seeds=diagnostics.fsr_seeds,
        seed=spec.search.seed,
        entry=next((entry for entry in entries_of(spec) if entry.strategy == STRATEGY), None),
        metrics=metrics_of(spec),
    )
