"""`luthier export`: the model of one trial of a study.

As a folder that needs neither the study nor Luthier.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import binomtest

from orchestrator.commands.segmentation_export import (
    classes_behind,
    compare_with_recorded_masks,
    training_pixels,
    tuned_segmenter,
)
from orchestrator.commands.status import find_study, read_journal
from orchestrator.errors import Problem, StudyError
from orchestrator.export.card import CardFacts, Score
from orchestrator.export.errors import ExportError, RefusedExportError
from orchestrator.export.export import Exported, TunedModel, check_target, export_model
from orchestrator.export.formats import BACKBONE
from orchestrator.export.segmentation_export import export_segmenter
from orchestrator.export.segmentation_formats import check_segmentation_format
from orchestrator.ingest.errors import DataError
from orchestrator.record.kept_paths import weights_folder
from orchestrator.record.records import TrialRecord, fold, metrics_of, study_header, validation_score
from orchestrator.results.comparison import Competitor
from orchestrator.results.comparison import Score as IntervalScore
from orchestrator.results.kept_model import preprocessing_of, read_kept
from orchestrator.results.predictions import SampleTables
from orchestrator.results.selection import reported_trials, representative
from orchestrator.results.study_results import Results
from orchestrator.running.refit import REFIT, OnUnit
from orchestrator.running.refit import refit as train_again
from orchestrator.study_file.load import load_study
from orchestrator.wording import counted
from trainables.data.store import MANIFEST, Store, StoreError
from trainables.data.transforms import BatchTransform
from trainables.engine.tuned_network import HEAD, low_rank_update, tuned_network
from trainables.models.backbone import DataConfig, load_pretrained
from trainables.models.task_model import TaskModel
from trainables.specs.metrics import ACCURACY, SEGMENTATION, TEST, VAL, TaskMetrics, ood
from trainables.specs.trial_spec import ModelSpec
from trainables.storage.checkpoint_format import bitwise_equal
from trainables.storage.kept_weights import KeptWeights
from trainables.tasks.segmentation import DenseModel

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.record.journal import Event
    from orchestrator.study_file.schema import StudySpec

COMPARED = "An export is compared with the record on the test pictures of"
TRAINED = "A refit trains on"
"""Purposes of a data store, for `find_store`."""
BATCH = 256
"""Pictures per forward pass of the comparison with the record, as in a trial's evaluation."""
RECORD_TOLERANCE = 0.01
"""Share of test pictures whose class may differ from the recorded accuracy: trials on a GPU compute in bfloat16, this
comparison in float32. On the CPU none differs."""


@dataclass(frozen=True)
class Selected:
    """The trial that is exported, and why."""

    record: TrialRecord
    reason: str


