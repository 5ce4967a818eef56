"""Summary of a study's results for its tracked runs.

Tags, metrics and artifacts. Pure; imports no mlflow. It is made from journal records alone, so that a replay of the
journal gives the same contents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.record.records import TrialRecord, metrics_of
from orchestrator.results.curves import Curves, curve_texts, pictures
from orchestrator.results.leaderboard import summary_names
from orchestrator.results.study_results import Results
from trainables.specs.metrics import (
    BEST_EPOCH,
    MEAN_CORRUPTION_ERROR,
    NORMALISED_MCE,
    REGRET,
    RELATIVE_MCE,
    TRIALS,
    TaskMetrics,
)

Render = Callable[[], bytes | Mapping[str, bytes]]
"""Contents of an artifact, or of several by path; any exception: it cannot be rendered."""
Page = Callable[[Mapping[str, Any], Sequence[TrialRecord], Mapping[str, Mapping[str, Any]]], Mapping[str, bytes]]
"""(header, records, measurements) → the report and its figures by artifact path."""


ROBUSTNESS = (MEAN_CORRUPTION_ERROR.name, NORMALISED_MCE.name, RELATIVE_MCE.name)
"""Columns of the leaderboard that are metrics of the study's run, where corruptions were measured."""

logger = logging.getLogger("luthier")


@dataclass(frozen=True)
class Summary:
    """Contents of one run."""

    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, Render] = field(default_factory=dict)
    """Artifact path → its contents, rendered when it is delivered."""
    trial_files: Mapping[int, Mapping[str, Render]] = field(default_factory=dict)
    """Number of a trial → further artifacts of its run."""


@dataclass(frozen=True)
class Summarizer:
    """Makes the summaries of a study and its trials.

    Drawing takes far longer than everything else about a run, so by default pictures are drawn where they are looked
    at: for the study, for confirmations, and for the best trial of every label once the study is complete. The numbers
    behind every picture are artifacts of every trial.
    """

    pages: Mapping[str, Page] = field(default_factory=dict)
    """Artifact path → page about the study, with the artifacts that it brings with it."""
    all_pictures: bool = False
    """Draw the curves of every complete trial."""

    def curve_files(
        self, header: Mapping[str, Any], curves: Curves, record: TrialRecord | None = None
    ) -> dict[str, Render]:
        """Artifacts of the curves of one event.

        Numbers as JSON, and pictures of a study's own curves.
        """
        files: dict[str, Render] = {name: text.encode for name, text in curve_texts(curves, record).items()}
        if record is None:
            files |= _drawn(curves, None, _task_metrics(header))
        return files

    def trial(self, header: Mapping[str, Any], record: TrialRecord) -> Summary:
        """Final contents of a trial's run that the trial did not report itself."""
        task = _task_metrics(header)
        draw = record.state == "complete" and (self.all_pictures or record.role == "confirm")
        return Summary(
            metrics=_best_of_history(record, task),
            files=_drawn(record.curves, record, task) if draw else {},
        )

    def study(
        self, header: Mapping[str, Any], records: Sequence[TrialRecord], measurements: Mapping[str, Mapping[str, Any]]
    ) -> Summary:
        """Contents of the study's run.

        Leaderboard and findings as its note, numbers of the chosen configuration. A study without a complete trial has
        a note that gives the reason.

        Args:
            header: as `orchestrator.record.records.study_header`.
            records: the trials, by number.
            measurements: as `orchestrator.record.records.measurements`.
        """
        states = Counter(record.state for record in records)
        counts = {TRIALS.of(state): float(states[state]) for state in ("complete", "pruned", "failed")}
        spec = {**(header.get("spec") or {}), "name": header["study"]}
        try:
            results = Results(records, spec, measurements=measurements)
        except ValueError as error:  # the task is a plug-in of the driver's process
            return Summary(tags={"mlflow.note.content": f"# {header['study']}\n\n{error}\n"}, metrics=counts)
        try:
            summary = _leaderboard_summary(results)
        except ValueError as error:
            summary = Summary(tags={"mlflow.note.content": _note_without_leaderboard(results, str(error))})
        except Exception as error:  # a summary that cannot be made must not block the record
            logger.exception("The summary of the study could not be made")
            note = f"# {results.name}\n\nThe summary could not be made: {type(error).__name__}: {error}\n"
            summary = Summary(tags={"mlflow.note.content": note})
        pages: dict[str, Render] = {
            name: functools.partial(page, header, records, measurements) for name, page in self.pages.items()
        }
        return dataclasses.replace(
            summary,
            metrics={**counts, **summary.metrics},
            files={**summary.files, **pages},
            trial_files=_pictures_of_the_best(results) if header.get("state") == "complete" else {},
        )


