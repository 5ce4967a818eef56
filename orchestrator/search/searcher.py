"""What to try next: a Tune searcher on Optuna's ask and tell, over all strategies of a study under one budget."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState
from ray.tune.search import Searcher

from orchestrator.search.ledger import Ledger, identity
from orchestrator.search.optuna_store import History, OptunaStorage, Replay
from orchestrator.search.proposals import Proposals
from orchestrator.search.sampling import check_sampler, maximised
from orchestrator.search.space import SearchError, SearchSpace, space_contents
from orchestrator.search.stages import Entry, Stage
from trainables.specs.trial_spec import Task, TrialSpec

if TYPE_CHECKING:
    from orchestrator.record.journal import Journal
    from orchestrator.record.records import TrialRecord

__all__ = ["Entry", "SearchError", "StudySearcher"]

log = logging.getLogger(__name__)


class StudySearcher(Searcher):  # type: ignore[misc]
    """Proposes the trials of a study: its search, then its stages (folds, confirmation), in one Tuner.

    Use it with `TuneConfig(search_alg=…, num_samples=-1, max_concurrent_trials=…)`; it ends the run itself. Every
    config that it returns is `TrialSpec.to_dict()` plus `_number`, the trial's position in the study. Optuna's storage
    holds the study: a new searcher over the same storage continues it, trials that an earlier driver left
    unfinished first and under their old numbers. With one trial at a time, proposals depend on the seed alone.

    Optuna hears COMPLETE only of trials that used their budget (`finished`), PRUNED of those stopped before, FAIL of
    those that raised or whose metric is missing or not finite. The value told is `best/<metric>` where a trial reports
    it, since the weights of the best unit are what a trial is worth.

    Args:
        entries: what competes; their labels are unique.
        task: what all trials share.
        url: Optuna storage, e.g. `sqlite:////abs/study/optuna.db`.
        study_name: Optuna's name of the study.
        trials: budget of the search; folds and confirmations come on top.
        sampler: `tpe`, `gp`, `random`, `nsga2` or `paper` (see orchestrator/search/sampling.py).
        seed: the study's seed.
        epochs: units of a full trial, for trainables that do not report `finished`; None = the task's.
        metric: the objective, or several of them.
        stages: what follows the search, in order.
        journal: gets `trial_suggested` before Tune hears of a trial; what it says of earlier runs counts, not Optuna.
        time_budget_s: seconds from the first proposal after which nothing more is proposed.
        checkpoints: number → folder where that trial keeps its checkpoints; None = trials keep none.
        changed: the study was changed since its last run, and a person allowed it.
        hints: label → values that a trial after the default points gets, the others at their defaults.
        searching: False = only the stages run.

    Raises:
        ValueError: two entries of one label, unknown sampler, strategy or preset, a metric of test data, a budget too
            small for the given points (SearchError), or an existing Optuna study with other contents (SearchError).
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        task: Task,
        url: str,
        study_name: str,
        trials: int,
        sampler: str = "tpe",
        seed: int = 0,
        epochs: int | None = None,
        metric: str | Sequence[str] = "val/acc",
        stages: Sequence[Stage] = (),
        journal: Journal | None = None,
        time_budget_s: float | None = None,
        checkpoints: Callable[[int], Path] | None = None,
        changed: bool = False,
        hints: Mapping[str, Mapping[str, Any]] | None = None,
        searching: bool = True,
    ) -> None:
        self.metrics = (metric,) if isinstance(metric, str) else tuple(metric)
        maximise = [maximised(name) for name in self.metrics]
        check_sampler(sampler, len(self.metrics))
        modes = ["max" if m else "min" for m in maximise]
        one = len(self.metrics) == 1
        super().__init__(self.metrics[0] if one else list(self.metrics), modes[0] if one else modes)
        self.epochs = task.epochs if epochs is None else epochs
        self.max_concurrent: int | None = None
        contents = _contents(entries, task, self.epochs, self.metrics, seed)
        space = SearchSpace(entries, task, sampler, seed, maximise)
        self.proposals = Proposals(space, trials, hints)
        self._searching = searching
        replay = None
        if journal is not None:
            replay = Replay(History.of(journal.events(), self.metrics), space)
        storage = OptunaStorage(url, study_name, maximise, contents, replay, changed)
        self.ledger = Ledger(storage, journal)
        self._journal, self._checkpoints = journal, checkpoints
        self._stages = deque(stages)
        self._queue: deque[TrialSpec] = deque()
        self._configs: dict[str, dict[str, Any]] = {}
        self._budget_s = time_budget_s
        self._began: float | None = None

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Keep the limit here: Tune's own limiter would drop completions of resumed trials (STACK facts, A3.7)."""
        self.max_concurrent = max_concurrent
        return True

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Metric and space are the study's own; what Tune passes is not used."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The config of the next trial, None to be asked again later, or `Searcher.FINISHED`."""
        if trial_id in self._configs:
            return self._configs[trial_id]
        self._began = time.monotonic() if self._began is None else self._began
        if self._budget_s is not None and time.monotonic() - self._began >= self._budget_s:
            log.warning("The time budget of %g s is used up: nothing more is proposed.", self._budget_s)
            return str(Searcher.FINISHED)
        if self.max_concurrent and len(self.ledger.running) >= self.max_concurrent:
            return None
        found = self.proposals.next(self.ledger) if self._searching else None
        if found is None:
            if self.ledger.running and not self._queue:
                return None
            spec = self._staged()
            if spec is None:
                return str(Searcher.FINISHED)
            found = self.ledger.given.ask(), spec
        trial, spec = found
        record = self.ledger.start(trial_id, trial, spec)
        self._record(record)
        self._configs[trial_id] = {**spec.to_dict(), "_number": record.number}
        if self._checkpoints is not None:
            self._configs[trial_id]["_checkpoints"] = str(self._checkpoints(record.number))
        return self._configs[trial_id]

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Keep the value of one unit."""
        value = result.get(self.metrics[0])
        if isinstance(value, int | float) and math.isfinite(value):
            self.ledger.report(trial_id, _unit(result), float(value))

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna how a trial ended (see the class)."""
        self._configs.pop(trial_id, None)
        if result:
            self.on_trial_result(trial_id, result)
        values = self._values(result or {})
        if error or (result and (values is None or "failure" in result)):
            self.ledger.end(trial_id, TrialState.FAIL, None, result)
        elif not result or not (result.get("finished") or _unit(result) >= self.epochs):
            self.ledger.end(trial_id, TrialState.PRUNED, None, result)
        else:
            self.ledger.end(trial_id, TrialState.COMPLETE, values, result)

    def close(self) -> None:
        """Withdraw what still runs (interrupted, or the time budget is used up): the next driver repeats it."""
        self.ledger.close()

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: Optuna's storage has it."""
        with open(checkpoint_path, "w", encoding="utf-8") as file:
            file.write("{}\n")

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: `Tuner.restore` would bring back trials that Optuna's storage knows better."""
        raise SearchError("A study is continued by running it again over the same storage, not by Tuner.restore.")

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher for `restore`, which this one refuses; the copy holds nothing."""
        return {"_metric": self._metric, "_mode": self._mode}

    def _staged(self) -> TrialSpec | None:
        """The next trial of the stages; called only when the search is over. None = the study is over."""
        while not self._queue and self._stages:
            finished = self.ledger.finished
            known = {identity(record) for record in finished}
            self._queue.extend(s for s in self._stages[0].next(finished) if identity(s) not in known)
            if not self._queue:
                self._stages.popleft()
        return self._queue.popleft() if self._queue else None

    def _values(self, result: Mapping[str, Any]) -> list[float] | None:
        found = [result.get(f"best/{name}", result.get(name)) for name in self.metrics]
        values = [float(v) for v in found if isinstance(v, int | float) and math.isfinite(v)]
        return values if len(values) == len(found) else None

    def _record(self, record: TrialRecord) -> None:
        if self._journal is not None:
            place = ("trial_id", "number", "seed", "role", "held_out", "sample")
            names = (*place, "strategy", "label", "hparams", "config_hash", "search_values")
            self._journal.append("trial_suggested", **{name: getattr(record, name) for name in names})


def _unit(result: Mapping[str, Any]) -> int:
    return int(result.get("unit", result.get("training_iteration", 0)))


def _contents(entries: Sequence[Entry], task: Task, epochs: int, metrics: Sequence[str], seed: int) -> dict[str, Any]:
    """What trials must have in common to be comparable: not where the data lie, but what is done with them."""
    shared = dataclasses.asdict(task)
    for name in ("store", "cache", "eval_batch_size", "evaluate_at", "diagnostics", "train_on"):
        del shared[name]
    return {**shared, "epochs": epochs, "metric": list(metrics), "seed": seed, "strategies": space_contents(entries)}
