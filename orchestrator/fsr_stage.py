"""Reference trials for FSR: the same LayerNorm tuning on other samples of training images, after the search."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.fsr import FULL, ORACLE, OWN
from orchestrator.records import TrialRecord
from orchestrator.stages import trial
from trainables.core.task import Task, TrialSpec, stream_seed

if TYPE_CHECKING:
    from trainables.data.store import Store

STRATEGY = "layernorm"
PLAIN = {"lam_choice": "fixed", "lam": 1.0}
"""λ has no part in the shift that FSR compares."""
DROPPED = ("lam_scope", "wise")


@dataclass(frozen=True)
class ReferenceStage:
    """`seeds` trials per sample: the study's own, nested shares of it, the whole pool, each OOD domain.

    All run the recipe of the study's best LayerNorm configuration (its default point where none was searched) with
    λ = 1 and the same number of optimiser steps, whatever the sample's size.
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
    name: str = "references"

    def next(self, history: Sequence[TrialRecord]) -> list[TrialSpec]:
        """Seed by seed over all samples, so that an interrupted stage can compare what it has."""
        label, hparams = self._recipe(history)
        recipe = (label, STRATEGY, hparams)
        return [
            trial(task, recipe, reference_seed(self.seed, number), "reference", sample=sample)
            for number in range(self.seeds)
            for sample, task in self.samples().items()
        ]

    def samples(self) -> dict[str, Task]:
        """Name of each sample → what its trials share."""
        share = self.task.train_fraction
        used = self.store.fraction("train", share)
        steps = self.task.steps_per_unit or max(1, used // self.task.batch_size)
        own = dataclasses.replace(self.task, steps_per_unit=steps, evaluate_at=(), diagnostics=("shift",))
        found = {OWN: own}
        if "extrapolated" in self.references:
            for fraction in sorted(set(self.fractions)):
                found[f"{fraction:g}"] = dataclasses.replace(own, train_fraction=share * fraction)
        if FULL in self.references:
            found[FULL] = dataclasses.replace(own, train_fraction=1.0)
        if "oracle" in self.references:
            for split in self.store.splits:
                if split.startswith("ood/"):
                    domain = split.removeprefix("ood/")
                    found[f"{ORACLE}{domain}"] = dataclasses.replace(own, train_on=domain, train_fraction=1.0)
        return found

    def _recipe(self, history: Sequence[TrialRecord]) -> tuple[str, dict[str, Any]]:
        import search_spaces
        from orchestrator.selection import per_label

        searched = [r for r in history if r.role != "reference" and r.strategy == STRATEGY]
        chosen: Mapping[str, Any] = search_spaces.default_point(STRATEGY)
        label = STRATEGY
        if any(r.role == "search" and r.state == "complete" for r in searched):
            best = next(iter(per_label(searched, "id_val" if self.rule == "oracle" else self.rule).values()))
            chosen, label = best.record.hparams, best.record.label
        kept = {key: value for key, value in chosen.items() if key not in DROPPED}
        return label, {**kept, **PLAIN}


def reference_seed(seed: int, number: int) -> int:
    """The seed of the reference trials with this number (0, 1 …): one for all samples, so that they pair."""
    return stream_seed(seed, "reference", number)