def _leaderboard_summary(results: Results) -> Summary:
    """Summary of a study with a leaderboard (ValueError: no complete trial)."""
    note = results.markdown()
    table = results.leaderboard()
    best = results.best(results.rule)
    row = table.to_dict("records")[0]
    metrics = {}
    for name in (*summary_names(results.metrics), *ROBUSTNESS):
        value = row.get(name, math.nan)
        if not math.isnan(value):
            metrics[name] = float(value)
    with contextlib.suppress(ValueError):  # without numbers on test data there is no oracle to compare with
        metrics[REGRET.name] = results.regret().value
    csv: str = table.to_csv(index=False)
    front_tags, front_files = _front(results)
    return Summary(
        tags={
            "best.label": best.record.label,
            "best.config_hash": best.record.config_hash,
            "best.rule": best.rule,
            "mlflow.note.content": note,
            **front_tags,
        },
        metrics=metrics,
        files={
            "leaderboard.md": note.encode,
            "leaderboard.csv": csv.encode,
            **front_files,
            **_robustness_files(results),
        },
    )


def _front(results: Results) -> tuple[dict[str, str], dict[str, Render]]:
    """Tags and artifacts of the Pareto front; none for a study without costs among its objectives."""
    if not results.costs:
        return {}, {}
    trade_offs = results.trade_offs()
    members = [member.choice.record for member in trade_offs.members]
    tags = {
        "front.objectives": ", ".join([results.metrics.validation, *results.costs]),
        "front.trials": ", ".join(str(record.number) for record in members),
        "front.labels": ", ".join(dict.fromkeys(record.label for record in members)),
    }
    csv: str = results.front().to_csv(index=False)
    return tags, {"front.csv": csv.encode}


def _robustness_files(results: Results) -> dict[str, Render]:
    """The table of errors under corruptions; none where they were not measured."""
    table = results.robustness()
    if table.empty:
        return {}
    csv: str = table.to_csv(index=False)
    return {"robustness.csv": csv.encode}


def _note_without_leaderboard(results: Results, reason: str) -> str:
    lines = [f"# {results.name}", "", reason, "", *(f"- {finding}" for finding in results.findings())]
    return "\n".join(lines).rstrip() + "\n"


def _pictures_of_the_best(results: Results) -> dict[int, dict[str, Render]]:
    """Pictures of the trial that the study's rule chooses for each label."""
    try:
        choices = results.per_label()
    except ValueError:  # no complete trial
        return {}
    best = [choice.record for choice in choices.values()]
    return {record.number: _drawn(record.curves, record, results.metrics) for record in best}


def _best_of_history(record: TrialRecord, task: TaskMetrics | None) -> dict[str, float]:
    """Best validation score and its earliest unit.

    For a trial that ended before it reported them.
    """
    if task is None or task.best_validation in record.metrics:
        return {}
    name = task.validation
    units = [unit for unit in record.history if math.isfinite(unit.get(name, math.nan))]
    if not units:
        return {}
    best = max(units, key=lambda unit: (task.selection.score(unit[name]), -unit["unit"]))
    return {task.best_validation: best[name], BEST_EPOCH.name: best["unit"]}


def _task_metrics(header: Mapping[str, Any]) -> TaskMetrics | None:
    """Metrics of the study's task; None for one that is registered in another process alone."""
    try:
        return metrics_of(header.get("spec"))
    except ValueError:
        return None


def _drawn(curves: Curves, record: TrialRecord | None, task: TaskMetrics | None) -> dict[str, Render]:
    if task is None:
        return {}
    return {name: picture.content for name, picture in pictures(curves, record, task).items()}
