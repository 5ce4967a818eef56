"""Finds trials that hang, from outside their process, and kills them: Tune then tries them again from a checkpoint.

A process that is stopped, deadlocked or stuck in native code with the interpreter's lock says nothing, so the driver
looks at what every healthy trial does: it reports a unit. Units differ (the first loads the network, a closed-form
phase takes a moment, at rungs and at the end the test sets are evaluated), so each is measured by units of its kind.

What each unit of a trial consists of, as far as its length depends on it: units of one kind take about as long.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ray.tune import Callback

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

    from orchestrator.record.records import TrialRecord
    from orchestrator.study_file.schema import FailuresSpec


Start = Literal["", "warm", "cold"]
"""What comes before the unit: nothing, a network to build in a process that had one before, or everything."""


class Kind(NamedTuple):
    """Units of one strategy that do the same."""

    start: Start
    phase: str
    """Name of the strategy's phase, without the number of a cycle: a head alone is trained faster than all of it."""
    closes: bool
    """Whether the phase has something to do at its end, and this is it."""
    tests: bool
    """Whether the test sets are evaluated after it."""
    last: bool
    """Whether the trial's final evaluation and diagnostics follow."""

    def __str__(self) -> str:
        words = ["first of a process"] if self.start else []
        words += ["last of the trial"] if self.last else ["evaluated on the test sets"] if self.tests else []
        return " and ".join(words) or "plain"


def kind_of(config: Mapping[str, Any], unit: int, start: Start = "") -> Kind:
    """The kind of one unit.

    Args:
        config: a `TrialSpec.to_dict()`; the epochs and rungs of its task, its strategy and hyperparameters are read.
        unit: 1-based.
        start: what comes before it.
    """
    task = config.get("task") or {}
    hparams = json.dumps(dict(config.get("hparams") or {}), sort_keys=True, default=str)
    plain = _kinds(
        str(config.get("strategy")), hparams, int(task.get("epochs") or 1), tuple(task.get("evaluate_at") or ())
    )
    return plain[min(max(unit, 1), len(plain)) - 1]._replace(start=start)


@functools.cache
def _kinds(strategy: str, hparams: str, epochs: int, tested: Sequence[int]) -> tuple[Kind, ...]:
    from trainables import strategy_class
    from trainables.engine.budget import Plan

    try:
        plan = Plan.of(strategy_class(strategy).from_hparams(json.loads(hparams)), epochs, 1)
    except (ValueError, TypeError):  # the trial itself will say what is wrong
        return (Kind("", "", False, True, True),)
    found: list[Kind] = []
    for phase in plan.phases:
        for inside in range(phase.units):
            unit = len(found) + 1
            closes = phase.finish is not None and inside + 1 == phase.units
            found.append(
                Kind(
                    "",
                    phase.name.rstrip(" 0123456789"),
                    closes,
                    unit in tested or unit == plan.units,
                    unit == plan.units,
                )
            )
    return tuple(found)


logger = logging.getLogger("luthier")

TICK = 1.0
"""Seconds that pass at most between two looks, by the watchdog's own clock: while the driver itself was held up, trials
may have reported what nobody has read yet."""

Identity = int | str
"""A trial's number in the study, else Tune's id."""


@dataclass
class _Watched:
    """What a process is doing for a trial right now."""

    actor: Any
    unit: int
    """Done so far, as far as the driver knows."""
    since: float
    """When the present unit began, by the watchdog's clock."""
    start: Start


