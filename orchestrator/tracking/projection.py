"""Projection of journal events onto tracked runs: pure and deterministic, so that a replay changes nothing.

Times come from the journal and steps are units of budget: MLflow keeps one point for one (key, step, timestamp, value),
so writing an update twice is idempotent.

A point cannot be taken back, a tag or an artifact can be replaced. Summary metrics are therefore written once they are
final: a study that was interrupted and continued ends with the points of an undisturbed one. A study that is never
continued has the points of its units, `status` = interrupted (or failed), and the leaderboard so far as its note.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.record.journal import Event, read_from
from orchestrator.record.kept_paths import predictions_file
from orchestrator.record.records import (
    INTERRUPTED,
    SettingChanges,
    TrialRecord,
    advance,
    declared_metrics,
    measurements,
    suggested,
)
from orchestrator.tracking.run_update import (
    UID_DIGITS,
    Header,
    KeptFile,
    ModelRequest,
    Point,
    Render,
    RunUpdate,
    Summarizer,
    Uploads,
    clean_key,
    milliseconds,
    param_text,
    within_limits,
)
from trainables.specs.metrics import CPU_USE, GPU_BYTES, GPU_USE, HOST_BYTES
from trainables.specs.short_hash import short_hash

logger = logging.getLogger("luthier")

TRIAL_STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
"""State of an ended trial → MLflow's run status; KILLED = ended before its budget (pruned or interrupted). A paused
trial is SCHEDULED, also while no driver runs the study."""
STUDY_STATUS = {"failed": "FAILED", "interrupted": "KILLED"}
"""The same for a study; FINISHED otherwise."""

PREDICTIONS = "predictions.arrow"
"""Artifact with the predictions of a confirmed trial."""
SYSTEM_METRICS: Mapping[str, tuple[str, float]] = {
    CPU_USE.name: ("system/process_cpu_utilization_percentage", 100.0),
    HOST_BYTES.name: ("system/process_memory_usage_megabytes", 1e-6),
    GPU_USE.name: ("system/gpu_utilization_percentage", 100.0),
    GPU_BYTES.name: ("system/process_gpu_memory_usage_megabytes", 1e-6),
}
"""Recorded name → name among MLflow's system metrics, which have a page of their own, and the factor of its unit."""


@dataclass
class _TrialRun:
    """One trial and the state of its run."""

    uid: str
    record: TrialRecord
    unit: int = 0
    """Last unit whose points were projected."""
    not_finite: int = 0
    """Values that were left out because they are not finite."""


