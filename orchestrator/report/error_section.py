"""The report's section on errors: what each entry's representative trial gets wrong, and which features moved.

Values for the template, from kept predictions; names of classes, domains and samples are escaped there. What it has of
segmentation is in `orchestrator.report.mask_section`; a study of another task gets one sentence in its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.record.kept_paths import predictions_file
from orchestrator.record.records import TrialRecord
from orchestrator.report.mask_section import mask_entry
from orchestrator.report.similarity import FeatureSimilarity
from orchestrator.report.thumbnails import Thumbnails, find_store
from orchestrator.results import figures
from orchestrator.results.errors import (
    TopClasses,
    class_counts,
    class_names,
    confident_errors,
    confused_pairs,
    confusion_matrix,
    extremes_by_class,
    reliability,
    split_names,
    top_classes,
)
from orchestrator.results.predictions import PredictionsError, read_predictions
from orchestrator.results.reliability_figure import SplitReliability, reliability_figure
from orchestrator.results.selection import confirmations, representative
from orchestrator.wording import counted, listed
from trainables.specs.metrics import CLASSIFICATION, ECE, ECE_SCALED, SEGMENTATION, TEMPERATURE, TEST, ood_domain

if TYPE_CHECKING:
    from orchestrator.results.errors import Floats, Integers
    from orchestrator.results.study_results import Results

Similarities = Mapping[int, FeatureSimilarity | str]
"""Number of a trial → its similarities, or the reason why they could not be measured."""

TEMPLATES = {CLASSIFICATION.task: "errors.html", SEGMENTATION.task: "mask_errors.html"}
"""Task → template of its section."""
MATRIX_CLASSES = 20
"""Up to this many classes the confusion matrix is shown; of more, the pairs that are confused most."""
MOST_PAIRS = 20
MOST_CLASSES = 100
"""Rows of the table of classes."""
MOST_ERRORS = 12
"""Pictures of errors per split."""
MOST_MOVED = 10
"""Pictures per split whose features moved most, and as many whose features moved least."""
MOST_PANELS = 8
"""Splits in a reliability diagram."""


@dataclass(frozen=True)
class _Split:
    """Predictions of one trial on one split."""

    key: str
    """In the data store."""
    title: str
    top: TopClasses
    in_store: bool
    """Whether thumbnails of its samples can be made."""


def representatives(results: Results) -> dict[str, TrialRecord]:
    """The trial that is looked at of each entry with a complete trial: the chosen entry's first, then best first.

    Of the entry's chosen configuration the one that `luthier export` exports
    (`orchestrator.results.selection.representative`).

    Raises:
        ValueError: no complete trial.
    """
    first = results.decision().choice
    choices = {first.record.label: first, **{k: v for k, v in results.per_label().items() if k != first.record.label}}
    return {label: representative(results.records, choice, results.metrics).record for label, choice in choices.items()}


def error_section(results: Results, dataset_digest: str, similarities: Similarities | None = None) -> dict[str, Any]:
    """Values of the section for the template.

    Args:
        dataset_digest: of the study's data store, for the thumbnails.
        similarities: of the representative trials; None = not measured.
    """
    task = results.metrics.task
    if task not in TEMPLATES:
        problem = f"Confusion, results per class and pictures of errors are shown for {listed(list(TEMPLATES))}; the "
        return nothing(f"{problem}task of this study is {task}.")
    try:
        trials = representatives(results)
    except ValueError as error:
        return nothing(str(error))
    store = None if results.folder is None else find_store(results.folder, dataset_digest)
    thumbnails = Thumbnails(store)
    entries = []
    lacking: dict[str, list[str]] = {}
    for label, record in trials.items():
        try:
            if task == SEGMENTATION.task:
                entries.append(mask_entry(results, record, thumbnails))
            else:
                entries.append(_entry(results, record, thumbnails, similarities))
        except PredictionsError as error:
            reason = "" if _was_never_there(results, record) else str(error)
            lacking.setdefault(reason, []).append(f"{label} (trial {record.number})")
    for entry in entries[:1]:
        entry["open"] = True
    notes = [reason or _not_kept(labels) for reason, labels in lacking.items()]
    if entries and store is None:
        notes.append(
            "No pictures are shown, because the study's data store is not beside its folder: `luthier run` makes it "
            "again, then `luthier report` shows them."
        )
    elif thumbnails.left <= 0:
        notes.append("Pictures are left out from where the page had as many as it may have.")
    return {"problem": " ".join(notes), "entries": entries, "template": TEMPLATES[task]}


def nothing(problem: str) -> dict[str, Any]:
    """The section of a study whose errors cannot be shown."""
    return {"problem": problem, "entries": [], "template": TEMPLATES[CLASSIFICATION.task]}


def _not_kept(labels: Sequence[str]) -> str:
    return (
        f"Errors of {listed(labels, most=8)} are not shown, because their predictions are not kept: a study keeps "
        "those of each entry's best search trial and of every confirmed trial (`keep: best`, the default) until "
        "`luthier prune` removes them; run it again under another name to have them."
    )


def _was_never_there(results: Results, record: TrialRecord) -> bool:
    return results.folder is None or not predictions_file(results.folder, record.number).exists()


def _entry(
    results: Results, record: TrialRecord, thumbnails: Thumbnails, similarities: Similarities | None
) -> dict[str, Any]:
    """One entry's values.

    Raises:
        PredictionsError: its trial has no readable predictions.
    """
    if results.folder is None:
        raise PredictionsError("The folder of the study is not known.")
    path = predictions_file(results.folder, record.number)
    table = read_predictions(path)
    classes = class_names(table)
    if classes is None or table.column("output").type.list_size != len(classes):
        raise PredictionsError(f"{path} must name the class of each output, but it does not.")
    temperature = record.metric(TEMPERATURE.name)
    splits = []
    for key in split_names(table):
        domain = ood_domain(key)
        if key == TEST or domain is not None:
            top = top_classes(table, key, temperature)
            title = "ID test" if domain is None else f"OOD {domain}"
            splits.append(_Split(key, title, top, thumbnails.has(key, list(top.names))))
    similarity = None if similarities is None else similarities.get(record.number)
    order, classes_note = _class_order(splits, len(classes))
    return {
        "label": record.label,
        "title": _title(results, record, splits),
        "open": False,
        "reliability": _reliability(record, splits, temperature),
        "classes": _class_table(splits, classes, order),
        "classes_note": classes_note,
        "moved_note": _moved_note(similarity, similarities is not None),
        "splits": [_split(split, classes, thumbnails, similarity) for split in splits],
    }


def _title(results: Results, record: TrialRecord, splits: Sequence[_Split]) -> str:
    role = "search trial, not confirmed"
    if record.role == "confirm":
        seeds = len(confirmations(results.records, record.config_hash))
        role = f"of {seeds} confirmed seeds the median on validation" if seeds > 1 else "confirmed"
    groups = {"ID test": [split for split in splits if split.key == TEST]}
    groups["OOD"] = [split for split in splits if split.key != TEST]
    wrong = [
        f"{sum(int((~split.top.right).sum()) for split in members):,} of "
        f"{sum(len(split.top.targets) for split in members):,} on {name}"
        for name, members in groups.items()
        if members
    ]
    return f"trial {record.number} ({role}); wrong: {', '.join(wrong)}"


def _reliability(record: TrialRecord, splits: Sequence[_Split], temperature: float | None) -> dict[str, str] | None:
    panels = []
    for split in splits[:MOST_PANELS]:
        scaled = split.top.scaled
        panels.append(
            SplitReliability(
                title=split.title,
                before=reliability(split.top.confidence, split.top.right),
                after=None if scaled is None else reliability(scaled, split.top.right),
                error=record.metric(ECE.on(split.key)),
                error_scaled=record.metric(ECE_SCALED.on(split.key)),
            )
        )
    if not panels:
        return None
    note = "accuracy by confidence; the area of a point is the share of the samples"
    note += "; no temperature is recorded" if temperature is None else f"; temperature {temperature:.2f}"
    if len(splits) > MOST_PANELS:
        note += f"; {counted(len(splits) - MOST_PANELS, 'further domain')} left out"
    return {"source": figures.data_uri(reliability_figure(panels)), "note": note}


def _class_order(splits: Sequence[_Split], classes: int) -> tuple[list[int], str]:
    """Classes in the table, lowest F1 on ID test first, and a note on what is there."""
    f1 = class_counts(splits[0].top, classes).f1
    order = np.argsort(np.where(np.isfinite(f1), f1, math.inf), kind="stable").tolist()
    note = f"Lowest F1 on {splits[0].title} first."
    if classes > MOST_CLASSES:
        note += f" {classes - MOST_CLASSES} classes above are left out; the artifact `per_class` of the trial has all."
    return order[:MOST_CLASSES], note


def _class_table(splits: Sequence[_Split], classes: Sequence[str], order: Sequence[int]) -> dict[str, Any]:
    counts = [class_counts(split.top, len(classes)) for split in splits]
    rows = []
    for label in order:
        cells = []
        for count in counts:
            cells += [
                str(int(count.images[label])),
                *(_percent(m[label]) for m in (count.recall, count.precision, count.f1)),
            ]
        rows.append([classes[label], *cells])
    return {"groups": [split.title for split in splits], "rows": rows}


def _split(
    split: _Split, classes: Sequence[str], thumbnails: Thumbnails, similarity: FeatureSimilarity | str | None
) -> dict[str, Any]:
    top = split.top
    wrong = int((~top.right).sum())
    values: dict[str, Any] = {
        "title": split.title,
        "note": f"{wrong} of {len(top.targets)} wrong",
        "matrix": _matrix(top, classes) if len(classes) <= MATRIX_CLASSES else None,
        "pairs": _pairs(top, classes) if len(classes) > MATRIX_CLASSES and wrong else None,
        "errors": [],
        "moved": [],
    }
    if split.in_store:
        positions = confident_errors(top, MOST_ERRORS)
        values["errors"] = list(_tiles(split, positions, classes, thumbnails))
        if isinstance(similarity, FeatureSimilarity) and split.key in similarity.cosines:
            values["moved"] = _moved(split, similarity.cosines[split.key], classes, thumbnails)
    return values


def _matrix(top: TopClasses, classes: Sequence[str]) -> dict[str, Any]:
    """Rows of (class, cells); a cell has its count, its share of the row in 0 … 1 and whether it is on the diagonal."""
    counts = confusion_matrix(top.targets, top.predicted, len(classes))
    sums = counts.sum(1)
    rows = []
    for label, name in enumerate(classes):
        cells = [
            {
                "count": int(count) or "",
                "share": round(int(count) / max(1, int(sums[label])), 3),
                "right": label == predicted,
            }
            for predicted, count in enumerate(counts[label])
        ]
        rows.append({"name": name, "cells": cells})
    return {"classes": list(classes), "rows": rows}


def _pairs(top: TopClasses, classes: Sequence[str]) -> list[list[str]]:
    return [
        [classes[pair.label], classes[pair.predicted], str(pair.images), _percent(pair.share)]
        for pair in confused_pairs(top, MOST_PAIRS)
    ]


def _moved(split: _Split, cosines: Floats, classes: Sequence[str], thumbnails: Thumbnails) -> list[dict[str, Any]]:
    groups = (
        ("Features moved most", "lowest cosine similarity", False),
        ("Features moved least", "highest cosine similarity", True),
    )
    return [
        {
            "title": title,
            "note": note,
            "tiles": list(
                _tiles(
                    split,
                    extremes_by_class(cosines, split.top.targets, MOST_MOVED, largest),
                    classes,
                    thumbnails,
                    cosines,
                )
            ),
        }
        for title, note, largest in groups
    ]


def _tiles(
    split: _Split,
    positions: Integers,
    classes: Sequence[str],
    thumbnails: Thumbnails,
    cosines: Floats | None = None,
) -> Iterator[dict[str, Any]]:
    """Pictures with their captions: label and prediction, then confidence or cosine similarity."""
    top = split.top
    for position in positions.tolist():
        source = thumbnails.uri(split.key, position)
        if source is None:
            return
        yield {
            "source": source,
            "label": classes[top.targets[position]],
            "predicted": classes[top.predicted[position]],
            "right": bool(top.right[position]),
            "number": f"{100 * top.confidence[position]:.1f}\N{NO-BREAK SPACE}%"
            if cosines is None
            else f"cosine {cosines[position]:.3f}",
            "name": top.names[position],
        }


def _moved_note(similarity: FeatureSimilarity | str | None, measured: bool) -> str:
    if not measured:
        return (
            "The pictures whose features moved most and least from the pretrained network are shown by "
            "`luthier report --features chosen` (or `all`), which computes both networks' features."
        )
    if similarity is None:
        return "Features were compared for the chosen entry only: `luthier report --features all` compares all."
    if isinstance(similarity, str):
        return f"Features could not be compared: {similarity}"
    if similarity.unchanged:
        return "Its features are those of the pretrained network: only the head was trained."
    return (
        "Pictures whose features moved are those of the lowest and the highest cosine similarity between the features "
        "of the pretrained and of the tuned network, of each class where there are few (Ha et al., 2024, Fig. 6 to 9)."
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "–"