@dataclass(frozen=True)
class StudyExport:
    """Outcome of the command."""

    exported: Exported
    selected: Selected
    refit: bool = False
    """Whether the configuration was trained once more, on training and validation images."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        proof = self.exported.proof
        return {
            "folder": str(self.exported.folder),
            "format": self.exported.format,
            "trial": self.selected.record.number,
            "label": self.selected.record.label,
            "refit": self.refit,
            "reason": self.selected.reason,
            "proof": {"pictures": proof.pictures, "difference": proof.difference, "tolerance": proof.tolerance},
        }

    def render(self, console: Console) -> None:
        """Print what was exported and how it was compared."""
        lines = [self.selected.reason, self.exported.proof.sentence(), f"Wrote {self.exported.folder}"]
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def export_study(
    study: Path,
    folder: Path,
    *,
    trial: int | None = None,
    entry: str | None = None,
    format_name: str = "timm",
    refit: bool = False,
    on_unit: OnUnit | None = None,
) -> StudyExport:
    """Export the model of one trial, or of its configuration trained once more.

    Args:
        study: study file or folder.
        folder: to write; new or empty.
        trial: number of a trial; None = chosen, see `select_trial`.
        entry: label of an entry whose chosen configuration is exported; None = the study's best.
        format_name: a key of `orchestrator.export.formats.FORMATS`.
        refit: train the configuration on training and validation images (`orchestrator.running.refit`).
        on_unit: reports the progress of a refit.

    Raises:
        StudyError: both a trial and an entry, or one that the study does not have.
        WeightsError: the trial's weights are not kept, or damaged.
        DataError: the data store of the trial is gone.
        RefusedExportError: the configuration cannot be trained again.
        ExportError: the network does not give the recorded accuracy, or see `export_model`.
    """
    # First: reading weights and comparing the network take minutes.
    check_target(folder, format_name)
    spec, study_folder = find_study(study)
    if spec.task == SEGMENTATION.task:
        check_segmentation_format(format_name)
    events = read_journal(spec, study_folder)
    records = fold(events)
    selected = select_trial(records, spec, trial, entry)
    if refit:
        selected, kept, store = _refitted(study_folder, events, selected, on_unit)
    else:
        kept = read_kept(study_folder, selected.record)
        store = find_store(study_folder.parent / "data", str(kept.meta["store_digest"]), COMPARED)
    model = ModelSpec(**kept.meta["model"])
    pretrained = load_pretrained(model, kept.meta["requested_image_size"])
    if format_name == "peft":
        check_adapter(kept, pretrained.module.state_dict())
    network = tuned_network(kept, pretrained)
    metrics = metrics_of(spec)
    tables = SampleTables(study_folder)
    scores = scores_of(selected.record, records, store, metrics, tables)
    facts = card_facts(spec, kept, selected, scores, store, network)
    if isinstance(network, DenseModel):
        sentence = compare_with_recorded_masks(network, kept, store, selected.record, metrics)
        segmenter = tuned_segmenter(network, kept, pretrained, store, facts, [sentence])
        return StudyExport(export_segmenter(segmenter, folder, format_name), selected, refit)
    preprocessing = preprocessing_of(kept)
    sentence = compare_with_record(network, store, preprocessing, selected.record, metrics)
    tuned = TunedModel(
        network=network,
        spec=model,
        preprocessing=preprocessing,
        classes=list(kept.meta["classes"]),
        facts=facts,
        pictures=np.asarray(store.images(TEST)),
        update=low_rank_update(kept),
        pretrained=pretrained.module,
        proof=[sentence],
    )
    return StudyExport(export_model(tuned, folder, format_name), selected, refit)


def _refitted(
    study_folder: Path, events: Sequence[Event], selected: Selected, on_unit: OnUnit | None
) -> tuple[Selected, KeptWeights, Store]:
    """The refit in place of the selected trial, its weights and its data.

    Raises:
        DataError: the trial's data store is gone.
        RefusedExportError: see `orchestrator.running.refit.refit`.
    """
    record = selected.record
    store = find_store(study_folder.parent / "data", _digest_of_data(study_folder, events, record), TRAINED)
    # As the study last ran: a study file may have been edited since.
    spec = load_study(study_folder / "study.yaml")
    kept = train_again(study_folder, spec, record, store, on_unit)
    images = len(store.labels("val")) + store.fraction("train", spec.data.train_fraction)
    reason = (
        f"Trained once more on training and validation pictures together ({images}); no validation number stands "
        f"behind it. The configuration and the seed are those of the following. {selected.reason}"
    )
    metrics = {name: math.nan if value is None else value for name, value in kept.meta["result"].items()}
    return Selected(dataclasses.replace(record, metrics=metrics, role="refit"), reason), kept, store


def _digest_of_data(study_folder: Path, events: Sequence[Event], record: TrialRecord) -> str:
    """Digest of the data that a trial was trained on: of its kept weights, else of the study.

    Raises:
        DataError: neither has one.
    """
    if weights_folder(study_folder, record.number).is_dir():
        return str(read_kept(study_folder, record).meta["store_digest"])
    digest = study_header(events).get("dataset_digest")
    if digest is None:
        raise DataError(
            f"A refit needs the data of trial {record.number}, but neither kept weights nor the journal of "
            f"{study_folder} name them. Run the study again."
        )
    return str(digest)


def select_trial(
    records: Sequence[TrialRecord], spec: StudySpec, trial: int | None = None, entry: str | None = None
) -> Selected:
    """The trial that is exported.

    Of the configuration that the study's selection rule chooses (over all entries or in one), the confirmed trial whose
    validation score is the median over the seeds, the lower one of two; without confirmed trials the search trial.

    Raises:
        StudyError: both a trial and an entry, or one that the study does not have.
        ValueError: no trial is complete.
    """
    if trial is not None and entry is not None:
        raise _usage("trial", "give either --trial or --entry, but got both.")
    if trial is not None:
        return _numbered(records, trial)
    labels = [strategy.label for strategy in spec.strategies]
    if entry is not None and entry not in labels:
        raise _usage("entry", f"an entry of this study is one of {', '.join(labels)}, but got {entry!r}.")
    results = Results(records, spec)
    choice = results.best(results.rule, entry)
    metrics = metrics_of(spec)
    among = f"entry {choice.record.label}" if entry is not None else f"all entries, of {choice.record.label},"
    chosen = representative(records, choice, metrics)
    if not chosen.scores:
        return Selected(
            choice.record,
            f"Trial {choice.record.number}: the search trial that the rule {choice.rule} chooses among {among} whose "
            "configuration was not confirmed on fresh seeds.",
        )
    text = metrics.selection.text
    if len(chosen.scores) == 1:
        return Selected(
            chosen.record,
            f"Trial {chosen.record.number}: the confirmed seed of the configuration that the rule {choice.rule} "
            f"chooses among {among.removesuffix(',')}, {text(chosen.value)} on validation.",
        )
    return Selected(
        chosen.record,
        f"Trial {chosen.record.number}: of the {counted(len(chosen.scores), 'confirmed seed')} of the configuration "
        f"that the rule {choice.rule} chooses among {among} the median on validation, {text(chosen.value)} "
        f"(all: {', '.join(text(score) for score in chosen.scores)}).",
    )


def check_adapter(kept: KeptWeights, pristine: Mapping[str, torch.Tensor]) -> None:
    """Refuse peft for weights that no adapter gives, before anything is computed.

    Args:
        pristine: the pretrained tensors, by the backbone's names.

    Raises:
        RefusedExportError: the trial has no low-rank update, or its weights were interpolated after it.
    """
    interpolated = kept.meta.get("interpolated")
    if interpolated is not None:
        raise RefusedExportError(
            f"A peft adapter is added to the pretrained weights, but those of trial {kept.meta['number']} were "
            f"interpolated after training ({interpolated}), which no adapter expresses. Use --format timm, merged."
        )
    # Buffers of BatchNorm are kept also where nothing moved them.
    rest = [
        name
        for name, value in kept.tensors.items()
        if not name.startswith(HEAD) and not bitwise_equal(value, pristine.get(name.removeprefix(BACKBONE)))
    ]
    if not kept.adapter or rest:
        raise RefusedExportError(
            f"A peft adapter holds low-rank updates and the head, but trial {kept.meta['number']} "
            f"({kept.meta['strategy']}) tuned {'other tensors' if rest else 'the head alone'}"
            f"{f', such as {rest[0]}' if rest else ''}. Use --format timm."
        )


def find_store(stores: Path, digest: str, purpose: str) -> Store:
    """The data store with a digest.

    Args:
        purpose: the sentence that says what it is needed for, up to its name.

    Raises:
        DataError: it is gone or damaged.
    """
    for manifest in sorted(stores.glob(f"*/{MANIFEST}")):
        store = Store(manifest.parent)
        try:
            if store.digest == digest:
                store.verify()
                return store
        except StoreError as error:
            raise DataError(str(error)) from error
    raise DataError(
        f"{purpose} its data store, of SHA-256 {digest[:12]}…, but {stores} has no such store. "
        "`luthier run` reads the data again, if they have not changed."
    )


@torch.no_grad()
def compare_with_record(
    network: TaskModel, store: Store, preprocessing: DataConfig, record: TrialRecord, metrics: TaskMetrics
) -> str:
    """Compare the network's accuracy on the test split with the record.

    Returns the comparison in a sentence.

    Raises:
        ExportError: they differ.
    """
    transform = BatchTransform(preprocessing.mean, preprocessing.std, preprocessing.image_size, ())
    pixels = store.images(TEST)
    labels = torch.tensor(store.labels(TEST))
    starts = range(0, len(pixels), BATCH)
    logits = torch.cat([network(transform(torch.tensor(pixels[start : start + BATCH]))) for start in starts])
    right = int((logits.argmax(1) == labels).sum())
    recorded = record.metric(metrics.test)
    if recorded is None:
        return f"{right} of {len(labels)} test pictures are classified right; the record has no {metrics.test}."
    expected = round(recorded * len(labels))
    allowed = math.ceil(RECORD_TOLERANCE * len(labels))
    if abs(right - expected) > allowed:
        raise ExportError(
            f"A trial's weights must give the recorded {metrics.test} of {recorded:.4f} ({expected} of {len(labels)}), "
            f"but they classify {right} right. Nothing was written."
        )
    return (
        f"The tested network classifies {right} of {len(labels)} test pictures right; the record's {metrics.test} of "
        f"{recorded:.4f} is {expected}."
    )


def card_facts(
    spec: StudySpec,
    kept: KeptWeights,
    selected: Selected,
    scores: Sequence[Score],
    store: Store,
    network: TaskModel,
) -> CardFacts:
    """Facts for the model card."""
    meta = kept.meta
    source = dict(getattr(network.backbone, "pretrained_cfg", {}) or {})
    model = ModelSpec(**meta["model"])
    origin = f" from {source['origin_url']}" if source.get("origin_url") else ""
    pretrained = f"{model.name}{origin}" if model.pretrained else f"none: {model.name} from random weights"
    if model.weights is not None:
        pretrained = f"{model.name}, weights of {Path(model.weights).name}"
    return CardFacts(
        study=spec.name,
        trial=selected.record.number,
        label=selected.record.label,
        strategy=selected.record.strategy,
        choice=selected.reason,
        hparams=dict(meta["hparams"]),
        seed=int(meta["seed"]),
        scores=scores,
        data_digest=str(meta["store_digest"]),
        pretrained=pretrained,
        pretrained_digest=str(meta["pretrained_digest"]),
        licence=source.get("license") if model.weights is None else None,
        limits=_limits(kept, selected.record, store),
        taken_over=meta[REFIT]["taken_over"] if REFIT in meta else None,
    )


def scores_of(
    record: TrialRecord,
    records: Sequence[TrialRecord],
    store: Store,
    metrics: TaskMetrics,
    tables: SampleTables,
) -> list[Score]:
    """Selection metric of the exported trial and of its configuration on every split.

    The trial's number has a 95 % interval over the pictures: of its kept predictions, and Wilson's where an accuracy
    has none. The mean over the configuration's confirmed seeds has the leaderboard's interval, over pictures and seeds
    where predictions are kept.
    """
    splits = {metrics.best_validation: VAL, metrics.test: TEST}
    splits |= {metrics.of_domain(name): ood(name) for name in metrics.domains(record.metrics)}
    # A refit has seen the validation pictures.
    values = {name: record.metric(name) for name in splits}
    values[metrics.best_validation] = validation_score(record, metrics)
    runs = [run for run in reported_trials(records, record.config_hash) if run.role == "confirm"]
    configuration = Competitor(record.label, record.strategy, record, runs, metrics, tables)
    scores = []
    for name, split in splits.items():
        value = values[name]
        if value is None or split not in store.splits:
            continue
        samples = len(store.labels(split))
        text = _of_trial(record, name, value, samples, metrics, tables) + classes_behind(record, split)
        over_seeds = configuration.score(name) if len(runs) > 1 else None
        shown = metrics.validation if split == VAL else name
        scores.append(Score(shown, text, samples, "" if over_seeds is None else _of_seeds(over_seeds, metrics)))
    return scores


def _of_trial(
    record: TrialRecord, name: str, value: float, samples: int, metrics: TaskMetrics, tables: SampleTables
) -> str:
    """A metric of one trial with its interval over the pictures, where there is one."""
    metric = metrics.selection
    # A refit has the number of the trial whose configuration it has, but not its predictions.
    table = None if record.role == REFIT else tables.of([record], name, metrics)
    if table is not None:
        score = IntervalScore.of_table(table)
        low, high = score.low, score.high
    elif metric.key == ACCURACY.key and samples:
        # The recorded share times the samples is the number of hits, but for rounding.
        interval = binomtest(round(value * samples), samples).proportion_ci(method="wilson")
        low, high = interval.low, interval.high
    else:
        return metric.text(value)
    return f"{metric.text(value)} (95 % interval over pictures: {metric.number(low)} to {metric.number(high)})"


def _of_seeds(score: IntervalScore, metrics: TaskMetrics) -> str:
    metric = metrics.selection
    text = f"{metric.text(score.mean)} ({counted(score.seeds, 'seed')}"
    if not score.has_interval:
        return f"{text})"
    over = score.basis.replace("samples", "pictures")
    return f"{text}; 95 % interval over {over}: {metric.number(score.low)} to {metric.number(score.high)})"


def _limits(kept: KeptWeights, record: TrialRecord, store: Store) -> list[str]:
    what = "picture" if store.targets == "labels" else "pixel"
    limits = [
        "The numbers hold for pictures like those of the study's test split and OOD domains. Nothing was measured on "
        f"others, and a {what} of none of the classes gets one of them all the same.",
        "The intervals of this model are over pictures alone. Training again with another seed is covered by those of "
        "its configuration's mean only.",
    ]
    if record.role == "refit":
        limits.append(
            "A refit: the validation pictures were trained on, so no validation number stands behind these weights. "
            "The search chose the configuration and did not see this network. A fitted temperature is the trial's."
        )
    elif record.role != "confirm":
        limits.append("The trial was chosen for its validation score, which is therefore too high on average.")
    interpolated = kept.meta.get("interpolated")
    if interpolated is not None:
        limits.append(f"Its weights are an interpolation between the pretrained and the tuned ones ({interpolated}).")
    splits = ("train", "val") if record.role == "refit" else ("train",)
    if store.targets == "masks":
        absent = [name for name, count in training_pixels(store, splits).items() if count == 0]
        if absent:
            limits.append(f"Classes without a labelled training pixel: {', '.join(absent)}.")
        return limits
    few = [f"{name} ({count})" for name, count in _training_counts(store, splits).items() if count < 10]
    if few:
        limits.append(f"Classes with fewer than ten training pictures: {', '.join(few)}.")
    return limits


def _training_counts(store: Store, splits: Sequence[str]) -> dict[str, int]:
    labels = np.concatenate([store.labels(split) for split in splits])
    counts = np.bincount(labels, minlength=len(store.classes))
    return {name: int(count) for name, count in zip(store.classes, counts, strict=True)}


def _numbered(records: Sequence[TrialRecord], number: int) -> Selected:
    record = next((r for r in records if r.number == number), None)
    if record is None:
        last = max((r.number for r in records), default=None)
        numbers = "it has none" if last is None else f"they are 0 to {last}"
        raise _usage("trial", f"the study has no trial {number}; {numbers}.")
    if record.state != "complete":
        raise _usage("trial", f"trial {number} must be complete, but it is {record.state}.")
    return Selected(record, f"Trial {number} ({record.label}, {record.role}): asked for by its number.")


def _usage(option: str, text: str) -> StudyError:
    return StudyError([Problem((option,), text)], "The command", "cannot export")
