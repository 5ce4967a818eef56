"""FSR's reference trials, and the first λ of a search.

λ comes from an earlier FSR, λ ≈ 1/FSR (Tan et al., 2025). Reference trials repeat one LayerNorm tuning on other samples
of training images, after the search. They are recorded in the study's own journal only: a search reads them whenever it
starts, from this study or from the one that `diagnostics.fsr_from` names.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import search_spaces
from orchestrator.errors import PreflightError, Problem
from orchestrator.record.journal import Journal
from orchestrator.record.records import TrialRecord, fold, study_header
from orchestrator.results.fsr import EXTRAPOLATED, FULL, ORACLE, OWN, drawn_sample, estimates, suggested
from orchestrator.results.selection import per_label
from orchestrator.search.stages import Entry, trial
from trainables.specs.metrics import CLASSIFICATION, TaskMetrics, ood_domain
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import SharedTrialSettings, TrialSpec

if TYPE_CHECKING:
    from orchestrator.study_file.schema import StudySpec
    from trainables.data.store import Store


log = logging.getLogger("luthier")

STRATEGY = "layernorm"
PLAIN = {"lam_choice": "fixed", "lam": 1.0}
"""Neutral λ: FSR compares the shift before it is rescaled."""
DROPPED = ("lam_scope", "wise")
"""Hyperparameters of the best configuration that reference trials leave at their defaults."""


@dataclass(frozen=True)
class ReferenceStage:
    """Stage of the reference trials: `seeds` trials per sample, each on a draw of its own.

    Samples are the study's own, nested shares of it, the whole pool and each OOD domain. The first seed has the study's
    own images; each further one draws as many images of each class from the pool anew, nested in the same way, so that
    trials of several seeds vary by the training subsample, too. All run the study's best
    LayerNorm configuration with λ = 1 and the same number of optimiser steps, whatever the sample's size. Where none
    was searched, it is the default point of the study's first LayerNorm entry or, without such an entry, of the
    strategy.
    """

    task: SharedTrialSettings
    store: Store
    rule: str
    references: tuple[str, ...]
    """Any of `full`, `extrapolated`, `oracle`."""
    fractions: tuple[float, ...]
    seeds: int
    seed: int
    """The study's seed."""
    entry: Entry | None = None
    """The study's first LayerNorm entry."""
    name: str = "references"
    metrics: TaskMetrics = CLASSIFICATION
    """Of the study's task."""

    def __post_init__(self) -> None:
        if EXTRAPOLATED in self.references and not self._nested():
            log.warning(
                "FSR cannot be extrapolated: the shares %s of the training images do not make two samples of different "
                "sizes below the whole. List other diagnostics.fsr_fractions, or train on more images.",
                ", ".join(f"{fraction:g}" for fraction in self._shares),
            )

    def next(self, history: Sequence[TrialRecord]) -> list[TrialSpec]:
        """Trials of the stage, seed by seed over all samples.

        In this order the trials of an interrupted stage can be compared.
        """
        label, hparams = self._recipe(history)
        samples = self.samples()
        recipe = (label, STRATEGY, hparams)
        specs = []
        for number in range(self.seeds):
            for sample, task in samples.items():
                # A sample of all images, or of another domain, has no other draw.
                draw = number if task.train_fraction < 1 else 0
                name = drawn_sample(sample, draw)
                spec = trial(task, recipe, reference_seed(self.seed, number), "reference", sample=name)
                specs.append(dataclasses.replace(spec, train_draw=draw))
        return specs

    def samples(self) -> dict[str, SharedTrialSettings]:
        """Sample → settings that its trials share.

        Empty if the study's own has no sample to be compared with.
        """
        share = self.task.train_fraction
        steps = self.task.steps_per_unit or max(1, self._size(share) // self.task.batch_size)
        own = dataclasses.replace(self.task, steps_per_unit=steps, diagnostics=("shift",))
        references: dict[str, SharedTrialSettings] = {}
        if EXTRAPOLATED in self.references:
            for fraction in self._nested():
                references[f"{fraction:g}"] = dataclasses.replace(own, train_fraction=share * fraction)
        if FULL in self.references:
            references[FULL] = dataclasses.replace(own, train_fraction=1.0)
        if "oracle" in self.references:
            for domain in filter(None, map(ood_domain, self.store.splits)):
                references[f"{ORACLE}{domain}"] = dataclasses.replace(own, train_on=domain, train_fraction=1.0)
        return {OWN: own, **references} if references else {}

    @property
    def _shares(self) -> list[float]:
        return sorted(set(self.fractions))

    def _nested(self) -> list[float]:
        """Shares of the own sample with distinct sizes (with few images per class some coincide).

        Empty if fewer than two: a curve through fewer points has no limit.
        """
        whole = self.task.train_fraction
        # Reversed: of shares with equal sizes the smallest stays.
        sizes = {self._size(whole * share): share for share in reversed(self._shares)}
        sizes.pop(self._size(whole), None)
        return sorted(sizes.values()) if len(sizes) >= 2 else []

    def _size(self, share: float) -> int:
        return self.store.fraction("train", share)

    def _recipe(self, history: Sequence[TrialRecord]) -> tuple[str, dict[str, Any]]:
        # By search trials alone: a confirmation that ends later must not change the recipe of trials that ran before.
        best = self._best([r for r in history if r.role in ("search", "fold") and r.strategy == STRATEGY])
        label, hparams = self._default() if best is None else (best.label, dict(best.hparams))
        return label, {key: value for key, value in hparams.items() if key not in DROPPED} | PLAIN

    def _best(self, records: Sequence[TrialRecord]) -> TrialRecord | None:
        if not any(r.role == "search" and r.state == "complete" for r in records):
            return None
        try:
            choices = per_label(records, self.rule, self.metrics)
        except ValueError:  # the rule is not applicable yet: missing folds, while the search is still running
            choices = per_label(records, "id_val", self.metrics)
        return next(iter(choices.values())).record

    def _default(self) -> tuple[str, dict[str, Any]]:
        if self.entry is None:
            return STRATEGY, search_spaces.default_point(STRATEGY, task=self.task.task)
        swept: Mapping[str, Any] = {}
        if self.entry.preset is not None:
            swept = search_spaces.preset(STRATEGY, self.entry.preset, self.task.task).fixed
        point = search_spaces.default_point(STRATEGY, {**swept, **self.entry.fixed}, self.task.task)
        return self.entry.label, point


def reference_seed(seed: int, number: int) -> int:
    """Seed of the reference trials with this number (0, 1 …).

    Shared by all samples so that trials pair up.
    """
    return stream_seed(seed, "reference", number)


log = logging.getLogger("luthier")

KEY = ("diagnostics", "fsr_from")


@dataclass(frozen=True)
class Hints:
    """Values that a search tries early, and their source; both are journalled."""

    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Label of an entry → hyperparameter → value; the others are at their defaults."""
    source: str = ""

    def fields(self) -> dict[str, Any]:
        """Fields of the event `study_started`; empty without hints."""
        return {"hints": dict(self.values), "hints_from": self.source} if self.values else {}


def lambda_hints(spec: StudySpec, folder: Path, digest: str | None = None) -> Hints:
    """`lam` for every LayerNorm entry whose λ is searched, clipped to the searched range.

    It is taken from the reference trials of the study that `diagnostics.fsr_from` names, else of this study itself.
    Empty where these suggest no λ.

    Args:
        folder: of the study that is about to run.
        digest: of its data, for comparison with those of the other study; None = not known yet.

    Raises:
        PreflightError: see `hint_problems`.
    """
    problems = list(hint_problems(spec, digest))
    if problems:
        raise PreflightError(problems, f"The study {spec.name!r}")
    searched = [
        entry.label
        for entry in spec.strategies
        if entry.name == STRATEGY
        and entry.preset is None
        and spec.search.sampler != "paper"
        and "lam" in search_spaces.searched(STRATEGY, entry.fixed, spec.task)
    ]
    source = folder if spec.diagnostics.fsr_from is None else _named(spec)
    journal = source / "journal.jsonl"
    if not searched or not journal.exists():
        return Hints()
    estimate = suggested(estimates(fold(Journal.read(journal))))
    if estimate is None:
        return Hints()
    lam_range = search_spaces.space(STRATEGY, spec.task)["lam"].distribution
    low = getattr(lam_range, "low", estimate.lam)
    high = getattr(lam_range, "high", estimate.lam)
    # Optuna accepts no value outside of the searched range.
    lam = round(min(max(estimate.lam, low), high), 3)
    reason = f"{source.name}: {estimate.sentence()}"
    log.info("λ = %.3g is tried early with %s, because of %s", lam, ", ".join(searched), reason)
    return Hints({label: {"lam": lam} for label in searched}, reason)


def hint_problems(spec: StudySpec, digest: str | None = None) -> Iterator[Problem]:
    """Reasons why the FSR of another study does not apply to this one.

    Args:
        digest: of this study's data; None = not known yet.
    """
    name = spec.diagnostics.fsr_from
    if name is None:
        return
    journal = _named(spec) / "journal.jsonl"
    if not journal.exists():
        rule = f"fsr_from is the name of a study in the same storage that has been run, but {name!r} has no journal at"
        yield Problem(KEY, f"{rule} {journal}. Run `luthier fsr` on it, or leave the key out.")
        return
    header = study_header(Journal.read(journal))
    other = header.get("spec") or {}
    compared = [
        ("network", header.get("backbone"), spec.model.name),
        ("train_fraction", (other.get("data") or {}).get("train_fraction"), spec.data.train_fraction),
    ]
    if digest is not None:
        compared.append(("data digest", header.get("dataset_digest"), digest))
    for what, there, here in compared:
        if there != here:
            rule = f"FSR belongs to one network and one training sample, but {name!r} has the {what} {there}"
            yield Problem(KEY, f"{rule}, and this study {here}. Name another study, or leave the key out.")


def _named(spec: StudySpec) -> Path:
    return Path(spec.storage).absolute() / str(spec.diagnostics.fsr_from)
