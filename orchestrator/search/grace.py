"""First rung of the entries that start at an optimum."""

from __future__ import annotations

from collections.abc import Iterable

import search_spaces
from orchestrator.search.stages import Entry
from trainables.engine.registry import strategy_class


def later_graces(entries: Iterable[Entry], grace: int, reduction: float) -> dict[str, float]:
    """Label → first rung, of the entries whose trials start at an optimum of the head.

    That is the study's second rung, `grace · reduction`. At the first one such a trial is measured at its highest rate,
    where it has lost some of what the solved head had and gained nothing yet: the trial that moves least would look
    best. Other entries have the study's `grace`.
    """
    return {entry.label: grace * reduction for entry in entries if _starts_at_optimum(entry)}


def _starts_at_optimum(entry: Entry) -> bool:
    fixed = dict(entry.fixed)
    if entry.preset is not None:
        fixed = {**search_spaces.preset(entry.strategy, entry.preset, entry.task).fixed, **fixed}
    return strategy_class(entry.strategy, entry.task).from_hparams(fixed).starts_at_optimum
