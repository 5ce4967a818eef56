"""The first λ of a search from an earlier FSR: λ ≈ 1/FSR (papers/000)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import search_spaces
from orchestrator.folding import fold
from orchestrator.fsr import estimates, suggested
from orchestrator.fsr_stage import STRATEGY
from orchestrator.journal import Journal

if TYPE_CHECKING:
    from orchestrator.spec import StudySpec

log = logging.getLogger("luthier")


def lambda_hints(spec: StudySpec, folder: Path) -> dict[str, dict[str, Any]]:
    """Label → `lam` for every LayerNorm entry whose λ is searched, from the reference trials of the study that
    `diagnostics.fsr_from` names, else of this study itself (`luthier fsr`); empty where they say nothing.

    λ is kept inside the range that the search draws from.

    Raises:
        FileNotFoundError: `fsr_from` names a study that has not been run.
    """
    searched = [
        entry
        for entry in spec.strategies
        if entry.name == STRATEGY and entry.preset is None and "lam" in search_spaces.searched(STRATEGY, entry.fixed)
    ]
    if not searched:
        return {}
    found = suggested(estimates(fold(Journal.read(journal)))) if (journal := _journal(spec, folder)) else None
    if found is None:
        return {}
    law = search_spaces.space(STRATEGY)["lam"].distribution
    lam = round(min(max(found.lam, getattr(law, "low", found.lam)), getattr(law, "high", found.lam)), 3)
    log.info("The second trial of %s takes λ = %.3g: %s", ", ".join(e.label for e in searched), lam, found.sentence())
    return {entry.label: {"lam": lam} for entry in searched}


def _journal(spec: StudySpec, folder: Path) -> Path | None:
    name = spec.diagnostics.fsr_from
    own = (folder if name is None else folder.parent / name) / "journal.jsonl"
    if name is not None and not own.exists():
        raise FileNotFoundError(
            f"diagnostics.fsr_from is the name of a study in the same storage that has been run, but {name!r} has no "
            f"journal at {own}. Run `luthier fsr` on it, or leave the key out."
        )
    return own if own.exists() else None