class Watchdog(Callback):  # type: ignore[misc]  # ray is untyped
    """Looks at every running trial each time Tune's loop comes round, which it also does while no result arrives.

    Args:
        limits: the study's section `failures`.
        task: `dataclasses.asdict` of what all trials share, for `history`.
        history: trials of earlier runs of the study, whose times count.
        kill: ends the process of an actor and says where it was.
        clock: seconds.
    """

    def __init__(
        self,
        limits: FailuresSpec,
        task: Mapping[str, Any] | None = None,
        history: Iterable[TrialRecord] = (),
        kill: Callable[[Any], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits, self._kill, self._clock = limits, kill or kill_actor, clock
        self.verdicts: dict[str, str] = {}
        """Tune's trial id → why its process was killed; taken out by whoever records the failure."""
        self._looked, self._now = clock(), 0.0
        self._watched: dict[str, _Watched] = {}
        self._known_actors: set[str] = set()
        self._units: dict[Identity, int] = {}
        self._stalls: dict[Identity, int] = defaultdict(int)
        self._slowest: dict[Identity, float] = defaultdict(float)
        self._own: dict[tuple[Identity, Kind], list[float]] = defaultdict(list)
        self._entry: dict[tuple[str, Kind], list[float]] = defaultdict(list)
        for record in history:
            self._recall(record, task or {})

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Look at all trials that have a process."""
        try:
            self._look(trials)
        except Exception:  # an exception in a Tune callback would end the experiment
            logger.exception("The watchdog failed; a hung trial may not be found")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: Mapping[str, Any], **info: Any
    ) -> None:
        """A unit is done: note how long it took."""
        watched = self._watched.get(trial.trial_id)
        if watched is None or "failure" in result:
            return
        self._advance()
        unit = int(result.get("unit") or result.get("training_iteration") or 0)
        if unit > watched.unit or not watched.start:
            self._note(trial.config, unit, watched.start, self._now - watched.since)
            self._known_actors.add(_actor_id(watched.actor))
            watched.start = ""
        # Else the trial goes on and has said its last result again: its process has not done a unit yet.
        watched.unit, watched.since, self._units[_identity(trial)] = unit, self._now, unit

    def allowed(self, trial: Trial, unit: int, start: Start = "") -> tuple[float, str]:
        """Seconds that a trial may take for its unit of this number (1-based), and why so many.

        Args:
            start: what comes before the unit.
        """
        limits, identity, kind = self.limits, _identity(trial), kind_of(trial.config, unit, start)
        typical, whose = self._typical(identity, _label(trial.config), kind)
        patience = 2 ** self._stalls[identity]
        if typical is None:
            seconds, why = limits.stall_first * patience, f"none of its kind ({kind}) has been done yet"
        else:
            seconds = max(limits.stall_floor, (limits.stall_factor or 0.0) * typical) * patience
            why = f"{whose} {typical:.3g} s"
        if (slowest := self._slowest[identity]) > seconds:  # units of any kind may bring a checkpoint to a slow disk
            seconds, why = slowest, f"the trial's slowest unit took {slowest:.3g} s"
        return seconds, f"{seconds:.3g} s are allowed, because {why}"

    def _typical(self, identity: Identity, label: str, kind: Kind) -> tuple[float | None, str]:
        """Seconds that a unit of this kind takes, and in words whose; None = nothing is known."""
        if own := self._own.get((identity, kind)):
            return statistics.median(own), "the median of the trial's units of this kind is"
        if others := self._entry.get((label, kind)):
            return max(others), "others of its entry took at most"
        begun = [max(took) for (of, known), took in self._entry.items() if of == label and known.start == kind.start]
        if not kind.start or not begun:
            return None, ""
        plain, _ = self._typical(identity, label, kind._replace(start=""))  # it goes on in another process
        return (None, "") if plain is None else (plain + max(begun), "a start and a unit of this kind took at most")

    def _look(self, trials: Iterable[Trial]) -> None:
        self._advance()
        if self.limits.stall_factor is None:
            return
        present = set()
        for trial in trials:
            actor = trial.temporary_state.ray_actor
            if actor is None or trial.trial_id in self.verdicts:
                continue
            present.add(trial.trial_id)
            watched = self._watched.get(trial.trial_id)
            if watched is None or watched.actor is not actor:
                start: Start = "warm" if _actor_id(actor) in self._known_actors else "cold"
                unit = self._units.get(_identity(trial), 0)
                watched = self._watched[trial.trial_id] = _Watched(actor, unit, self._now, start)
            self._judge(trial, watched)
        for trial_id in set(self._watched) - present:
            del self._watched[trial_id]

    def _judge(self, trial: Trial, watched: _Watched) -> None:
        waited = self._now - watched.since
        if waited <= self.limits.stall_floor:
            return
        allowed, why = self.allowed(trial, watched.unit + 1, watched.start)
        if waited <= allowed:
            return
        watched.since = self._now  # should the kill fail, it is tried again, but not at once
        self._stalls[_identity(trial)] += 1
        self.verdicts[trial.trial_id] = verdict = (
            f"StalledError: unit {watched.unit + 1} has not ended after {waited:.3g} s; {why}. "
            f"{self._kill(watched.actor)}"
        )
        logger.warning("Trial %s hangs. %s", _identity(trial), verdict)

    def _note(self, config: Mapping[str, Any], unit: int, start: Start, seconds: float) -> None:
        kind, identity = kind_of(config, unit, start), config.get("_number", "")
        self._slowest[identity] = max(self._slowest[identity], seconds)
        self._own[identity, kind].append(seconds)
        self._entry[_label(config), kind].append(seconds)

    def _recall(self, record: TrialRecord, task: Mapping[str, Any]) -> None:
        """Take over the times of an earlier run. Which were the first of a process nobody knows any more, but for the
        first of all; where it was a cold start, the time is only longer than that of a warm one."""
        config = {"task": task, "_number": record.number, "label": record.label}
        config |= {"strategy": record.strategy, "hparams": record.hparams}
        for past in record.history:
            if "cost/unit_seconds" in past:
                unit = int(past["unit"])
                self._note(config, unit, "warm" if unit == 1 else "", past["cost/unit_seconds"])
        self._units[record.number] = record.unit

    def _advance(self) -> None:
        looked = self._clock()
        self._now += min(looked - self._looked, TICK)
        self._looked = looked


def kill_actor(actor: Any) -> str:
    """End the process of an actor for good and say where it was. A stopped process cannot end itself: on this machine
    it gets SIGKILL at once, elsewhere its machine's raylet does that, some five seconds after Ray was told. Until then
    it cannot do harm if it wakes up: Ray takes no result of it, and the trial's next attempt owns the checkpoints."""
    import ray
    from ray._private.state import actors

    pid, node = None, None
    try:
        known = actors(_actor_id(actor))
        pid, node = known.get("Pid"), known.get("Address", {})
        if node.get("NodeID") == ray.get_runtime_context().get_node_id() and _is_worker(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    finally:
        ray.kill(actor)
    return f"Its process {pid} on {(node or {}).get('IPAddress')} was killed."


def _is_worker(pid: int | None) -> bool:
    """Whether the process is one of Ray's here; not known on systems without /proc."""
    try:
        return bool(pid) and Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def _actor_id(actor: Any) -> str:
    return str(actor._actor_id.hex())


def _identity(trial: Trial) -> Identity:
    found: Identity = trial.config.get("_number", trial.trial_id)
    return found


def _label(config: Mapping[str, Any]) -> str:
    return str(config.get("label") or config.get("strategy"))
