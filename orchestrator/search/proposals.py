"""The search itself: default points first, then sweeps and the sampler's proposals, until the budget is used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import Trial

import search_spaces
from orchestrator.record.records import TrialRecord
from orchestrator.search.ledger import Ledger, identity
from orchestrator.search.paper_sweep import Later, Sweep
from orchestrator.search.sampling import LEARNING, make_sampler
from orchestrator.search.space import SearchSpace
from orchestrator.search.stages import search_seed
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import TrialSpec

log = logging.getLogger(__name__)

ROUNDS = 2
"""Random points that every searched entry gets after its default, before the sampler may choose between entries: a
strategy is not given up for one unlucky draw."""
ATTEMPTS = 16
"""Proposals in a row that may repeat known configurations before the space counts as used up; the second half are
drawn at random."""

Proposal = tuple[Trial, TrialSpec]


class Proposals:
    """Proposes search trials; what comes next follows from the ledger, the seed and the arguments alone.

    Order: the default point of every entry that the sampler searches and the first point of every sweep; hints that are
    new to the study, each with its entry's defaults; what an earlier driver left unfinished; the rest of the sweeps;
    `ROUNDS` rounds over the searched entries; then the sampler chooses entry and values. A sweep that waits for its own
    trials holds nobody else up.

    Args:
        space: what may be proposed.
        trials: search trials in all.
        hints: see `orchestrator.search.searcher.StudySearcher`.

    Raises:
        SearchError: the budget does not hold the default points and sweeps.
    """

    def __init__(self, space: SearchSpace, trials: int, hints: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        space.check_budget(trials)
        self.space, self.trials = space, trials
        searched = space.searched
        self.exhausted = not searched
        self.hints = {label: values for label, values in (hints or {}).items() if label in searched}
        spare = trials - space.given
        self._rounds = min(ROUNDS, spare // (2 * len(searched))) if searched and space.sampler != "random" else 0

    def next(self, ledger: Ledger) -> Proposal | None:
        """The next search trial; None = wait for running trials, or, where none runs, the search is over."""
        finished = {r.config_hash: r for r in ledger.finished if r.role == "search"}
        running = [r for r in ledger.running if r.role == "search"]
        if len(finished) + len(running) >= self.trials:
            return None
        for label in self.space.labels:
            if not self._proposed(ledger, label):
                if label in self.space.searched:
                    return self._draw(ledger, self.space.default(self.space.searched[label]))
                found = self._from_sweep(ledger, self.space.sweeps[label], finished, running)
                if found is not None:
                    return found
        for label, values in self.hints.items():
            if not self._hinted(ledger, label, values):
                hint = {f"{label}.{key}": value for key, value in values.items()}
                return self._draw(ledger, self.space.default(self.space.searched[label]) | hint)
        for record in sorted(ledger.interrupted.values(), key=lambda r: r.number):
            if record.role == "search" and record.label in self.space.searched and record.search_values:
                return self._draw(ledger, dict(record.search_values))
        for sweep in self.space.sweeps.values():
            found = self._from_sweep(ledger, sweep, finished, running)
            if found is not None:
                return found
        return None if self.exhausted else self._draw(ledger, self._round(ledger))

    def _proposed(self, ledger: Ledger, label: str) -> int:
        return sum(r.label == label and r.role == "search" for r in ledger.records.values())

    def _hinted(self, ledger: Ledger, label: str, values: Mapping[str, Any]) -> bool:
        """Whether the default point with these values has been proposed, in this run or in an earlier one."""
        entry = self.space.searched[label]
        point = search_spaces.default_point(entry.strategy, entry.fixed) | dict(values)
        wanted = TrialSpec(task=self.space.task, strategy=entry.strategy, label=label, hparams=point).config_hash
        return any(r.config_hash == wanted and r.role == "search" for r in ledger.records.values())

    def _round(self, ledger: Ledger) -> dict[str, Any]:
        """The entry whose turn it is in the first rounds; empty = the sampler may choose."""
        counts = {label: self._proposed(ledger, label) for label in self.space.searched}
        fewest = min(counts, key=lambda label: counts[label])
        return {"strategy": fewest} if counts[fewest] <= self._rounds else {}

    def _draw(self, ledger: Ledger, given: Mapping[str, Any]) -> Proposal | None:
        """Ask Optuna, with some parameters given, until the configuration is a new one."""
        for attempt in range(ATTEMPTS):
            study = ledger.drawn
            # Interrupted trials do not count, so that a continued study draws what an uninterrupted one would have.
            number = sum("interrupted" not in t.user_attrs for t in study.get_trials(deepcopy=False))
            sampler = self.space.sampler if attempt < ATTEMPTS // 2 else "random"
            study.sampler = make_sampler(sampler, stream_seed(self.space.seed, "sampler", number), self.trials)
            if given:
                study.enqueue_trial(dict(given))
            trial = study.ask()
            spec = self.space.configuration(trial)
            same = (r for r in ledger.records.values() if r.config_hash == spec.config_hash)
            twin = next((r for r in same if r.role == "search"), None)  # a reference trial may have been there before
            if twin is None:
                return trial, spec
            ledger.duplicate(trial, twin)
            ledger.interrupted.pop(identity(spec), None)
            given = {}
        log.warning("%d proposals in a row were known already: the search ends early.", ATTEMPTS)
        self.exhausted = True
        return None

    def _from_sweep(
        self, ledger: Ledger, sweep: Sweep, finished: Mapping[str, TrialRecord], running: Sequence[TrialRecord]
    ) -> Proposal | None:
        values = {r.config_hash: ledger.values[r.trial_id][0] for r in finished.values() if r.trial_id in ledger.values}
        point = sweep.next(finished, {r.config_hash for r in running}, values)
        if isinstance(point, Later):
            return None
        spec = sweep.spec_of(point, search_seed(self.space.seed))
        if self.space.sampler in LEARNING:
            return ledger.given.ask(), spec
        if self.space.sampler != "paper":
            return ledger.drawn.ask(), spec
        # Only for people who open the study in optuna-dashboard: the sweep's values as parameters.
        grids = {f"{sweep.entry.label}.{key}": grid for step in sweep.preset.steps for key, grid in step.items()}
        shown: dict[str, tuple[Any, Sequence[Any]]] = {"strategy": (sweep.entry.label, self.space.labels)}
        for name, grid in grids.items():
            value = point[name.rpartition(".")[2]]
            if value in grid:
                shown[name] = (value, grid)
        ledger.drawn.enqueue_trial({name: value for name, (value, _) in shown.items()})
        trial = ledger.drawn.ask()
        for name, (_, choices) in shown.items():
            trial.suggest_categorical(name, choices)
        return trial, spec
