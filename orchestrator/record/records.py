"""Trial records, folded from a study's journal.

With the metrics that a record keeps. Pure functions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from trainables import strategies
from trainables.specs.metrics import TaskMetrics, best_or_last, metric_groups, task_metrics

State = Literal["suggested", "running", "paused", "complete", "pruned", "failed", "withdrawn"]
"""`paused`: it has no process and waits at a rung for its promotion, also while no driver runs the study. `withdrawn`:
interrupted, and not proposed by a later, complete run of the study (`confirm.top_k` was lowered). A run that proposes
the trial again starts it over."""

MEMORY_LAYOUT = "memory_layout"
"""Kind of the event with a study's measured memory layout: `channels_last`, `device` and, on a CPU, `seconds`."""
WARM_START = "warm_start"
"""Kind of the event with what a study takes over from earlier ones (`orchestrator.search.warm_start`)."""
INTERRUPTED = "interrupted"
"""Failure reason of a trial that was open when its driver ended."""
RESUMED = frozenset({INTERRUPTED, "infra", "stalled", "host_oom"})
"""Failure reasons that a repeated run resumes: infrastructure failed, not the trial."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a study, as recorded in the journal."""

    trial_id: str
    """Tune's id; of the latest attempt if the trial was resumed."""
    number: int
    """Position in the study, from 0; unique within it, and kept when the trial is resumed."""
    strategy: str
    label: str
    """Name of the entry of the study file; two entries may share a strategy."""
    hparams: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    role: str = "search"
    """`search`, `fold` (leave one domain out), `confirm` (fresh seed) or `reference` (another sample, for FSR)."""
    held_out: str | None = None
    sample: str | None = None
    """Training sample of a `reference` trial; None = the study's own."""
    config_hash: str = ""
    """Digest of strategy, label and hyperparameters; the seeds and roles of one configuration share it."""
    state: State = "suggested"
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Last value of every metric."""
    history: tuple[Mapping[str, float], ...] = field(default=(), repr=False)
    """Metrics per unit in order, each with its number under `unit`."""
    curves: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    """Last value of every curve, by name: `columns` (name → values, the x axis first) and `note`."""
    weights: Mapping[str, Any] | None = None
    """`sha256` and `bytes` of the trial's kept weights; None = not kept, or discarded."""
    predictions: Mapping[str, Any] | None = None
    """`sha256` and `bytes` of the trial's kept predictions; None = not kept, or discarded."""
    reason: str | None = None
    """Why the trial failed: `nan`, `oom`, `host_oom`, `stalled`, `data`, `user`, `infra` or `interrupted`."""
    error: str | None = None
    attempts: int = 0
    """How often the trial was started."""
    node: str | None = None
    search_values: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The point under Optuna's parameter names; empty for folds and confirmations."""
    started: float | None = None
    """First start, wall-clock seconds since the epoch."""
    ended: float | None = None
    """End, wall-clock seconds since the epoch."""

    @property
    def unit(self) -> int:
        """Completed units of budget."""
        return int(self.history[-1]["unit"]) if self.history else 0

    @property
    def unfinished(self) -> bool:
        """True if the trial neither ended nor failed by itself."""
        return self.state in ("suggested", "running", "paused") or self.reason == INTERRUPTED

    @property
    def resumable(self) -> bool:
        """True if a repeated run resumes this trial.

        It is unfinished, or failed only from infrastructure errors.
        """
        return self.unfinished or (self.state == "failed" and self.reason in RESUMED)

    def metric(self, name: str) -> float | None:
        """Last value of one metric, or None where it is missing or not finite."""
        value = self.metrics.get(name)
        return value if value is not None and math.isfinite(value) else None


def metrics_of(study: object) -> TaskMetrics:
    """The metrics of a study's task, with the one that the study selects by.

    Args:
        study: a `StudySpec` or its fields. Journals from before there were tasks name none: they are classification.

    Raises:
        ValueError: the study's task is unknown here, or its metric is none of the task's.

    Example:
        >>> metrics_of({"name": "pets"}).task
        'classification'
        >>> metrics_of({"name": "pets", "search": {"metric": "balanced_acc"}}).validation
        'val/balanced_acc'
    """
    task = _field(study, "task")
    metrics = task_metrics() if task is None else task_metrics(str(task))
    return metrics.selecting(_field(_field(study, "search"), "metric"))