class Projection:
    """Maps a study's events, in order, to updates of its runs.

    Args:
        study: name of the study, used until its `study_started` event.
        summarizer: computes what results say about trials and study.
        uploads: which files of the study's folder are sent.
    """

    def __init__(self, study: str, summarizer: Summarizer, uploads: Uploads | None = None) -> None:
        self.study_uid: str | None = None
        """Value of the tag `luthier.study_uid`; None before the first event."""
        self._summarizer = summarizer
        self._uploads = uploads or Uploads()
        self._header = Header(study, {})
        self._changes = SettingChanges()
        self._start = 0
        self._last_time = 0.0
        self._is_open = True
        self._trials: dict[str, _TrialRun] = {}
        """Tune's id of a trial's latest attempt → the trial."""
        self._measured_events: list[Mapping[str, Any]] = []
        self._summary_metrics: dict[str, float] = {}
        self._renamed_keys: dict[str, str] = {}

    def apply(self, event: Mapping[str, Any]) -> list[RunUpdate]:
        """Updates that follow from one event; the study's own run comes before those of its trials."""
        updates = []
        kind = event["kind"]
        self._last_time = event["time"]
        self._changes.add(event)
        if kind in ("study_started", "study_finished"):
            self._is_open = kind == "study_started"
        if kind == "study_started":
            self._header = Header(str(event.get("study") or self._header.study), dict(event))
        if self.study_uid is None:
            self.study_uid = short_hash([self._header.study, event["time"]], UID_DIGITS)
            self._start = milliseconds(event["time"])
            updates.append(self._study_update(status="running"))
        if kind == "study_started":
            updates.append(self._study_started(event))
        elif kind == "study_finished":
            updates += self._study_finished(event)
        elif kind == "measured":
            updates.append(self._measured(event))
        elif kind == "trial_suggested":
            self._suggest(event)
        elif str(event.get("trial_id")) in self._trials:
            updates += self._trial_event(event)
        return [within_limits(update) for update in updates]

    def close_open_runs(self) -> list[RunUpdate]:
        """Mark the runs that a dead driver left open as interrupted.

        No points are added: the study's next run writes them at its own time.
        """
        if self.study_uid is None or not self._is_open:
            return []
        updates = [self._study_update(status=INTERRUPTED)]
        for trial in self._trials.values():
            if trial.record.state == "running":
                update = self._trial_update(trial)
                update.tags |= {"status": INTERRUPTED, "status.reason": INTERRUPTED}
                updates.append(update)
        for update in updates:
            update.status = "KILLED"
            update.end = milliseconds(self._last_time)
        return [within_limits(update) for update in updates]

    def _study_update(self, **tags: str) -> RunUpdate:
        assert self.study_uid is not None
        shared = self._header.tags() | {"luthier.study_uid": self.study_uid, "luthier.kind": "study"}
        return RunUpdate(self.study_uid, self._header.study, self._start, tags=shared | tags)

    def _trial_update(self, trial: _TrialRun) -> RunUpdate:
        record = trial.record
        start = milliseconds(record.started or self._last_time)
        return RunUpdate(trial.uid, _run_name(record), start, self.study_uid, self._trial_tags(record))

    def _study_started(self, event: Mapping[str, Any]) -> RunUpdate:
        update = self._study_update(status="running")
        update.status = "RUNNING"
        update.dataset = self._header.dataset()
        update.files["study.json"] = _json_file(event.get("spec"))
        if event.get("versions"):
            update.files["versions.json"] = _json_file(event["versions"])
        return update

    def _measured(self, event: Mapping[str, Any]) -> RunUpdate:
        self._measured_events.append(event)
        update = self._study_update()
        update.points = self._points(_finite(event.get("metrics") or {}), milliseconds(event["time"]), step=0)
        update.files |= self._summarizer.curve_files(self._header.fields, event.get("curves") or {})
        return update

    def _study_finished(self, event: Mapping[str, Any]) -> list[RunUpdate]:
        state = str(event.get("state") or "complete")
        end = event["time"]
        records = sorted((trial.record for trial in self._trials.values()), key=lambda record: record.number)
        header = {
            **self._header.fields,
            "study": self._header.study,
            "state": state,
            "first_started": self._start / 1000,
            "ended": end,
            "changes": list(self._changes.made),
        }
        summary = self._summarizer.study(header, records, measurements(self._measured_events))
        update = self._study_update(status=state, **summary.tags)
        update.files |= summary.files
        update.status = STUDY_STATUS.get(state, "FINISHED")
        update.end = milliseconds(end)
        if self._renamed_keys:
            update.files["names.json"] = _json_file(self._renamed_keys, ensure_ascii=False)
        if state == "complete":  # in any other state the study will be continued, and the sums are not final
            new = {
                name: value
                for name, value in summary.metrics.items()
                if math.isfinite(value) and self._summary_metrics.get(name) != value
            }
            update.points = [(self._key(name), value, update.end, 0) for name, value in new.items()]
            self._summary_metrics |= new
            update.model = self._model(event)
        return [update, *self._trial_file_updates(summary.trial_files)]

    def _model(self, event: Mapping[str, Any]) -> ModelRequest | None:
        name = self._uploads.registered_model
        if name is None:
            return None
        weights = {t.record.number: str(t.record.weights["sha256"]) for t in self._trials.values() if t.record.weights}
        return ModelRequest(
            name=name,
            end=short_hash([self.study_uid, event["seq"], event["time"]], UID_DIGITS),
            run_uids={trial.record.number: trial.uid for trial in self._trials.values()},
            weights=weights,
        )

    def _trial_file_updates(self, trial_files: Mapping[int, Mapping[str, Render]]) -> list[RunUpdate]:
        updates = []
        for trial in self._trials.values():
            files = trial_files.get(trial.record.number)
            if files and trial.record.started is not None:
                update = self._trial_update(trial)
                update.files |= files
                updates.append(update)
        return updates

    def _suggest(self, event: Mapping[str, Any]) -> None:
        record = suggested(event)
        identity = [self.study_uid, record.number, record.config_hash, record.seed, record.role, record.held_out]
        # Only where there is one: uids of trials from before there were samples must stay the same.
        if record.sample:
            identity.append(record.sample)
        uid = short_hash(identity, UID_DIGITS)
        earlier_id = next((trial_id for trial_id, trial in self._trials.items() if trial.uid == uid), None)
        # A resumed trial is suggested under a new id: it keeps its run and its history.
        trial = _TrialRun(uid, record) if earlier_id is None else self._trials.pop(earlier_id)
        self._trials[str(event["trial_id"])] = trial

    def _trial_event(self, event: Mapping[str, Any]) -> list[RunUpdate]:
        trial = self._trials[str(event["trial_id"])]
        trial.record = advance(trial.record, event)
        if trial.record.started is None:
            return []  # a trial that never started has no run
        update = self._trial_update(trial)
        kind = event["kind"]
        if kind == "trial_started":
            self._start_trial(update, trial.record)
        elif kind == "result":
            self._add_result(update, trial, event)
        elif kind in ("trial_finished", "trial_failed"):
            self._end_trial(update, trial, event)
        elif kind in ("trial_paused", "trial_promoted"):
            update.status = "SCHEDULED" if kind == "trial_paused" else "RUNNING"
            update.tags["status"] = trial.record.state
        else:
            return []
        return [update]

    def _trial_tags(self, record: TrialRecord) -> dict[str, str]:
        """Tags that a trial's run has from its creation on."""
        values: dict[str, Any] = {
            "luthier.study_uid": self.study_uid,
            "luthier.kind": "trial",
            "strategy": record.strategy,
            "label": record.label,
            "role": record.role,
            "seed": record.seed,
            "config_hash": record.config_hash,
            "number": record.number,
        }
        if record.held_out:
            values["held_out"] = record.held_out
        if record.sample:
            values["sample"] = record.sample
        return self._header.tags() | {key: str(value) for key, value in values.items()}

    def _start_trial(self, update: RunUpdate, record: TrialRecord) -> None:
        update.tags |= {"status": "running", "status.attempts": str(record.attempts), "tune_trial_id": record.trial_id}
        params: dict[str, Any] = {"strategy": record.label, **record.hparams}
        for name in ("epochs", "batch_size"):
            params[name] = self._header.spec("search", name)
        # MLflow's compare view preselects the parameters that vary and has linear axes only, on which learning rates
        # over four decades are one thick line at zero.
        for key, value in record.hparams.items():
            is_rate = key == "lr" or key.startswith("lr_")
            if is_rate and isinstance(value, (int, float)) and value > 0:
                params[f"{key}.log10"] = round(math.log10(value), 3)
        update.params = {self._key(key): param_text(value) for key, value in params.items() if value is not None}
        update.dataset = self._header.dataset()
        if record.attempts > 1:
            update.status = "RUNNING"

    def _add_result(self, update: RunUpdate, trial: _TrialRun, event: Mapping[str, Any]) -> None:
        unit = int(event["unit"])
        # MLflow cannot take a point back, so a unit's points are written once.
        if unit <= trial.unit:
            return  # a resumed trial re-reports the unit of its checkpoint
        trial.unit = unit
        metrics = event["metrics"]
        finite = _finite(metrics)
        update.points = self._points(finite, milliseconds(event["time"]), unit)
        trial.not_finite += len(metrics) - len(finite)
        if trial.not_finite:
            update.tags["metrics_not_finite"] = str(trial.not_finite)
        update.files |= self._summarizer.curve_files(self._header.fields, event.get("curves") or {}, trial.record)
        if event.get("node"):
            update.tags["status.node"] = str(event["node"])

    def _end_trial(self, update: RunUpdate, trial: _TrialRun, event: Mapping[str, Any]) -> None:
        record = trial.record
        interrupted = record.reason == INTERRUPTED
        end = milliseconds(event["time"])
        update.end = end
        update.status = "KILLED" if interrupted else TRIAL_STATUS[record.state]
        update.tags["status"] = INTERRUPTED if interrupted else record.state
        update.tags["status.reason"] = record.reason or "ok"
        # Always written: a trial that was interrupted and then completed must not keep its old error.
        update.tags["status.error"] = record.error or "none"
        # Not final: a later run resumes it, and points of a summary could not be taken back.
        if record.resumable:
            return
        summary = self._summarizer.trial(self._header.fields, record)
        step = trial.unit or record.unit
        update.points = [(self._key(name), value, end, step) for name, value in summary.metrics.items()]
        update.files |= summary.files
        if self._uploads.predictions and record.role == "confirm" and record.predictions:
            path = predictions_file(Path(), record.number)
            update.kept_files[PREDICTIONS] = KeptFile(path, str(record.predictions["sha256"]))

    def _points(self, metrics: Mapping[str, Any], time: int, step: int) -> list[Point]:
        points = []
        for recorded, value in declared_metrics(metrics).items():
            name, factor = SYSTEM_METRICS.get(recorded, (recorded, 1.0))
            points.append((self._key(name), value * factor, time, step))
        return points

    def _key(self, name: str) -> str:
        """The name as every server accepts it; the original of a changed one is kept for `names.json`."""
        key = clean_key(name)
        if key != name:
            self._renamed_keys[key] = name
        return key


