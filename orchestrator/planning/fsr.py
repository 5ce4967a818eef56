"""The first λ of a search from an earlier FSR: λ ≈ 1/FSR (papers/000).

The reference trials in a study's own journal are the record of its FSR, so that nothing is written beside it: a search
reads them again whenever it starts, from this study or from the one that `diagnostics.fsr_from` names.

Reference trials for FSR: the same LayerNorm tuning on other samples of training images, after the search.
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
from orchestrator.results.fsr import EXTRAPOLATED, FULL, ORACLE, OWN, estimates, suggested
from orchestrator.search.stages import Entry, trial
from trainables.specs.seeds import stream_seed
from trainables.specs.trial_spec import Task, TrialSpec

if TYPE_CHECKING:
    from orchestrator.study_file.schema import StudySpec
    from trainables.data.store import Store


log = logging.getLogger("luthier")

STRATEGY = "layernorm"
PLAIN = {"lam_choice": "fixed", "lam": 1.0}
"""λ has no part in the shift that FSR compares."""
DROPPED = ("lam_scope", "wise")


@dataclass(frozen=True)
class ReferenceStage:
    """`seeds` trials per sample: the study's own, nested shares of it, the whole pool, each OOD domain.

    All run the recipe of the study's best LayerNorm configuration with λ = 1 and the same number of optimiser steps,
    whatever the sample's size. Where none was searched it is the default point of the study's first LayerNorm entry,
    or, without such an entry, that of the strategy.
    """

    task: Task
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

    def __post_init__(self) -> None:
        if EXTRAPOLATED in self.references and not self._nested():
            log.warning(
                "FSR cannot be extrapolated: the shares %s of the training images do not make two samples of different "
                "sizes below the whole. List other diagnostics.fsr_fractions, or train on more images.",
                ", ".join(f"{fraction:g}" for fraction in self._shares),
            )

    def next(self, history: Sequence[TrialRecord]) -> list[TrialSpec]:
        """Seed by seed over all samples, so that an interrupted stage can compare what it has."""
        label, hparams = self._recipe(history)
        samples, recipe = self.samples(), (label, STRATEGY, hparams)
        return [
            trial(task, recipe, reference_seed(self.seed, number), "reference", sample=sample)
            for number in range(self.seeds)
            for sample, task in samples.items()
        ]

    def samples(self) -> dict[str, Task]:
        """Name of each sample → what its trials share; empty where there is none to compare the study's own with."""
        share = self.task.train_fraction
        steps = self.task.steps_per_unit or max(1, self._size(share) // self.task.batch_size)
        own = dataclasses.replace(self.task, steps_per_unit=steps, evaluate_at=(), diagnostics=("shift",))
        found: dict[str, Task] = {}
        if EXTRAPOLATED in self.references:
            found |= {f"{f:g}": dataclasses.replace(own, train_fraction=share * f) for f in self._nested()}
        if FULL in self.references:
            found[FULL] = dataclasses.replace(own, train_fraction=1.0)
        if "oracle" in self.references:
            for split in self.store.splits:
                if split.startswith("ood/"):
                    domain = split.removeprefix("ood/")
                    found[f"{ORACLE}{domain}"] = dataclasses.replace(own, train_on=domain, train_fraction=1.0)
        return {OWN: own, **found} if found else {}

    @property
    def _shares(self) -> list[float]:
        return sorted(set(self.fractions))

    def _nested(self) -> list[float]:
        """Shares of the own sample that differ in size, which with few images per class they may not; none where fewer
        than two do: a curve through less has no limit."""
        whole = self.task.train_fraction
        sizes = {self._size(whole * share): share for share in reversed(self._shares)}
        sizes.pop(self._size(whole), None)
        return sorted(sizes.values()) if len(sizes) >= 2 else []

    def _size(self, share: float) -> int:
        return self.store.fraction("train", share)

    def _recipe(self, history: Sequence[TrialRecord]) -> tuple[str, dict[str, Any]]:
        best = self._best([r for r in history if r.role != "reference" and r.strategy == STRATEGY])
        label, chosen = (best.label, dict(best.hparams)) if best is not None else self._default()
        return label, {**{key: value for key, value in chosen.items() if key not in DROPPED}, **PLAIN}

    def _best(self, records: Sequence[TrialRecord]) -> TrialRecord | None:
        from orchestrator.results.selection import per_label

        if not any(r.role == "search" and r.state == "complete" for r in records):
            return None
        try:
            return next(iter(per_label(records, self.rule).values())).record
        except ValueError:  # not all that the rule asks for is there, such as the folds of a search that goes on
            return next(iter(per_label(records, "id_val").values())).record

    def _default(self) -> tuple[str, dict[str, Any]]:
        import search_spaces

        if self.entry is None:
            return STRATEGY, search_spaces.default_point(STRATEGY)
        swept = {} if self.entry.preset is None else search_spaces.preset(STRATEGY, self.entry.preset).fixed
        return self.entry.label, search_spaces.default_point(STRATEGY, {**swept, **self.entry.fixed})


def reference_seed(seed: int, number: int) -> int:
    """The seed of the reference trials with this number (0, 1 …): one for all samples, so that they pair."""
    return stream_seed(seed, "reference", number)


log = logging.getLogger("luthier")

KEY = ("diagnostics", "fsr_from")


@dataclass(frozen=True)
class Hints:
    """Values that a search tries early, and where they come from; both go into the journal."""

    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Label of an entry → hyperparameter → value; the others are at their defaults."""
    source: str = ""

    def fields(self) -> dict[str, Any]:
        """Of the event `study_started`; nothing where there are no hints."""
        return {"hints": dict(self.values), "hints_from": self.source} if self.values else {}


def lambda_hints(spec: StudySpec, folder: Path, digest: str | None = None) -> Hints:
    """`lam` for every LayerNorm entry whose λ is searched, from the reference trials of the study that
    `diagnostics.fsr_from` names, else of this study itself; nothing where they say nothing.

    λ is kept inside the range that the search draws from.

    Args:
        folder: of the study that is about to run.
        digest: of its data, to be compared with those of the other study; None = not known yet.

    Raises:
        PreflightError: see `hint_problems`.
    """
    if problems := list(hint_problems(spec, digest)):
        raise PreflightError(problems, f"The study {spec.name!r}")
    searched = [
        entry.label
        for entry in spec.strategies
        if entry.name == STRATEGY
        and entry.preset is None
        and spec.search.sampler != "paper"
        and "lam" in search_spaces.searched(STRATEGY, entry.fixed)
    ]
    source = folder if spec.diagnostics.fsr_from is None else _named(spec)
    journal = source / "journal.jsonl"
    if not searched or not journal.exists():
        return Hints()
    found = suggested(estimates(fold(Journal.read(journal))))
    if found is None:
        return Hints()
    lam_range = search_spaces.space(STRATEGY)["lam"].distribution
    low = getattr(lam_range, "low", found.lam)
    high = getattr(lam_range, "high", found.lam)
    lam = round(min(max(found.lam, low), high), 3)
    said = f"{source.name}: {found.sentence()}"
    log.info("λ = %.3g is tried early with %s, because of %s", lam, ", ".join(searched), said)
    return Hints({label: {"lam": lam} for label in searched}, said)


def hint_problems(spec: StudySpec, digest: str | None = None) -> Iterator[Problem]:
    """What keeps the FSR of another study from telling this one anything.

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
    there, here = other.get("data") or {}, {"network": spec.model.name, "train_fraction": spec.data.train_fraction}
    known = {"network": header.get("backbone"), "train_fraction": there.get("train_fraction")}
    if digest is not None:
        here["data digest"], known["data digest"] = digest, header.get("dataset_digest")
    for what, mine in here.items():
        if known[what] != mine:
            rule = f"FSR belongs to one network and one training sample, but {name!r} has the {what} {known[what]}"
            yield Problem(KEY, f"{rule}, and this study {mine}. Name another study, or leave the key out.")


def _named(spec: StudySpec) -> Path:
    return Path(spec.storage).absolute() / str(spec.diagnostics.fsr_from)
