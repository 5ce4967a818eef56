"""The first λ of a search from an earlier FSR: λ ≈ 1/FSR (papers/000).

The reference trials in a study's own journal are the record of its FSR, so that nothing is written beside it: a search
reads them again whenever it starts, from this study or from the one that `diagnostics.fsr_from` names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import search_spaces
from orchestrator.errors import PreflightError, Problem
from orchestrator.planning.fsr_stage import STRATEGY
from orchestrator.record.folding import fold, study_header
from orchestrator.record.journal import Journal
from orchestrator.results.fsr import estimates, suggested

if TYPE_CHECKING:
    from orchestrator.study_file.schema import StudySpec

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
    low, high = getattr(lam_range, "low", found.lam), getattr(lam_range, "high", found.lam)
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
