"""Estimates of a study's trials, images and disk space, before any image is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.ingest.pipeline import survey
from orchestrator.planning.build import LODO_CANDIDATES, entries_of, solved_in_closed_form
from orchestrator.planning.view import source_request
from orchestrator.search.space import SearchSpace
from orchestrator.study_file.rules import BUILT_IN_DOMAINS

if TYPE_CHECKING:
    from orchestrator.ingest.assign import Assignment
    from orchestrator.ingest.source import Source
    from orchestrator.study_file.schema import StudySpec


@dataclass(frozen=True)
class TrialCounts:
    """Trials of a complete study, if none fails and the search space is not exhausted."""

    search: int
    folds: int | None
    """Of leave-one-domain-out; None = the number of domains is not known before the data are read."""
    confirm: int
    references: int | None = 0
    """For FSR; None = the number of OOD domains is not known before the data are read."""

    @property
    def total(self) -> int:
        """All trials whose number is known."""
        return self.search + (self.folds or 0) + self.confirm + (self.references or 0)


def count_trials(spec: StudySpec, space: SearchSpace | None = None) -> TrialCounts:
    """The trials that a study would run.

    Args:
        space: `space_of(spec)`, if it was made already.

    Raises:
        ValueError: the budget is smaller than the sweeps and the default points.
    """
    space = space or space_of(spec)
    search = spec.search.trials if space.searched else space.prescribed
    return TrialCounts(search, _folds(spec, search), _confirmations(spec, search), _references(spec))


def _confirmations(spec: StudySpec, search: int) -> int:
    """Trials of the confirmation: the best of every entry first, closed-form entries on one seed."""
    count = min(
        spec.confirm.count(len(spec.strategies), bool(spec.search.costs)), search
    )  # no more can be confirmed than were searched
    if not spec.confirm.seeds:
        return 0
    alike = [solved_in_closed_form(entry.name, entry.fixed, spec.search.epochs) for entry in spec.strategies]
    # Which entries are confirmed, where they are not all, and whose the runners-up are, is not known before.
    single = sum(alike) if count >= len(alike) else 0
    return (count - single) * spec.confirm.seeds + single


def space_of(spec: StudySpec) -> SearchSpace:
    """The search space of a study: which entries are swept, which are searched.

    Raises:
        ValueError: the budget is smaller than the sweeps and the default points.
    """
    space = SearchSpace(entries_of(spec), spec.search.sampler, spec.search.allocation)
    space.check_budget(spec.search.trials)
    return space


def _folds(spec: StudySpec, search: int) -> int | None:
    if spec.search.objective != "leave_one_domain_out":
        return 0
    return min(LODO_CANDIDATES, search) * len(spec.data.id) if spec.data.id else None


def _references(spec: StudySpec) -> int | None:
    """One sample per reference and nested share beside the study's own; see `orchestrator.planning.fsr`."""
    diagnostics = spec.diagnostics
    if not diagnostics.fsr:
        return 0
    samples = 1 + ("full" in diagnostics.fsr)
    if "extrapolated" in diagnostics.fsr:
        samples += len(set(diagnostics.fsr_fractions))
    if "oracle" in diagnostics.fsr:
        domains = spec.data.ood or BUILT_IN_DOMAINS.get(spec.data.source, ())
        if not domains:
            return None
        samples += len(domains)
    return samples * diagnostics.fsr_seeds


OVERHEAD = 1.05
"""Factor for labels, domains, indices and the manifest beside the pixels."""
TRIAL_BYTES = 200_000
"""Bytes of one trial in the journal, in Optuna and in MLflow, without its checkpoints."""


def examine(spec: StudySpec) -> tuple[Source, Assignment]:
    """A source and its assignment to splits.

    From file names and headers only: no image is decoded, but masks are read.

    Raises:
        DataError: the source is missing or has no images, a domain is missing or empty, a class is never ID or has too
            few images.
    """
    return survey(source_request(spec))


def store_bytes(pixel_bytes: int, trials: int) -> int:
    """Estimated bytes of the data store, which holds raw pixels, and of the records of all trials."""
    return int(pixel_bytes * OVERHEAD) + trials * TRIAL_BYTES
