"""Proposals of a search: default points first, then sweeps and the sampler, until the budget is used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import Trial

import search_spaces
from orchestrator.record.records import TrialRecord
from orchestrator.search.allocation import next_entry
from orchestrator.search.entry_sampling import entry_parameters
from orchestrator.search.ledger import Ledger, identity
from orchestrator.search.paper_sweep import Later, Sweep
from orchestrator.search.sampling import LEARNING, make_sampler
from orchestrator.search.space import SearchSpace
from orchestrator.search.stages import Entry, search_seed
from orchestrator.search.warm_start import WarmStart
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import SharedTrialSettings, TrialSpec

log = logging.getLogger(__name__)

ROUNDS = 2
"""Random points of every searched entry after its default, before the sampler chooses between entries, so that one
unlucky point does not rule out a strategy."""
ATTEMPTS = 16
"""Consecutive duplicate proposals after which the space counts as exhausted; the second half are random."""

Proposal = tuple[Trial, TrialSpec]


class Proposals:
    """Proposes search trials; the next one follows from the ledger, the seed and the arguments alone.

    Order: the default point of every searched entry and the first point of every sweep; hints that are new to the
    study, each with its entry's defaults; the first points of a warm start; trials that an earlier driver left
    unfinished; the rest of the sweeps; then the sampler's proposals. Where the budget is allocated to the entries
    (`orchestrator.search.allocation`), a sampler of each entry's own chooses its values; else one sampler chooses entry
    and values, after `ROUNDS` rounds over the searched entries. A sweep that waits for its own trials does not block
    the others.

    Args:
        space: what may be proposed.
        task: settings that all trials share.
        seed: the study's.
        trials: budget of the search.
        maximise: whether a higher (first) objective is better.
        hints: see `orchestrator.search.searcher.SearchSettings`.
        warm_start: what is taken over from earlier studies.
        learns: whether the entries' samplers see its trials.

    Raises:
        SearchError: the budget is smaller than the default points and sweeps.
    """

    def __init__(
        self,
        space: SearchSpace,
        task: SharedTrialSettings,
        seed: int,
        trials: int,
        maximise: bool = True,
        hints: Mapping[str, Mapping[str, Any]] | None = None,
        warm_start: WarmStart | None = None,
        learns: bool = False,
    ) -> None:
        space.check_budget(trials)
        self.space = space
        self.task = task
        self.seed = seed
        self.trials = trials
        self._maximise = maximise
        self.sweeps = {
            label: Sweep(space.entries[label], preset, task, maximise) for label, preset in space.presets.items()
        }
        """Label → sweep, of entries that follow a preset."""
        self.exhausted = not space.searched
        """Whether the sampler has nothing new to propose."""
        self.hints = {label: values for label, values in (hints or {}).items() if label in space.searched}
        warm_start = warm_start or WarmStart()
        self._first_points = warm_start.first_points(space.searched)
        self._earlier = {label: warm_start.trials_of(label) if learns else () for label in space.searched}
        self._rounds = 0
        if space.searched and space.sampler != "random" and space.allocation == "sampler":
            # At most half of the remaining budget goes into the rounds.
            self._rounds = min(ROUNDS, (trials - space.prescribed) // (2 * len(space.searched)))

    def next(self, ledger: Ledger) -> Proposal | None:
        """The next search trial; None = wait, or the search is over.

        It is over where no trial runs.
        """
        finished = {r.config_hash: r for r in ledger.finished if r.role == "search"}
        running = [r for r in ledger.running if r.role == "search"]
        if not self.remaining(ledger):
            return None
        for label in self.space.labels:
            if not self._proposed(ledger, label):
                if label in self.space.searched:
                    return self._draw(ledger, self.space.default(self.space.searched[label]))
                proposal = self._from_sweep(ledger, self.sweeps[label], finished, running)
                if proposal is not None:
                    return proposal
        for label, values in self.hints.items():
            if not self._hinted(ledger, label, values):
                hint = {f"{label}.{key}": value for key, value in values.items()}
                return self._draw(ledger, self.space.default(self.space.searched[label]) | hint)
        for entry, values in self._first_points:
            if not self._known(ledger, entry, dict(entry.fixed) | values):
                return self._draw(ledger, self.space.point(entry, values))
        # In the order of their numbers, as they were first proposed.
        for record in sorted(ledger.interrupted.values(), key=lambda r: r.number):
            if record.role == "search" and record.label in self.space.searched and record.search_values:
                return self._draw(ledger, dict(record.search_values))
        for sweep in self.sweeps.values():
            proposal = self._from_sweep(ledger, sweep, finished, running)
            if proposal is not None:
                return proposal
        if self.space.allocation == "sampler":
            return None if self.exhausted else self._draw(ledger, self._round(ledger))
        return self._allocated(ledger)

    def remaining(self, ledger: Ledger) -> int:
        """Trials of the budget that have not been proposed; a paused trial has been."""
        finished = {r.config_hash for r in ledger.finished if r.role == "search"}
        running = sum(r.role == "search" for r in ledger.running)
        return max(0, self.trials - len(finished) - running)

    def _proposed(self, ledger: Ledger, label: str) -> int:
        return sum(r.label == label and r.role == "search" for r in ledger.records.values())

    def _hinted(self, ledger: Ledger, label: str, values: Mapping[str, Any]) -> bool:
        """Whether the default point with these values was proposed, in this run or an earlier one."""
        entry = self.space.searched[label]
        return self._known(
            ledger, entry, search_spaces.default_point(entry.strategy, entry.fixed, entry.task) | dict(values)
        )

    def _known(self, ledger: Ledger, entry: Entry, hparams: Mapping[str, Any]) -> bool:
        """Whether a configuration of an entry was proposed, in this run or an earlier one."""
        spec = TrialSpec(shared=self.task, strategy=entry.strategy, label=entry.label, hparams=hparams)
        return any(r.config_hash == spec.config_hash and r.role == "search" for r in ledger.records.values())

    def _round(self, ledger: Ledger) -> dict[str, Any]:
        """Optuna's parameter of the next entry in the first rounds; empty = the sampler chooses the entry."""
        counts = {label: self._proposed(ledger, label) for label in self.space.searched}
        fewest = min(counts, key=lambda label: counts[label])
        return {"strategy": fewest} if counts[fewest] <= self._rounds else {}

    def _allocated(self, ledger: Ledger) -> Proposal | None:
        """The next trial where the budget is allocated to the entries; None = all of them are exhausted."""
        while labels := [label for label in self.space.searched if not _is_exhausted(ledger.sampled, label)]:
            proposal = self._draw(ledger, {"strategy": self._next_entry(ledger, labels)})
            if proposal is not None:
                return proposal
        self.exhausted = True
        return None

    def _next_entry(self, ledger: Ledger, labels: Sequence[str]) -> str:
        """The one of the labels that the next trial belongs to."""
        searched = [r for r in ledger.records.values() if r.role == "search" and r.label in self.space.searched]
        searched.sort(key=lambda record: record.number)
        values = {}
        for index, record in enumerate(searched):
            if record.trial_id in ledger.values:
                # Of several objectives the first one, the selecting metric, allocates the budget.
                value = ledger.values[record.trial_id][0]
                values[index] = value if self._maximise else -value
        swept = sum(preset.size for preset in self.space.presets.values())
        started = [record.label for record in searched]
        return next_entry(self.space.allocation, labels, started, values, self.trials - swept)

    def _draw(self, ledger: Ledger, fixed: Mapping[str, Any]) -> Proposal | None:
        """Ask Optuna, the first time with some parameters fixed, until the configuration is new."""
        study = ledger.sampled
        for attempt in range(ATTEMPTS):
            # Interrupted trials do not count, so that a continued study proposes what an uninterrupted one would have.
            number = sum("interrupted" not in t.user_attrs for t in study.get_trials(deepcopy=False))
            sampler = self.space.sampler if attempt < ATTEMPTS // 2 else "random"
            seed = stream_seed(self.seed, "sampler", number)
            study.sampler = make_sampler(sampler, seed)
            parameters = self._enqueued(study, fixed, attempt, sampler, seed)
            if parameters:
                study.enqueue_trial(parameters)
            trial = study.ask()
            spec = self._spec(trial)
            # A reference trial of the same configuration is no duplicate: it ran on another sample.
            same = (r for r in ledger.records.values() if r.config_hash == spec.config_hash and r.role == "search")
            twin = next(same, None)
            if twin is None:
                return trial, spec
            ledger.duplicate(trial, twin)
            ledger.interrupted.pop(identity(spec), None)
        if self.space.allocation == "sampler":
            log.warning("%d proposals in a row were known already: the search ends early.", ATTEMPTS)
            self.exhausted = True
        else:
            log.warning(
                "%d proposals in a row for %s were known already: it gets no more.", ATTEMPTS, fixed["strategy"]
            )
        return None

    def _enqueued(
        self, study: optuna.Study, fixed: Mapping[str, Any], attempt: int, sampler: str, seed: int
    ) -> dict[str, Any]:
        """Parameters that the next trial does not leave to the sampler of all entries."""
        allocated = self.space.allocation != "sampler"
        names_entry_only = set(fixed) == {"strategy"}
        # Once: enqueued again, the same point would be the same duplicate.
        if attempt == 0 and not (allocated and names_entry_only):
            return dict(fixed)
        if allocated:
            label = fixed["strategy"]
            return entry_parameters(study, self.space.searched[label], sampler, seed, self._earlier[label])
        return {}

    def _spec(self, trial: Trial) -> TrialSpec:
        entry, hparams = self.space.suggest(trial)
        return TrialSpec(
            shared=self.task,
            strategy=entry.strategy,
            label=entry.label,
            hparams=hparams,
            seed=search_seed(self.seed),
        )

    def _from_sweep(
        self, ledger: Ledger, sweep: Sweep, finished: Mapping[str, TrialRecord], running: Sequence[TrialRecord]
    ) -> Proposal | None:
        values = {r.config_hash: ledger.values[r.trial_id][0] for r in finished.values() if r.trial_id in ledger.values}
        point = sweep.next(finished, {r.config_hash for r in running}, values)
        if isinstance(point, Later):
            return None
        spec = sweep.spec_of(point, search_seed(self.seed))
        if self.space.sampler in LEARNING:
            return ledger.fixed.ask(), spec
        if self.space.sampler != "paper":
            return ledger.sampled.ask(), spec
        return self._with_grid_parameters(ledger, sweep, point), spec

    def _with_grid_parameters(self, ledger: Ledger, sweep: Sweep, point: Mapping[str, Any]) -> Trial:
        """An Optuna trial with a sweep's values as parameters, for display in optuna-dashboard only."""
        parameters: dict[str, tuple[Any, Sequence[Any]]] = {"strategy": (sweep.entry.label, self.space.labels)}
        for step in sweep.preset.steps:
            for key, grid in step.items():
                if point[key] in grid:
                    parameters[f"{sweep.entry.label}.{key}"] = (point[key], grid)
        ledger.sampled.enqueue_trial({name: value for name, (value, _) in parameters.items()})
        trial = ledger.sampled.ask()
        for name, (_, choices) in parameters.items():
            trial.suggest_categorical(name, choices)
        return trial


def _is_exhausted(study: optuna.Study, label: str) -> bool:
    """Whether the last `ATTEMPTS` proposals for an entry were duplicates.

    Read from Optuna's study, so that a resumed search does not try them again.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if t.params.get("strategy") == label]
    return len(trials) >= ATTEMPTS and all("duplicate_of" in t.user_attrs for t in trials[-ATTEMPTS:])
