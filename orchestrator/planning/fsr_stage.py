"""Reference trials for FSR: the same LayerNorm tuning on other samples of training images, after the search."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.record.records import TrialRecord
from orchestrator.results.fsr import EXTRAPOLATED, FULL, ORACLE, OWN
from orchestrator.search.stages import Entry, trial
from trainables.core.task import Task, TrialSpec, stream_seed

if TYPE_CHECKING:
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