@dataclass(frozen=True)
class DeliveryCounts:
    """Numbers of runs, points and artifacts."""

    runs: int = 0
    points: int = 0
    artifacts: int = 0

    def __bool__(self) -> bool:
        return bool(self.runs or self.points or self.artifacts)

    def __str__(self) -> str:
        counts = [_count(self.runs, "run"), _count(self.points, "point"), _count(self.artifacts, "artifact")]
        return f"{counts[0]}, {counts[1]} and {counts[2]}"

    def to_dict(self) -> dict[str, int]:
        """JSON values."""
        return {"runs": self.runs, "points": self.points, "artifacts": self.artifacts}


@dataclass
class DeliveredItems:
    """Items that a server lacked and was sent.

    Delivery is at least once; retried items are counted once.
    """

    runs: set[str] = field(default_factory=set)
    points: set[tuple[str, str, int, int]] = field(default_factory=set)
    """(uid of the run, metric, time, step)."""
    artifacts: set[tuple[str, str]] = field(default_factory=set)

    def counts(self, pending: Iterable[RunUpdate] = ()) -> DeliveryCounts:
        """Numbers of items, without those that are still to be retried."""
        points = set(self.points)
        artifacts = set(self.artifacts)
        for update in pending:
            points -= {(update.uid, key, time, step) for key, _, time, step in update.points}
            artifacts -= {(update.uid, name) for name in update.artifacts}
        return DeliveryCounts(len(self.runs), len(points), len(artifacts))


