"""Search of a study: a Tune searcher on Optuna's ask and tell.

All strategies compete under one budget.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState
from ray.tune.search import Searcher

from orchestrator.record.costs import objective_value
from orchestrator.search.ledger import Ledger, identity
from orchestrator.search.optuna_store import History, OptunaStorage, Replay
from orchestrator.search.proposals import Proposals
from orchestrator.search.sampling import check_sampler, maximised
from orchestrator.search.space import SearchError, SearchSpace, space_contents
from orchestrator.search.stages import Entry, Stage
from orchestrator.search.warm_start import WarmStart, learns_from_trials
from trainables.specs.metrics import CLASSIFICATION, TaskMetrics
from trainables.specs.trial_spec import SharedTrialSettings, TrialSpec

if TYPE_CHECKING:
    from orchestrator.record.journal import Journal
    from orchestrator.record.records import TrialRecord
    from orchestrator.search.promotion import Promotions

__all__ = ["Entry", "SearchError", "SearchSettings", "StudySearcher"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What is searched, and with which sampler and budget."""

    entries: Sequence[Entry]
    """What competes; labels are unique."""
    task: SharedTrialSettings
    """Settings that all trials share."""
    trials: int
    """Budget of the search; folds and confirmations are additional."""
    sampler: str = "tpe"
    """One of `orchestrator.search.sampling.SAMPLERS`."""
    allocation: str = "sampler"
    """One of `orchestrator.search.allocation.ALLOCATIONS`."""
    seed: int = 0
    """The study's seed."""
    metrics: TaskMetrics = CLASSIFICATION
    """Of the study's task."""
    objectives: tuple[str, ...] = ()
    """What is optimised, the selecting metric first: recorded names, or costs (`orchestrator.record.costs.COSTS`).
    Empty = the task's selection metric on ID validation alone."""
    hints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Label → values of a trial after the default points, with the others at their defaults."""
    warm_start: WarmStart = field(default_factory=WarmStart)
    """What is taken over from earlier studies."""

    def __post_init__(self) -> None:
        if not self.objectives:
            object.__setattr__(self, "objectives", (self.metrics.validation,))


class StudySearcher(Searcher):  # type: ignore[misc]
    """Proposes the trials of a study: its search, then its stages (folds, confirmation), in one Tuner.

    Use it with `TuneConfig(search_alg=…, num_samples=-1, max_concurrent_trials=…)`; it ends the run itself. Every
    config that it returns is `TrialSpec.to_dict()` plus `_number`, the trial's position in the study. Optuna's storage
    holds the study: a new searcher over the same storage continues it, with unfinished trials of earlier drivers first
    and under their old numbers. With one trial at a time, proposals depend on the seed alone.

    Only trials that use their whole budget (`finished`) are told to Optuna as COMPLETE; early-stopped ones as PRUNED
    (a paused trial is RUNNING, since Optuna has no such state, and PRUNED once it can no longer be promoted),
    and those that raised or whose objective is missing or not finite as FAIL. The objective is `best/<metric>` where a
    trial reports it, since a trial is worth the weights of its best unit. With several objectives Optuna accepts no
    values per unit.

    Args:
        settings: what is searched.
        url: Optuna storage, e.g. `sqlite:////abs/study/optuna.db`.
        study_name: Optuna's name of the study.
        stages: what follows the search, in order.
        journal: gets `trial_suggested` before Tune gets the trial; it takes precedence over Optuna's storage.
        checkpoints: number → checkpoint folder of that trial; None = trials keep none.
        kept: record → further keys of its trial's config (`trainables.engine.tune_trainable`), such as where it keeps
            weights and predictions; None = none.
        changed: whether a change of the study since its last run was allowed.
        searching: False = only the stages run.
        promotions: which trials are paused, shared with the scheduler; None = no trial ever is. Trials that an earlier
            driver left unfinished are then handed to Tune first, paused ones as paused.

    Raises:
        ValueError: two entries of one label, unknown sampler, strategy or preset, an objective that is a metric of test
            data or has no direction, a budget smaller than the prescribed points (SearchError), or an existing Optuna
            study with other contents (SearchError).
    """

    def __init__(
        self,
        settings: SearchSettings,
        url: str,
        study_name: str,
        *,
        stages: Sequence[Stage] = (),
        journal: Journal | None = None,
        checkpoints: Callable[[int], Path] | None = None,
        kept: Callable[[TrialRecord], Mapping[str, Any]] | None = None,
        changed: bool = False,
        searching: bool = True,
        promotions: Promotions | None = None,
    ) -> None:
        self.settings = settings
        self.objectives = settings.objectives
        maximise = [maximised(name, settings.metrics) for name in self.objectives]
        check_sampler(settings.sampler, len(self.objectives))
        modes = ["max" if higher_is_better else "min" for higher_is_better in maximise]
        if len(self.objectives) == 1:
            super().__init__(self.objectives[0], modes[0])
        else:
            super().__init__(list(self.objectives), modes)
        self.max_concurrent: int | None = None
        space = SearchSpace(settings.entries, settings.sampler, settings.allocation)
        costs = self.objectives[1:]
        self.proposals = Proposals(
            space,
            settings.task,
            settings.seed,
            settings.trials,
            maximise[0],
            settings.hints,
            settings.warm_start,
            learns_from_trials(settings.sampler, settings.allocation, costs),
        )
        self._searching = searching
        # A stage alone (`searching`) leaves the paused trials of the search as they are.
        self._promotions = promotions if searching else None
        open_trials: Mapping[int, TrialRecord] | None = None if promotions is None else {}
        replay = None
        if journal is not None:
            history = History.of(journal.events(), self.objectives, promotes=promotions is not None)
            replay = Replay(history, space)
            open_trials = None if promotions is None else history.open
        storage = OptunaStorage(url, study_name, maximise, _contents(settings), replay, changed)
        self.ledger = Ledger(storage, journal, open_trials)
        self._journal = journal
        self._checkpoints = checkpoints
        self._kept = kept
        self._stages = deque(stages)
        self._queue: deque[TrialSpec] = deque()
        self._configs: dict[str, dict[str, Any]] = {}

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Enforce the limit in `suggest`: Tune's own limiter would drop completions of resumed trials."""
        self.max_concurrent = max_concurrent
        return True

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Ignore Tune's metric and space: the study has its own."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The config of the next trial, None to be asked again later, or `Searcher.FINISHED`.

        Where trials pause, this is `get_job` of Li et al. (2020), algorithm 2: a free slot goes to a promotion, else to
        a new trial.
        """
        if trial_id in self._configs:
            return self._configs[trial_id]
        reopened = self._reopened(trial_id)
        if reopened is not None:
            return self._start(*reopened)
        # The scheduler ends withdrawn trials in the same step of Tune; only then does a sampler see them as ended.
        if self._promotions is not None and self._promotions.withdraw(self.proposals.remaining(self.ledger)):
            return None
        if self._is_full():
            return None
        if self._promotions is not None and self._promotions.promote_next() is not None:
            return None
        proposal = self.proposals.next(self.ledger) if self._searching else None
        if proposal is None and self._closes_rungs():
            return None
        if proposal is None:
            # A stage chooses among finished trials, so it waits for those that run.
            if self.ledger.running and not self._queue:
                return None
            spec = self._staged()
            if spec is None:
                return str(Searcher.FINISHED)
            # A study of its own in Optuna: the sampler must not learn from folds and confirmations.
            proposal = self.ledger.fixed.ask(), spec
        trial, spec = proposal
        return self._start(self.ledger.start(trial_id, trial, spec), spec)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Report the objective of one unit to Optuna."""
        value = result.get(self.objectives[0])
        if isinstance(value, int | float) and math.isfinite(value):
            self.ledger.report(trial_id, _unit(result), float(value))
        config = self._configs.get(trial_id)
        if config is not None and self._waits(config["_number"]):
            self.ledger.pause(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended (see the class)."""
        self._configs.pop(trial_id, None)
        if result:
            self.on_trial_result(trial_id, result)
        values = self._values(result or {})
        if error or (result and (values is None or "failure" in result)):
            self.ledger.end(trial_id, TrialState.FAIL, None, result)
        elif not result or not (result.get("finished") or _unit(result) >= self.settings.task.epochs):
            self.ledger.end(trial_id, TrialState.PRUNED, None, result)
        else:
            self.ledger.end(trial_id, TrialState.COMPLETE, values, result)

    def close(self) -> None:
        """Withdraw the running trials after an interruption; the next driver repeats them."""
        self.ledger.close()

    def save(self, checkpoint_path: str) -> None:
        """Save an empty state: Optuna's storage has it all."""
        with open(checkpoint_path, "w", encoding="utf-8") as file:
            file.write("{}\n")

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: `Tuner.restore` would bring back trials that disagree with Optuna's storage."""
        raise SearchError("A study is continued by running it again over the same storage, not by Tuner.restore.")

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher for `restore`, which this one refuses."""
        return {}

    def _start(self, record: TrialRecord, spec: TrialSpec) -> dict[str, Any]:
        """Journal a trial and return its config."""
        # Before Tune gets the trial: a crash in between leaves a trial that the next driver repeats, not one without a
        # record.
        self._record(record)
        config = {**spec.to_dict(), "_number": record.number}
        if self._checkpoints is not None:
            config["_checkpoints"] = str(self._checkpoints(record.number))
        if self._promotions is not None and record.role == "search":
            config["_checkpoint_at"] = list(self._promotions.rungs)
        if self._kept is not None:
            config |= self._kept(record)
        self._configs[record.trial_id] = config
        return config

    def _reopened(self, trial_id: str) -> tuple[TrialRecord, TrialSpec] | None:
        """The next unfinished trial of an earlier driver: paused ones at once, others where a slot is free.

        Trials of entries that the study no longer has stay unfinished.
        """
        if self._promotions is None:
            return None
        numbers = [n for n, record in self.ledger.open.items() if record.label in self.proposals.space.labels]
        number = min(numbers, key=lambda n: (not self._waits(n), n), default=None)
        if number is None or (self._is_full() and not self._waits(number)):
            return None
        record = self.ledger.reopen(trial_id, number)
        spec = TrialSpec(
            shared=self.settings.task,
            strategy=record.strategy,
            label=record.label,
            hparams=dict(record.hparams),
            seed=record.seed,
        )
        return record, spec

    def _waits(self, number: int) -> bool:
        return self._promotions is not None and self._promotions.waits(number)

    def _is_full(self) -> bool:
        """Whether every slot is taken; a paused trial takes none."""
        active = sum(not self._waits(record.number) for record in self.ledger.running)
        return bool(self.max_concurrent) and active >= (self.max_concurrent or 0)

    def _closes_rungs(self) -> bool:
        """Promote or withdraw waiting trials once there is no new one to propose; returns whether any waits."""
        if self._promotions is None or not self._promotions.waiting:
            return False
        promoted = self._promotions.promote_last()
        if promoted is None and all(self._waits(record.number) for record in self.ledger.running):
            self._promotions.withdraw_all()
        return True

    def _staged(self) -> TrialSpec | None:
        """The next trial of the stages, once the search is over; None = the study is over."""
        while not self._queue and self._stages:
            finished = self.ledger.finished
            done = {identity(record) for record in finished}
            self._queue.extend(spec for spec in self._stages[0].next(finished) if identity(spec) not in done)
            if not self._queue:
                self._stages.popleft()
        return self._queue.popleft() if self._queue else None

    def _values(self, result: Mapping[str, Any]) -> list[float] | None:
        reported = [objective_value(result, name) for name in self.objectives]
        values = [float(value) for value in reported if isinstance(value, int | float) and math.isfinite(value)]
        return values if len(values) == len(reported) else None

    def _record(self, record: TrialRecord) -> None:
        if self._journal is not None:
            self._journal.append("trial_suggested", **{name: getattr(record, name) for name in _JOURNALLED})
            if self._waits(record.number):
                self._journal.append("trial_paused", trial_id=record.trial_id)


_JOURNALLED = (
    "trial_id", "number", "seed", "role", "held_out", "sample", "strategy", "label", "hparams", "config_hash",
    "search_values",
)  # fmt: skip
"""Fields of a record in its event `trial_suggested`."""


def _unit(result: Mapping[str, Any]) -> int:
    return int(result.get("unit", result.get("training_iteration", 0)))


def _contents(settings: SearchSettings) -> dict[str, Any]:
    """Settings that trials must share to be comparable.

    Not where the data are stored, but how they are used.
    """
    shared = dataclasses.asdict(settings.task)
    for name in ("store", "cache", "eval_batch_size", "evaluate_at", "interim_splits", "diagnostics", "train_on"):
        del shared[name]
    if shared["channels_last"] is None:
        del shared["channels_last"]  # searches from before it could be set do not have it
    if shared["task"] == CLASSIFICATION.task:
        del shared["task"]  # searches from before there were other tasks name none
    return shared | {
        "metric": list(settings.objectives),
        "seed": settings.seed,
        "strategies": space_contents(settings.entries),
    }