def _field(owner: object, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)


def validation_score(record: TrialRecord, metrics: TaskMetrics) -> float | None:
    """The selection metric on ID validation, of the weights that count.

    Of the tested weights where the last unit was followed by an evaluation; else of the best unit so far.

    Returns:
        The metric as recorded; None where it is missing or not finite.
    """
    if record.history and metrics.best_validation not in record.history[-1]:
        # In the metrics of the record, `best/…` is that of the last rung at which the trial was evaluated.
        of_units = [past.get(metrics.validation, math.nan) for past in record.history]
        return max(filter(math.isfinite, of_units), key=metrics.selection.score, default=None)
    value = best_or_last(record.metrics, metrics.validation)
    return value if value is not None and math.isfinite(value) else None


@cache
def _strategy_groups() -> frozenset[str]:
    return frozenset(strategies())


def declared_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a result whose names Luthier declares, as floats.

    Tune's own fields (`pid`, `time_total_s` …) and values that are not numbers are left out.
    """
    groups = metric_groups() | _strategy_groups()
    declared: dict[str, float] = {}
    for key, value in result.items():
        head, slash, _ = key.partition("/")
        if slash and head in groups and not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__float__"):
            declared[key] = float(value)
    return declared


_IDENTITY = ("number", "config_hash", "seed", "role", "held_out", "sample")


class LiveRecords:
    """Trial records of a journal, kept up to date event by event.

    A unit that is reported again (an actor died and the trial was resumed from a checkpoint) replaces the results from
    that unit on. A trial that is suggested again under another id, but with the same number, configuration, seed and
    role, is the same trial resumed: it keeps its history. Events of unknown kinds or unknown trials are ignored, so
    that journals of earlier versions can be read.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self._trials: dict[str, TrialRecord] = {}
        self._latest: dict[tuple[Any, ...], str] = {}
        """Identity → id of the trial's latest attempt."""
        for event in events:
            self.add(event)

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in one more event."""
        if event["kind"] == "trial_suggested":
            record = suggested(event)
            identity = tuple(event.get(name) for name in _IDENTITY)
            earlier = self._trials.pop(self._latest[identity], None) if identity in self._latest else None
            self._latest[identity] = record.trial_id
            if earlier is not None:
                # Tune gives a resumed trial a new id.
                record = dataclasses.replace(earlier, trial_id=record.trial_id, state="suggested")
            self._trials[record.trial_id] = record
            return
        trial_id = str(event.get("trial_id"))
        if trial_id in self._trials:
            self._trials[trial_id] = advance(self._trials[trial_id], event)

    def get(self, trial_id: str) -> TrialRecord | None:
        """The record of a trial by the id of its latest attempt."""
        return self._trials.get(trial_id)

    def all(self) -> list[TrialRecord]:
        """The records, in order of their numbers."""
        return sorted(self._trials.values(), key=lambda record: record.number)


def fold(events: Iterable[Mapping[str, Any]]) -> list[TrialRecord]:
    """Trial records from a journal's events, in order of their numbers, see `LiveRecords`."""
    return LiveRecords(events).all()


def unfinished(events: Iterable[Mapping[str, Any]]) -> list[TrialRecord]:
    """The trials that a repeated run resumes first: suggested, running, paused or interrupted."""
    return [record for record in fold(events) if record.unfinished]


