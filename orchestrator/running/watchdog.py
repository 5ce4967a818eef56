"""Stall detection: kills hung trials, which Tune retries from their checkpoints.

A process that is stopped, deadlocked, or stuck in native code while it holds the interpreter's lock cannot report that
it is. The driver therefore bounds the time between two results of a trial. Units differ in length (the first loads the
network, a closed-form phase takes a moment, at rungs and at the end the test sets are evaluated), so that each is
compared with units of its own kind.
"""

from __future__ import annotations

import functools
import json
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ray.tune import Callback

from orchestrator.ray_internals import actor_id, actor_of, kill_actor
from trainables import strategy_class
from trainables.engine.budget import BudgetPlan
from trainables.specs.metrics import CLASSIFICATION, TEST, UNIT_SECONDS, ood

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

    from orchestrator.record.records import TrialRecord
    from orchestrator.study_file.schema import FailuresSpec

logger = logging.getLogger("luthier")

Start = Literal["", "warm", "cold"]
"""Start-up that a unit's time includes: none, building a network in a reused process, or that of a new process too."""


class Kind(NamedTuple):
    """A group of units with about the same expected duration, within one strategy."""

    start: Start
    phase: str
    """Name of the strategy's phase, without the number of a cycle: a head trains faster than a whole network."""
    closes: bool
    """Whether it is the last unit of a phase that has a closing step."""
    tests: bool
    """Whether the test sets are evaluated after it."""
    last: bool
    """Whether the trial's final evaluation and diagnostics follow."""
    corrupted: bool = False
    """Whether that evaluation includes corrupted pictures."""

    def __str__(self) -> str:
        properties = []
        if self.start:
            properties.append("first of a process")
        if self.last:
            properties.append("last of the trial")
            if self.corrupted:
                properties.append("evaluated on corrupted pictures")
        elif self.tests:
            properties.append("evaluated on the test sets")
        return " and ".join(properties) or "plain"


def kind_of(config: Mapping[str, Any], unit: int, start: Start = "") -> Kind:
    """The kind of one unit.

    Args:
        config: a `TrialSpec.to_dict()`; the epochs and rungs of its task, its strategy and hyperparameters are read.
        unit: 1-based.
        start: the start-up that its time includes.
    """
    task = config.get("shared") or {}
    hparams = json.dumps(dict(config.get("hparams") or {}), sort_keys=True, default=str)
    evaluated = tuple(task.get("evaluate_at") or ())
    name = str(task.get("task") or CLASSIFICATION.task)
    kinds = _kinds(str(config.get("strategy")), name, hparams, int(task.get("epochs") or 1), evaluated)
    index = min(max(unit, 1), len(kinds)) - 1
    kind = kinds[index]
    corrupted = kind.last and config.get("role") == "confirm" and task.get("corruptions") is not None
    return kind._replace(start=start, corrupted=corrupted)


@functools.cache
def _kinds(strategy: str, task: str, hparams: str, epochs: int, evaluated: Sequence[int]) -> tuple[Kind, ...]:
    """The kinds of all units of a trial, in order."""
    try:
        plan = BudgetPlan.of(strategy_class(strategy, task).from_hparams(json.loads(hparams)), epochs, 1)
    except (ValueError, TypeError):  # bad hyperparameters: the trial itself fails with the message
        return (Kind("", "", False, True, True),)
    kinds: list[Kind] = []
    for phase in plan.phases:
        for position in range(1, phase.units + 1):
            unit = len(kinds) + 1
            last = unit == plan.units
            kinds.append(
                Kind(
                    start="",
                    phase=phase.name.rstrip(" 0123456789"),
                    closes=phase.finish is not None and position == phase.units,
                    tests=unit in evaluated or last,
                    last=last,
                )
            )
    return tuple(kinds)


MAX_TICK_S = 1.0
"""Seconds by which the watchdog's clock advances at most between two checks: while the driver itself was held up,
results of trials may be waiting to be read."""

Identity = int | str
"""A trial's number in the study, else Tune's id."""


