"""From journal events to what a tracking server should show: pure, and the same for every replay.

Times come from the journal and steps are units of budget, so writing an update twice changes nothing: MLflow keeps one
point for one (key, step, timestamp, value).

A point cannot be taken back, a tag or an artifact can be replaced. So numbers that sum up are written when they are
final: a study that is continued ends with the points of one that nothing disturbed. One that never is has the points of
its units, `status` = interrupted (or failed), and the leaderboard so far as its note.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from orchestrator.record.records import INTERRUPTED, TrialRecord, advance, declared_metrics, measurements, suggested
from orchestrator.results.curves import curve_texts, pictures
from orchestrator.tracking.run_fields import (
    Header,
    RunUpdate,
    clean_key,
    digest,
    milliseconds,
    param_text,
    summary,
    within_limits,
)

STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
"""MLflow's run status: FINISHED used its whole budget, KILLED was stopped before (pruned or interrupted)."""


class Projection:
    """Follows a study's events in order and says what each changes in which run.

    Args:
        study: name of the study, used until its `study_started` event.
    """

    def __init__(self, study: str = "study") -> None:
        self.study_uid: str | None = None
        """Value of the tag `luthier.study_uid`; known from the first event on."""
        self._header = Header(study, {})
        self._start = 0
        self._last, self._open = 0.0, True
        self._trials: dict[str, TrialRecord] = {}
        self._uids: dict[str, str] = {}
        self._units: dict[str, int] = {}
        self._dropped: dict[str, int] = {}
        self._measured_events: list[Mapping[str, Any]] = []
        self._summed: dict[str, float] = {}
        self._renamed: dict[str, str] = {}

    def apply(self, event: Mapping[str, Any]) -> list[RunUpdate]:
        """The updates that an event brings, the study's own run before those of its trials."""
        updates = []
        kind, self._last = event["kind"], event["time"]
        if kind in ("study_started", "study_finished"):
            self._open = kind == "study_started"
        if kind == "study_started":
            self._header = Header(str(event.get("study") or self._header.study), dict(event))
        if self.study_uid is None:
            self.study_uid = digest([self._header.study, event["time"]])
            self._start = milliseconds(event["time"])
            updates.append(self._study_update(status="running"))
        if kind == "study_started":
            updates.append(self._study_started(event))
        elif kind == "study_finished":
            updates.append(self._study_finished(event))
        elif kind == "measured":
            updates.append(self._measured(event))
        elif kind == "trial_suggested":
            self._suggest(event)
        elif str(event.get("trial_id")) in self._trials:
            updates += self._trial_event(event)
        return [within_limits(update) for update in updates]

    def abandoned(self) -> list[RunUpdate]:
        """What the runs that the events leave open are when nobody writes events any more: interrupted. Without
        numbers: the study's next run says those itself, at its own time."""
        if self.study_uid is None or not self._open:
            return []
        end = milliseconds(self._last)
        updates = [self._study_update(status=INTERRUPTED)]
        for trial_id, record in self._trials.items():
            if record.state == "running":
                tags = {"status": INTERRUPTED, "status.reason": INTERRUPTED}
                uid, start = self._uids[trial_id], milliseconds(record.started or self._last)
                updates.append(RunUpdate(uid, _run_name(record), start, self.study_uid, self._tags(record) | tags))
        for update in updates:
            update.status, update.end = "KILLED", end
        return [within_limits(update) for update in updates]

    def _study_update(self, **tags: str) -> RunUpdate:
        assert self.study_uid is not None
        shared = self._header.tags() | {"luthier.study_uid": self.study_uid, "luthier.kind": "study"}
        return RunUpdate(self.study_uid, self._header.study, self._start, tags=shared | tags)

    def _study_started(self, event: Mapping[str, Any]) -> RunUpdate:
        update = self._study_update(status="running")
        update.status, update.dataset = "RUNNING", self._header.dataset()
        update.texts["study.json"] = json.dumps(event.get("spec"), indent=2, default=str)
        if event.get("versions"):
            update.texts["versions.json"] = json.dumps(event["versions"], indent=2, default=str)
        return update

    def _measured(self, event: Mapping[str, Any]) -> RunUpdate:
        self._measured_events.append(event)
        update, time = self._study_update(), milliseconds(event["time"])
        metrics, curves = event.get("metrics") or {}, event.get("curves") or {}
        finite = {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}
        update.points = [(self._key(key), value, time, 0) for key, value in declared_metrics(finite).items()]
        update.texts, update.drawn = curve_texts(curves), pictures(curves)
        return update

    def _study_finished(self, event: Mapping[str, Any]) -> RunUpdate:
        from orchestrator.report.page import REPORT, Page

        state = str(event.get("state") or "complete")
        records = sorted(self._trials.values(), key=lambda record: record.number)
        measured = measurements(self._measured_events)
        tags, texts, metrics = summary(records, self._header, measured)
        update = self._study_update(status=state, **tags)
        update.texts, update.end = texts, milliseconds(event["time"])
        header = {**self._header.fields, "state": state, "first_started": self._start / 1000, "ended": event["time"]}
        update.drawn[REPORT] = Page(header, records, measured)
        if self._renamed:
            update.texts["names.json"] = json.dumps(self._renamed, indent=2, ensure_ascii=False)
        update.status = {"failed": "FAILED", "interrupted": "KILLED"}.get(state, "FINISHED")
        if state == "complete":  # any other is continued by the same command; again, if more trials are asked for
            new = {k: v for k, v in metrics.items() if math.isfinite(v) and self._summed.get(k) != v}
            update.points = [(self._key(key), value, update.end, 0) for key, value in new.items()]
            self._summed |= new
        return update

    def _suggest(self, event: Mapping[str, Any]) -> None:
        fresh, trial_id = suggested(event), str(event["trial_id"])
        named = [fresh.number, fresh.config_hash, fresh.seed, fresh.role, fresh.held_out]
        uid = digest([self.study_uid, *named, *([fresh.sample] if fresh.sample else [])])
        before = next((known for known, its_uid in self._uids.items() if its_uid == uid), None)
        if before is not None:  # the same trial, resumed under a new id: it keeps its run and its history
            del self._uids[before]
            fresh = self._trials.pop(before)
        self._trials[trial_id], self._uids[trial_id] = fresh, uid

    def _trial_event(self, event: Mapping[str, Any]) -> list[RunUpdate]:
        trial_id, kind = str(event["trial_id"]), event["kind"]
        record = self._trials[trial_id] = advance(self._trials[trial_id], event)
        if record.started is None:
            return []  # a trial that never started has no run
        update = RunUpdate(
            self._uids[trial_id], _run_name(record), milliseconds(record.started), self.study_uid, self._tags(record)
        )
        if kind == "trial_started":
            self._begin(update, record)
        elif kind == "result":
            self._add_points(update, event)
        elif kind in ("trial_finished", "trial_failed"):
            self._end(update, record, event)
        else:
            return []
        return [update]

    def _tags(self, record: TrialRecord) -> dict[str, str]:
        """Tags that every run of a trial carries from its first moment, also if the rest never arrives."""
        shown: dict[str, Any] = {
            "luthier.study_uid": self.study_uid,
            "luthier.kind": "trial",
            "strategy": record.strategy,
            "label": record.label,
            "role": record.role,
            "seed": record.seed,
            "config_hash": record.config_hash,
            "number": record.number,
        }
        shown |= {name: value for name in ("held_out", "sample") if (value := getattr(record, name))}
        return self._header.tags() | {key: str(value) for key, value in shown.items()}

    def _begin(self, update: RunUpdate, record: TrialRecord) -> None:
        update.tags |= {"status": "running", "status.attempts": str(record.attempts), "tune_trial_id": record.trial_id}
        shown = {"strategy": record.label, **record.hparams}
        shown |= {name: self._header.spec("search", name) for name in ("epochs", "batch_size")}
        # MLflow's compare view preselects the parameters that vary and has linear axes only, on which learning rates
        # over four decades are one thick line at zero.
        for key, value in record.hparams.items():
            if (key == "lr" or key.startswith("lr_")) and isinstance(value, (int, float)) and value > 0:
                shown[f"{key}.log10"] = round(math.log10(value), 3)
        update.params = {self._key(key): param_text(value) for key, value in shown.items() if value is not None}
        update.dataset = self._header.dataset()
        if record.attempts > 1:
            update.status = "RUNNING"

    def _add_points(self, update: RunUpdate, event: Mapping[str, Any]) -> None:
        unit, time = int(event["unit"]), milliseconds(event["time"])
        if unit <= self._units.get(update.uid, 0):
            return  # repeated after a restart from a checkpoint: its numbers are there already
        self._units[update.uid] = unit
        metrics = event["metrics"]
        finite = {key: value for key, value in metrics.items() if value is not None and math.isfinite(value)}
        update.points = [(self._key(key), value, time, unit) for key, value in declared_metrics(finite).items()]
        dropped = self._dropped.get(update.uid, 0) + len(metrics) - len(finite)
        self._dropped[update.uid] = dropped
        if dropped:
            update.tags["metrics_not_finite"] = str(dropped)
        update.texts |= curve_texts(event.get("curves") or {}, self._trials[str(event["trial_id"])])
        if event.get("node"):
            update.tags["status.node"] = str(event["node"])

    def _end(self, update: RunUpdate, record: TrialRecord, event: Mapping[str, Any]) -> None:
        update.end = milliseconds(event["time"])
        interrupted = record.reason == INTERRUPTED
        update.status = "KILLED" if interrupted else STATUS[record.state]
        update.tags["status"] = INTERRUPTED if interrupted else record.state
        update.tags["status.reason"] = record.reason or "ok"
        # Said of every run: one that was interrupted and then ended well must not keep its old error.
        update.tags["status.error"] = record.error or "none"
        if record.state == "complete":  # drawn once; a rung's curve is replaced by that of the end
            update.drawn = pictures(record.curves, record)
        if record.resumable:
            return
        known = [(u["val/acc"], -u["unit"]) for u in record.history if math.isfinite(u.get("val/acc", math.nan))]
        if known and "best/val/acc" not in record.metrics:  # a trial that was stopped early has not said it itself
            value, unit = max(known)
            step = self._units.get(update.uid, record.unit)
            update.points = [("best/val/acc", value, update.end, step), ("best/epoch", -unit, update.end, step)]

    def _key(self, name: str) -> str:
        """The name as every server takes it; what it stands for is kept where it had to be changed."""
        key = clean_key(name)
        if key != name:
            self._renamed[key] = name
        return key


def _run_name(record: TrialRecord) -> str:
    roles = {"fold": f"-without-{record.held_out}", "confirm": "-confirm", "reference": f"-reference-{record.sample}"}
    extra = roles.get(record.role, "")
    return f"{record.number:04d}-{record.label}{extra}"