def study_header(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of the latest `study_started` event, with `first_started`, `state`, `ended` and `changes` added.

    `first_started` and `ended` are seconds since the epoch; `state` is `running`, or that of `study_finished`;
    `changes` is the contents of `SettingChanges`; `memory_layout` and `warm_start` are the fields of these events,
    where there are any. Empty if the study never started.
    """
    header: dict[str, Any] = {}
    first: float | None = None
    lasting: dict[str, dict[str, Any]] = {}
    changes = SettingChanges()
    for event in events:
        changes.add(event)
        if event["kind"] == "study_started":
            first = event["time"] if first is None else first
            header = {k: v for k, v in event.items() if k not in ("seq", "kind")} | {"state": "running"}
            header["first_started"] = first
            header["changes"] = list(changes.made)
            header |= lasting
        elif event["kind"] in (MEMORY_LAYOUT, WARM_START) and header:
            lasting[event["kind"]] = {k: v for k, v in event.items() if k not in ("seq", "time", "kind")}
            header |= lasting
        elif event["kind"] == "study_finished" and header:
            header["state"] = event.get("state", "complete")
            header["ended"] = event["time"]
    return header


class SettingChanges:
    """Changes of a study between its runs, with the first trial that they may have applied to."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        """Each with `before` (number of the first trial proposed after it) and `changed` (key → old and new value)."""
        self._next = 0

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in one more event."""
        if event["kind"] == "trial_suggested":
            self._next = max(self._next, int(event["number"]) + 1)
        elif event["kind"] == "study_started" and event.get("changed") and self._next:
            self.made.append({"before": self._next, "changed": dict(event["changed"])})


def measurements(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Study-level measurements by name.

    Each has `metrics` (not finite = NaN) and `curves`; the latest of a name counts.
    """
    measured: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["kind"] == "measured":
            metrics = event.get("metrics") or {}
            values = {key: float("nan") if value is None else float(value) for key, value in metrics.items()}
            measured[str(event["what"])] = {"metrics": values, "curves": dict(event.get("curves") or {})}
    return measured


def suggested(event: Mapping[str, Any]) -> TrialRecord:
    """The initial record of a suggested trial."""
    return TrialRecord(
        trial_id=str(event["trial_id"]),
        number=int(event["number"]),
        strategy=event["strategy"],
        label=event.get("label") or event["strategy"],
        hparams=event.get("hparams") or {},
        seed=event.get("seed", 0),
        role=event.get("role", "search"),
        held_out=event.get("held_out"),
        sample=event.get("sample"),
        config_hash=event.get("config_hash", ""),
        search_values=event.get("search_values") or {},
    )


def advance(record: TrialRecord, event: Mapping[str, Any]) -> TrialRecord:
    """The record after one more event of its trial; events of unknown kinds change nothing."""
    kind = event["kind"]
    time = event["time"]
    if kind == "trial_started":
        return dataclasses.replace(
            record,
            state="running",
            reason=None,
            error=None,
            ended=None,
            attempts=record.attempts + 1,
            started=time if record.started is None else record.started,
            node=event.get("node") or record.node,
        )
    if kind == "trial_paused":
        return dataclasses.replace(record, state="paused", reason=None, error=None, ended=None)
    if kind == "trial_promoted":  # no further attempt: the trial continues as it was meant to
        return dataclasses.replace(record, state="running")
    if kind == "result":
        return _add_result(record, event)
    if kind == "trial_finished":
        return dataclasses.replace(record, state=event.get("state", "complete"), reason=None, error=None, ended=time)
    if kind == "trial_failed":
        return dataclasses.replace(
            record, state="failed", reason=event.get("reason"), error=event.get("error"), ended=time
        )
    if kind == "trial_withdrawn":
        return dataclasses.replace(record, state="withdrawn", reason=None, error=None)
    if kind == "weights_discarded":
        return dataclasses.replace(record, weights=None, predictions=None)
    return record


def _add_result(record: TrialRecord, event: Mapping[str, Any]) -> TrialRecord:
    unit = int(event["unit"])
    values = {key: float("nan") if value is None else float(value) for key, value in event["metrics"].items()}
    history = [past for past in record.history if past["unit"] < unit]
    metrics = dict(record.metrics)
    if len(history) < len(record.history):  # rewound to a checkpoint: metrics of the dropped units go, too
        metrics = {name: value for past in history for name, value in past.items() if name != "unit"}
    history.append({"unit": float(unit), **values})
    metrics.update(values)
    return dataclasses.replace(
        record,
        history=tuple(history),
        metrics=metrics,
        curves={**record.curves, **(event.get("curves") or {})},
        weights=event.get("weights"),
        predictions=event.get("predictions"),
        node=event.get("node") or record.node,
    )


def interruption(record: TrialRecord) -> dict[str, Any]:
    """Fields of the `trial_failed` event that closes a trial left open by its driver."""
    return {"trial_id": record.trial_id, "reason": INTERRUPTED, "error": f"The driver ended at unit {record.unit}."}