@dataclass
class _WatchedProcess:
    """The process that runs a trial, and its present unit."""

    actor: Any
    unit: int
    """Last unit that the driver has a result of."""
    since: float
    """When the present unit began, by the watchdog's clock."""
    start: Start
    """Start-up that the present unit's time includes."""


class _Expected(NamedTuple):
    """How long a unit is expected to take."""

    seconds: float
    reason: str


class Watchdog(Callback):  # type: ignore[misc]  # ray is untyped
    """Checks every running trial at each step of Tune's loop.

    The loop runs whether or not results arrive.

    Args:
        limits: the study's section `failures`.
        task: `dataclasses.asdict` of the settings that all trials share, for `history`.
        history: trials of earlier runs of the study, whose unit times count.
        kill: ends the process of an actor and returns where it was.
        clock: seconds.
    """

    def __init__(
        self,
        limits: FailuresSpec,
        task: Mapping[str, Any] | None = None,
        history: Iterable[TrialRecord] = (),
        kill: Callable[[Any], str] = kill_actor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._kill = kill
        self._clock = clock
        self.verdicts: dict[str, str] = {}
        """Tune's trial id → why its process was killed; the callback that records the failure removes it."""
        self._checked_at = clock()
        self._now = 0.0
        self._watched: dict[str, _WatchedProcess] = {}
        self._warm_actors: set[str] = set()
        self._units: dict[Identity, int] = {}
        self._stalls: dict[Identity, int] = defaultdict(int)
        self._slowest: dict[Identity, float] = defaultdict(float)
        self._times_of_trial: dict[tuple[Identity, Kind], list[float]] = defaultdict(list)
        self._times_of_entry: dict[tuple[str, Kind], list[float]] = defaultdict(list)
        for record in history:
            self._replay(record, task or {})

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Check all trials that have a process."""
        try:
            self._check(trials)
        except Exception:  # an exception in a Tune callback would end the experiment
            logger.exception("The watchdog failed; a hung trial may not be found")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Record the duration of a unit."""
        watched = self._watched.get(trial.trial_id)
        if watched is None or "failure" in result:
            return
        self._advance()
        unit = int(result.get("unit") or result.get("training_iteration") or 0)
        if unit > watched.unit or not watched.start:
            self._record(trial.config, unit, watched.start, self._now - watched.since)
            self._warm_actors.add(actor_id(watched.actor))
            watched.start = ""
        # Otherwise a resumed trial has re-reported its last result, which is not progress: the unit that follows still
        # includes the start-up of its process.
        watched.unit = unit
        watched.since = self._now
        self._units[_identity(trial)] = unit

    def allowed(self, trial: Trial, unit: int, start: Start = "") -> tuple[float, str]:
        """Seconds that a trial may take for a unit, and the sentence that justifies them.

        Args:
            unit: 1-based.
            start: the start-up that its time includes.
        """
        identity = _identity(trial)
        kind = kind_of(trial.config, unit, start)
        # Every kill of a trial for a stall doubles the time that its next attempt gets.
        patience = 2 ** self._stalls[identity]
        expected = self._expected(identity, _label(trial.config), kind)
        if expected is None:
            seconds = self.limits.stall_first * patience
            reason = f"none of its kind ({kind}) has been done yet"
        else:
            factor = self.limits.stall_factor or 0.0
            seconds = max(self.limits.stall_floor, factor * expected.seconds) * patience
            reason = expected.reason
        slowest = self._slowest[identity]
        if slowest > seconds:  # units of any kind may include a checkpoint on a slow disk
            seconds = slowest
            reason = f"the trial's slowest unit took {slowest:.3g} s"
        return seconds, f"{seconds:.3g} s are allowed, because {reason}"

    def _expected(self, identity: Identity, label: str, kind: Kind) -> _Expected | None:
        """The expected duration of a unit; None = nothing to compare it with.

        From units of its kind of the trial itself, else of its entry, else from a unit of its kind without start-up
        plus a start-up.
        """
        times = self._times_of_trial.get((identity, kind))
        if times:
            median = statistics.median(times)
            return _Expected(median, f"the median of the trial's units of this kind is {median:.3g} s")
        times = self._times_of_entry.get((label, kind))
        if times:
            return _Expected(max(times), f"others of its entry took at most {max(times):.3g} s")
        if not kind.start:
            return None
        # A resumed trial continues in another process with a unit of a kind that no process has begun with.
        first_units = [
            max(times)
            for (entry, entry_kind), times in self._times_of_entry.items()
            if entry == label and entry_kind.start == kind.start
        ]
        plain = self._expected(identity, label, kind._replace(start=""))
        if plain is None or not first_units:
            return None
        seconds = plain.seconds + max(first_units)
        return _Expected(seconds, f"a start and a unit of this kind took at most {seconds:.3g} s")

    def _check(self, trials: Iterable[Trial]) -> None:
        self._advance()
        if self.limits.stall_factor is None:
            return
        present = set()
        for trial in trials:
            actor = actor_of(trial)
            # Tune takes a while to see a killed process; until then its trial is not judged again.
            if actor is None or trial.trial_id in self.verdicts:
                continue
            present.add(trial.trial_id)
            watched = self._watched.get(trial.trial_id)
            if watched is None or watched.actor is not actor:
                start: Start = "warm" if actor_id(actor) in self._warm_actors else "cold"
                unit = self._units.get(_identity(trial), 0)
                watched = _WatchedProcess(actor, unit, self._now, start)
                self._watched[trial.trial_id] = watched
            self._judge(trial, watched)
        for trial_id in set(self._watched) - present:
            del self._watched[trial_id]

    def _judge(self, trial: Trial, watched: _WatchedProcess) -> None:
        """Kill the process if its present unit takes longer than it may."""
        waited = self._now - watched.since
        if waited <= self.limits.stall_floor:
            return
        allowed, reason = self.allowed(trial, watched.unit + 1, watched.start)
        if waited <= allowed:
            return
        watched.since = self._now  # should the kill fail, it is tried again, but not at once
        self._stalls[_identity(trial)] += 1
        where = self._kill(watched.actor)
        verdict = f"StalledError: unit {watched.unit + 1} has not ended after {waited:.3g} s; {reason}. {where}"
        self.verdicts[trial.trial_id] = verdict
        logger.warning("Trial %s hangs. %s", _identity(trial), verdict)

    def _record(self, config: Mapping[str, Any], unit: int, start: Start, seconds: float) -> None:
        kind = kind_of(config, unit, start)
        identity = config.get("_number", "")
        self._slowest[identity] = max(self._slowest[identity], seconds)
        self._times_of_trial[identity, kind].append(seconds)
        self._times_of_entry[_label(config), kind].append(seconds)

    def _replay(self, record: TrialRecord, shared: Mapping[str, Any]) -> None:
        """Record the unit times of a trial of an earlier run.

        The journal does not say which units were the first of a process, but for the first of all; where that was a
        cold start, its time is only longer than that of a warm one.
        """
        # As the trial ran: trials of the stages, and of runs with other settings, are evaluated at other units.
        evaluated = [int(past["unit"]) for past in record.history if any(map(_is_tested, past))]
        config = {
            "shared": {**shared, "evaluate_at": evaluated},
            "_number": record.number,
            "label": record.label,
            "strategy": record.strategy,
            "hparams": record.hparams,
            "role": record.role,
        }
        for past in record.history:
            if UNIT_SECONDS.name in past:
                unit = int(past["unit"])
                self._record(config, unit, "warm" if unit == 1 else "", past[UNIT_SECONDS.name])
        self._units[record.number] = record.unit

    def _advance(self) -> None:
        now = self._clock()
        self._now += min(now - self._checked_at, MAX_TICK_S)
        self._checked_at = now


def _is_tested(name: str) -> bool:
    """Whether a metric is measured on test or OOD images."""
    return name.startswith((f"{TEST}/", ood("")))


def _identity(trial: Trial) -> Identity:
    identity: Identity = trial.config.get("_number", trial.trial_id)
    return identity


def _label(config: Mapping[str, Any]) -> str:
    return str(config.get("label") or config.get("strategy"))
