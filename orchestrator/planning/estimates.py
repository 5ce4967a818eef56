"""How many images a source has and how much disk a study takes, estimated without reading any image.

How many trials a study runs, known before the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.ingest.assign import Assignment
    from orchestrator.ingest.source import Source
    from orchestrator.search.space import SearchSpace
    from orchestrator.study_file.schema import DataSpec, StudySpec


@dataclass(frozen=True)
class TrialCounts:
    """Trials of a study that goes to its end, if none fails and the search space is not used up before."""

    search: int
    folds: int | None
    """Of leave-one-domain-out; None = the number of domains is known only when the data are read."""
    confirm: int
    references: int | None = 0
    """For FSR; None = the number of OOD domains is known only when the data are read."""

    @property
    def total(self) -> int:
        """All of them, but those of unknown number."""
        return self.search + (self.folds or 0) + self.confirm + (self.references or 0)


def count_trials(spec: StudySpec, space: SearchSpace | None = None) -> TrialCounts:
    """The trials that a study would run.

    Args:
        space: `space_of(spec)`, if it is known.

    Raises:
        ValueError: the budget does not hold the sweeps and the default points.
    """
    known = space or space_of(spec)
    search = spec.search.trials if known.searched else known.given
    # No more configurations can be confirmed than were searched.
    confirm = min(spec.confirm.top_k, search) * spec.confirm.seeds
    return TrialCounts(search, _folds(spec, search), confirm, _references(spec))


def space_of(spec: StudySpec) -> SearchSpace:
    """The space of a study: which entries are swept, which are searched.

    Raises:
        ValueError: the budget does not hold the sweeps and the default points.
    """
    from orchestrator.planning.build import entries_of, model_of
    from orchestrator.search.space import SearchSpace
    from trainables.specs.trial_spec import Task

    task = Task(store="", model=model_of(spec), epochs=spec.search.epochs)
    space = SearchSpace(entries_of(spec), task, spec.search.sampler, spec.search.seed, [True])
    space.check_budget(spec.search.trials)
    return space


def _folds(spec: StudySpec, search: int) -> int | None:
    from orchestrator.planning.build import FOLDED

    if spec.search.objective != "leave_one_domain_out":
        return 0
    return min(FOLDED, search) * len(spec.data.id) if spec.data.id else None


def _references(spec: StudySpec) -> int | None:
    """One sample per reference and nested share beside the study's own; see `orchestrator.planning.fsr`."""
    from orchestrator.study_file.rules import DIGITS_DOMAINS

    wanted = spec.diagnostics
    if not wanted.fsr:
        return 0
    samples = 1 + ("full" in wanted.fsr)
    if "extrapolated" in wanted.fsr:
        samples += len(set(wanted.fsr_fractions))
    if "oracle" in wanted.fsr:
        domains = spec.data.ood or (DIGITS_DOMAINS if spec.data.source == "digits" else ())
        if not domains:
            return None
        samples += len(domains)
    return samples * wanted.fsr_seeds


OVERHEAD = 1.05
"""Labels, domains, indices and the manifest beside the pixels."""
TRIAL_BYTES = 200_000
"""Journal lines, Optuna rows and MLflow rows of one trial, without its checkpoints."""


def examine(data: DataSpec) -> tuple[Source, Assignment]:
    """What a source offers to a study, and what the study makes of it, by names and headers alone: no image is decoded.

    Raises:
        DataError: the source is missing or has no images, a domain is missing or empty, a class is never ID or has too
            few images.
    """
    from orchestrator.ingest.pipeline import IngestRequest, survey

    return survey(
        IngestRequest(
            source=data.source,
            root=data.root,
            id=tuple(data.id),
            ood=tuple(data.ood),
            val_fraction=data.val_fraction,
            test_fraction=data.test_fraction,
            seed=data.seed,
            label=data.label,
        )
    )


def store_bytes(spec: StudySpec, images: int, trials: int) -> int:
    """Estimated bytes of the data store (uint8 pixels at the stored side) and of the records of so many trials."""
    from orchestrator.planning.build import ingest_request

    side = ingest_request(spec).image_size
    return int(images * side * side * 3 * OVERHEAD) + trials * TRIAL_BYTES
