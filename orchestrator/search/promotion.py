"""Pause and promote: asynchronous successive halving in its original form, per entry.

Li et al. (2020), "A System for Massively Parallel Hyperparameter Tuning", MLSys, algorithm 2: every trial pauses at a
rung; whenever a slot is free, the best trial among the top 1/η of a rung that has not been promoted yet continues, from
the highest rung down, and only where there is none a new trial starts. Two rules make it end with a finite budget:

- A trial is *withdrawn* as soon as it can no longer be promoted: its rank can only fall, and even if every trial that
  could still reach its rung did so, the rung's quota would stay below it.
- Once no new trial comes, an entry without a completed trial promotes its best waiting one until a trial has used its
  whole budget. With few trials per entry ⌊n/η⌋ is 0, and an entry without a completed trial could not be ranked.

No Ray and no Optuna here: the searcher, the scheduler and the journal's callback share one `Promotions`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.record.records import TrialRecord


class _Entry:
    """Rungs of one entry, lowest first."""

    def __init__(self, count: int, reduction: float) -> None:
        self.scores: list[dict[int, float]] = [{} for _ in range(count)]
        """Per rung: trial → score of every trial that reached it; higher is better."""
        self.waiting: dict[int, int] = {}
        """Paused trial → index of its rung."""
        self.active: set[int] = set()
        """Trials that run or are about to."""
        self.has_completed = False
        """Whether a trial has used its whole budget."""
        self._reduction = reduction

    def rank(self, trial: int) -> int:
        """Position of a waiting trial at its rung, 1 = best; the earlier trial is the better of equals."""
        scores = self.scores[self.waiting[trial]]
        order = sorted(scores, key=lambda other: (-scores[other], other))
        return order.index(trial) + 1

    def promotable(self, rung: int) -> int | None:
        """The best waiting trial among the top ⌊n/η⌋ of a rung."""
        scores = self.scores[rung]
        top = sorted(scores, key=lambda trial: (-scores[trial], trial))[: self._quota(len(scores))]
        # What is among the top and does not wait has been promoted before, or has ended.
        return next((trial for trial in top if self.waiting.get(trial) == rung), None)

    def best_waiting(self) -> int | None:
        """The best waiting trial of the highest rung at which any waits."""

        def standing(trial: int) -> tuple[int, float, int]:
            rung = self.waiting[trial]
            return rung, self.scores[rung][trial], -trial

        return max(self.waiting, key=standing, default=None)

    def hopeless(self, remaining: int) -> list[int]:
        """Waiting trials that cannot be promoted any more.

        Args:
            remaining: trials that may still be proposed, at most.
        """
        reserve = None if self.has_completed else self.best_waiting()
        return [trial for trial in self.waiting if trial != reserve and not self._has_chance(trial, remaining)]

    def _has_chance(self, trial: int, remaining: int) -> bool:
        rung = self.waiting[trial]
        scores = self.scores[rung]
        underway = sum(other not in scores for other in self.active)
        below = sum(other_rung < rung for other_rung in self.waiting.values())
        return self.rank(trial) <= self._quota(len(scores) + underway + below + remaining)

    def _quota(self, count: int) -> int:
        return math.floor(count / self._reduction)


class Promotions:
    """Which search trials wait at a rung, and which of them continues next.

    Trials are identified by their numbers in the study.

    Args:
        rungs: units after which trials pause, ascending, all below the budget of a trial.
        reduction: η.
        labels: the study's entries; where trials of several wait at one rung, those of the first are promoted first.
        later: labels of the entries whose trials pass the first rung, see `orchestrator.search.grace`.

    Example:
        >>> promotions = Promotions(rungs=(1, 3), reduction=2, labels=["full"])
        >>> for trial, score in enumerate([0.5, 0.7]):
        ...     promotions.add(trial, "full")
        ...     print(promotions.report(trial, 1, score))
        False
        True
        >>> promotions.waiting, promotions.promote_next()
        ([0], None)
    """

    def __init__(
        self, rungs: Sequence[int], reduction: float, labels: Sequence[str], later: Collection[str] = ()
    ) -> None:
        self.rungs = tuple(rungs)
        self._later = frozenset(later)
        self.withdrawn: set[int] = set()
        """Trials that waited and have no chance of promotion any more; to be ended."""
        self._entries = {label: _Entry(len(self.rungs), reduction) for label in labels}
        self._label_of: dict[int, str] = {}
        self._undecided: dict[int, tuple[int, float]] = {}
        """Trial that was interrupted at a rung → the rung's unit and the trial's score."""

    @classmethod
    def replay(
        cls,
        rungs: Sequence[int],
        reduction: float,
        history: Sequence[TrialRecord],
        metric: str,
        maximise: bool,
        labels: Sequence[str],
        later: Collection[str] = (),
    ) -> Promotions:
        """The state at the end of earlier runs of a study.

        The last unit of a trial that was interrupted while it ran is left out: it is reported again, and decided then.
        Where its checkpoint is newer, it had passed that rung, and its score is entered with its first report.

        Args:
            rungs: as for the class.
            reduction: as for the class.
            history: all trials of the study.
            metric: what is compared.
            maximise: whether higher is better.
            labels: as for the class; trials of other entries are left out.
            later: as for the class.
        """
        promotions = cls(rungs, reduction, labels, later)
        sign = 1.0 if maximise else -1.0
        for record in history:
            if record.role == "search" and record.label in labels:
                scores = {int(past["unit"]): sign * past.get(metric, math.nan) for past in record.history}
                promotions._replay(record, scores)
        return promotions

    @property
    def waiting(self) -> list[int]:
        """All waiting trials, by number."""
        return sorted(trial for entry in self._entries.values() for trial in entry.waiting)

    def waits(self, trial: int) -> bool:
        """Whether a trial is paused at a rung."""
        return trial in self.withdrawn or trial in self._waiting_of(trial)

    def add(self, trial: int, label: str) -> None:
        """Enter a trial that starts, or one that is started again after a failure; a waiting trial stays paused."""
        self._label_of[trial] = label
        if not self.waits(trial):
            self._entries[label].active.add(trial)

    def report(self, trial: int, unit: int, score: float) -> bool:
        """Enter the score of a unit; returns whether the trial continues at once, else it waits.

        A rung that a trial has passed before, as after a restart from an older checkpoint, does not stop it again.

        Args:
            trial: trials that were never added continue.
            unit: 1-based.
            score: higher is better; one that is not finite counts as the lowest.
        """
        label = self._label_of.get(trial)
        if label is None:
            return True
        entry = self._entries[label]
        if trial in self._undecided and unit > self._undecided[trial][0]:
            passed, earlier_score = self._undecided.pop(trial)
            entry.scores[self.rungs.index(passed)].setdefault(trial, earlier_score)
        if unit not in self._rungs_of(label):
            return True
        rung = self.rungs.index(unit)
        if trial in entry.scores[rung]:
            return True
        entry.scores[rung][trial] = score if math.isfinite(score) else -math.inf
        entry.active.discard(trial)
        entry.waiting[trial] = rung
        # Its slot is free now: where it is itself next, it need not be paused.
        if self._next() != trial:
            return False
        self._promote(trial)
        return True

    def promote_next(self) -> int | None:
        """Promote the trial that algorithm 2 would run next; None = none is among the top of its rung."""
        trial = self._next()
        if trial is not None:
            self._promote(trial)
        return trial

    def promote_last(self) -> int | None:
        """Promote a trial of an entry that would end without a completed one; for the time when no new trial comes.

        Returns:
            The best waiting trial of an entry of which none runs; None = there is no such entry.
        """
        for entry in self._entries.values():
            trial = entry.best_waiting()
            if trial is not None and not entry.has_completed and not entry.active:
                self._promote(trial)
                return trial
        return None

    def withdraw(self, remaining: int) -> bool:
        """Withdraw the waiting trials that cannot be promoted any more; returns whether there are withdrawn ones.

        Afterwards, of the n trials that have reached a rung of an entry or still could, at most ⌊n/η⌋ wait there, plus
        one trial per entry that has completed none.

        Args:
            remaining: trials that may still be proposed, at most.
        """
        for entry in self._entries.values():
            # Again, since a withdrawn trial is one less that could still reach a higher rung.
            while hopeless := entry.hopeless(remaining):
                for trial in hopeless:
                    del entry.waiting[trial]
                    self.withdrawn.add(trial)
        return bool(self.withdrawn)

    def withdraw_all(self) -> None:
        """Withdraw every waiting trial: nothing runs or comes any more that could promote one."""
        for entry in self._entries.values():
            self.withdrawn |= set(entry.waiting)
            entry.waiting.clear()

    def end(self, trial: int, completed: bool = False) -> None:
        """Enter the end of a trial, or of an attempt; its scores stay."""
        self.withdrawn.discard(trial)
        label = self._label_of.get(trial)
        if label is not None:
            entry = self._entries[label]
            entry.active.discard(trial)
            entry.waiting.pop(trial, None)
            entry.has_completed |= completed

    def describe(self) -> str:
        """One line per entry: trials that reached each rung, and those that wait there."""
        lines = []
        for label, entry in self._entries.items():
            rungs = [
                f"unit {unit}: {len(entry.scores[rung])} ({list(entry.waiting.values()).count(rung)} waiting)"
                for rung, unit in enumerate(self.rungs)
            ]
            lines.append(f"{label}: {' | '.join(rungs)}")
        return "\n".join(lines)

    def _rungs_of(self, label: str) -> tuple[int, ...]:
        return self.rungs[1:] if label in self._later else self.rungs

    def _waiting_of(self, trial: int) -> Mapping[int, int]:
        label = self._label_of.get(trial)
        return {} if label is None else self._entries[label].waiting

    def _next(self) -> int | None:
        for rung in reversed(range(len(self.rungs))):
            for entry in self._entries.values():
                trial = entry.promotable(rung)
                if trial is not None:
                    return trial
        return None

    def _promote(self, trial: int) -> None:
        entry = self._entries[self._label_of[trial]]
        del entry.waiting[trial]
        entry.active.add(trial)

    def _replay(self, record: TrialRecord, scores: Mapping[int, float]) -> None:
        trial = record.number
        entry = self._entries[record.label]
        self._label_of[trial] = record.label
        waits = record.state == "paused" and record.unit in self.rungs
        # A trial that completes before its budget (a closed-form solution takes one unit) is no measure for others at
        # its last unit.
        decided = waits or (record.state != "complete" and not record.resumable)
        for unit in self._rungs_of(record.label):
            rung = self.rungs.index(unit)
            if unit not in scores:
                continue
            score = scores[unit] if math.isfinite(scores[unit]) else -math.inf
            if unit < record.unit or decided:
                entry.scores[rung][trial] = score
            elif record.resumable:
                self._undecided[trial] = unit, score
        if waits:
            entry.waiting[trial] = self.rungs.index(record.unit)
        elif record.resumable:
            entry.active.add(trial)
        entry.has_completed |= record.state == "complete"
