"""What is known about one trial, and which numbers of a trial are worth keeping.

From events to records: pure functions on a study's journal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

State = Literal["suggested", "running", "complete", "pruned", "failed"]

_EVERY_TRIAL = ("train", "val", "test", "ood", "calib", "best", "held_out", "cost", "lr")
_DIAGNOSTICS = (
    *("fsr", "ln_shift", "bn_shift", "plasticity", "distortion", "change", "cka", "grad_norm"),
    *("bn_conversion", "wise"),
)
METRIC_GROUPS = frozenset({*_EVERY_TRIAL, *_DIAGNOSTICS})
"""First path segments of the metric names that every strategy shares; each strategy may add its own name."""

INTERRUPTED = "interrupted"
"""Reason of a trial that neither finished nor failed by itself: the driver ended first."""
RESUMED = frozenset({INTERRUPTED, "infra", "stalled", "host_oom"})
"""Reasons of trials that a repeated run goes on with: nothing is known to be wrong with the trials themselves."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a study, as the journal tells it."""

    trial_id: str
    """Tune's id; of the latest attempt if the trial was resumed."""
    number: int
    """Position in the study, from 0; unique within it and the same for ever."""
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
    """Names strategy, label and hyperparameters; the seeds and roles of one configuration share it."""
    state: State = "suggested"
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Last value of every metric."""
    history: tuple[Mapping[str, float], ...] = ()
    """Metrics per unit in order, each with its number under `unit`."""
    curves: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Last value of every curve, by name: `columns` (name → values, the x axis first) and `note`."""
    reason: str | None = None
    """Why the trial failed: `nan`, `oom`, `host_oom`, `stalled`, `data`, `user`, `infra` or `interrupted`."""
    error: str | None = None
    attempts: int = 0
    """How often the trial was started."""
    node: str | None = None
    checkpoint: str | None = None
    """Folder of the last checkpoint that Tune reported."""
    search_values: Mapping[str, Any] = field(default_factory=dict)
    """The point as the search knows it (Optuna's parameter names); empty for folds and confirmations."""
    started: float | None = None
    ended: float | None = None
    """Wall-clock seconds since the epoch of the first start and of the end."""

    @property
    def unit(self) -> int:
        """Units of budget done."""
        return int(self.history[-1]["unit"]) if self.history else 0

    @property
    def unfinished(self) -> bool:
        """True if the trial neither ended nor failed by itself."""
        return self.state in ("suggested", "running") or self.reason == INTERRUPTED

    @property
    def resumable(self) -> bool:
        """True if a repeated run goes on with this trial: it is unfinished, or its machines failed it too often."""
        return self.unfinished or (self.state == "failed" and self.reason in RESUMED)

    def metric(self, name: str) -> float | None:
        """Last value of one metric, or None where it is missing or not finite."""
        value = self.metrics.get(name)
        return value if value is not None and math.isfinite(value) else None


@cache
def _declared_groups() -> frozenset[str]:
    from trainables import strategies

    return METRIC_GROUPS | frozenset(strategies())


def declared_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a result that Luthier declares, as floats; Tune's own bookkeeping (`pid`, `time_total_s` …) and
    everything that is not a number are left out."""
    groups = _declared_groups()
    kept: dict[str, float] = {}
    for key, value in result.items():
        head, slash, _ = key.partition("/")
        if slash and head in groups and not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__float__"):
            kept[key] = float(value)
    return kept


_IDENTITY = ("number", "config_hash", "seed", "role", "held_out", "sample")


def fold(events: Iterable[Mapping[str, Any]]) -> list[TrialRecord]:
    """The trials that the events tell of, in order of their numbers.

    A unit that is reported again (an actor died and the trial went on from a checkpoint) replaces what was known from
    that unit on. A trial that is suggested again under another id but with the same number, configuration, seed and
    role is the same trial, resumed: it keeps its history. Events of unknown kinds or unknown trials are ignored.
    """
    trials: dict[str, TrialRecord] = {}
    same: dict[tuple[Any, ...], str] = {}
    for event in events:
        if event["kind"] == "trial_suggested":
            fresh = suggested(event)
            identity = tuple(event.get(name) for name in _IDENTITY)
            before = trials.pop(same[identity], None) if identity in same else None
            same[identity] = fresh.trial_id
            trials[fresh.trial_id] = (
                fresh if before is None else dataclasses.replace(before, trial_id=fresh.trial_id, state="suggested")
            )
        elif (record := trials.get(str(event.get("trial_id")))) is not None:
            trials[record.trial_id] = advance(record, event)
    return sorted(trials.values(), key=lambda record: record.number)


def unfinished(events: Iterable[Mapping[str, Any]]) -> list[TrialRecord]:
    """The trials that a resume has to go on with: suggested, running or interrupted, with their last checkpoint."""
    return [record for record in fold(events) if record.unfinished]


def study_header(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the study said about itself: fields of its latest `study_started`, `first_started` (seconds since the
    epoch) and `state` (`running`, or that of `study_finished`); empty if it never started."""
    header: dict[str, Any] = {}
    first: float | None = None
    for event in events:
        if event["kind"] == "study_started":
            first = event["time"] if first is None else first
            header = {k: v for k, v in event.items() if k not in ("seq", "kind")} | {"state": "running"}
            header["first_started"] = first
        elif event["kind"] == "study_finished" and header:
            header["state"] = event.get("state", "complete")
            header["ended"] = event["time"]
    return header


def measurements(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was measured of the study as a whole, latest last: name → `metrics` (not finite = NaN) and `curves`."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["kind"] == "measured":
            metrics = event.get("metrics") or {}
            values = {key: float("nan") if value is None else float(value) for key, value in metrics.items()}
            found[str(event["what"])] = {"metrics": values, "curves": dict(event.get("curves") or {})}
    return found


def suggested(event: Mapping[str, Any]) -> TrialRecord:
    """The record of a trial that was just suggested."""
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
    kind, time = event["kind"], event["time"]
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
    if kind == "result":
        return _add_result(record, event)
    if kind == "checkpoint":
        return dataclasses.replace(record, checkpoint=event.get("path"))
    if kind == "trial_finished":
        return dataclasses.replace(record, state=event.get("state", "complete"), reason=None, error=None, ended=time)
    if kind == "trial_failed":
        return dataclasses.replace(
            record, state="failed", reason=event.get("reason"), error=event.get("error"), ended=time
        )
    return record


def _add_result(record: TrialRecord, event: Mapping[str, Any]) -> TrialRecord:
    unit = int(event["unit"])
    values = {key: float("nan") if value is None else float(value) for key, value in event["metrics"].items()}
    history = [past for past in record.history if past["unit"] < unit]
    rewound = len(history) < len(record.history)
    metrics = {k: v for past in history for k, v in past.items() if k != "unit"} if rewound else dict(record.metrics)
    history.append({"unit": float(unit), **values})
    metrics.update(values)
    return dataclasses.replace(
        record,
        history=tuple(history),
        metrics=metrics,
        curves={**record.curves, **(event.get("curves") or {})},
        node=event.get("node") or record.node,
    )


def interruption(record: TrialRecord) -> dict[str, Any]:
    """Fields of the `trial_failed` event that closes a trial which the driver left behind."""
    return {"trial_id": record.trial_id, "reason": INTERRUPTED, "error": f"The driver ended at unit {record.unit}."}