def updates_of(projection: Projection, event: Event, journal: Path) -> list[RunUpdate]:
    """Updates of one event.

    An invalid event is logged and skipped, so that it does not block the others.
    """
    try:
        return projection.apply(event)
    except Exception:
        logger.exception("Event %s of %s is not delivered to MLflow", event["seq"], journal)
        return []


def backlog(
    journal: Path, offset: int, study: str, summarizer: Summarizer, uploads: Uploads | None = None
) -> DeliveryCounts:
    """Upper bound of what the events from byte `offset` on would add to a server that has all earlier ones.

    An upper bound, since items that were in flight when the server failed may have arrived.
    """
    if not journal.exists():
        return DeliveryCounts()
    pending = read_from(journal, offset)[0]
    if not pending:
        return DeliveryCounts()
    projection = Projection(study, summarizer, uploads)
    delivered_runs = set[str]()
    for event in read_from(journal, 0, end=offset)[0]:
        delivered_runs |= {update.uid for update in updates_of(projection, event, journal)}
    runs = set[str]()
    points = 0
    artifacts = set[tuple[str, str]]()
    for event in pending:
        for update in updates_of(projection, event, journal):
            runs.add(update.uid)
            points += len(update.points)
            artifacts |= {(update.uid, name) for name in update.artifacts}
    return DeliveryCounts(len(runs - delivered_runs), points, len(artifacts))


def _finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}


def _json_file(value: Any, ensure_ascii: bool = True) -> Render:
    return json.dumps(value, indent=2, ensure_ascii=ensure_ascii, default=str).encode


def _run_name(record: TrialRecord) -> str:
    suffixes = {
        "fold": f"-without-{record.held_out}",
        "confirm": "-confirm",
        "reference": f"-reference-{record.sample}",
    }
    return f"{record.number:04d}-{record.label}{suffixes.get(record.role, '')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
