"""The papers' own sweeps as a sequential searcher: a grid, then the next grid at the best point of the first."""

from __future__ import annotations

import enum
import logging
from collections.abc import Collection, Mapping
from typing import Any

import search_spaces
from orchestrator.record.records import TrialRecord
from orchestrator.search.stages import Entry
from search_spaces import Preset
from trainables.specs.trial_spec import Task, TrialSpec

log = logging.getLogger(__name__)


class Later(enum.Enum):
    """What a sweep answers when it has no point to give."""

    WAIT = "the next step needs trials that still run"
    DONE = "all points were given"


class Sweep:
    """One entry's published sweep; asks for its points one by one.

    It keeps no state of its own: which point is next follows from the trials that are finished or running, so a
    restarted driver goes on where the last one was.

    Args:
        entry: what is swept; its `fixed` is added to the preset's.
        preset: the sweep.
        task: what the study's trials share.
        maximise: whether a higher value of the study's metric is better.

    Raises:
        ValueError: the entry fixes what the preset sweeps.
    """

    def __init__(self, entry: Entry, preset: Preset, task: Task, maximise: bool = True) -> None:
        clash = sorted(preset.swept & set(entry.fixed))
        if clash:
            raise ValueError(
                f"A preset decides the values that it sweeps, but {entry.label} fixes {', '.join(clash)} too. "
                "Take it out of `fixed`, or drop the preset."
            )
        self.entry = entry
        self.preset = preset
        self.task = task
        self.maximise = maximise
        self.ended_early = False
        """True once a step ended without a complete trial, so that the steps after it have no point to start from."""

    def next(
        self, finished: Mapping[str, TrialRecord], running: Collection[str], values: Mapping[str, float]
    ) -> dict[str, Any] | Later:
        """The next configuration to run.

        Args:
            finished: search trials by `config_hash`, of any entry.
            running: `config_hash` of the trials that run now.
            values: the study's metric by `config_hash`, of complete trials.
        """
        base = {**self.preset.fixed, **self.entry.fixed}
        steps = range(len(self.preset.steps))
        if not steps:
            key = self.hash_of(base)
            return Later.DONE if key in finished or key in running else base
        for step in steps:
            points = [{**base, **point} for point in self.preset.points(step)]
            hashes = [self.hash_of(point) for point in points]
            for point, key in zip(points, hashes, strict=True):
                if key not in finished and key not in running:
                    return point
            if step == steps[-1]:
                break
            if any(key in running for key in hashes):
                return Later.WAIT
            known = [(values[key], -index) for index, key in enumerate(hashes) if key in values]
            if not known:
                self._end_early(step, len(points))
                break
            best = max(known, key=lambda pair: (pair[0] if self.maximise else -pair[0], pair[1]))
            base = points[-best[1]]
        return Later.DONE

    def hash_of(self, hparams: Mapping[str, Any]) -> str:
        """`config_hash` of one configuration of this entry."""
        return self.spec_of(hparams).config_hash

    def spec_of(self, hparams: Mapping[str, Any], seed: int = 0) -> TrialSpec:
        """One configuration of this entry as a trial."""
        return TrialSpec(
            task=self.task, strategy=self.entry.strategy, label=self.entry.label, hparams=hparams, seed=seed
        )

    def _end_early(self, step: int, points: int) -> None:
        if not self.ended_early:
            log.warning(
                "The sweep of %s ends after step %d of %d: none of its %d trials completed.",
                self.entry.label, step + 1, len(self.preset.steps), points,
            )  # fmt: skip
        self.ended_early = True


def sweep_of(entry: Entry, sampler: str, task: Task, maximise: bool = True) -> Sweep | None:
    """The sweep that an entry runs under a sampler, or None where the sampler draws its configurations.

    An entry with a preset runs it under every sampler. With the sampler `paper` every entry has one: its preset
    `paper`, or its default point where the strategy has no such preset. An entry that leaves nothing to search is a
    sweep of one point.

    Raises:
        ValueError: unknown strategy or preset, or the entry fixes what the preset sweeps.
    """
    if entry.preset is not None:
        return Sweep(entry, search_spaces.preset(entry.strategy, entry.preset), task, maximise)
    known = search_spaces.presets(entry.strategy)
    if sampler == "paper" and "paper" in known:
        return Sweep(entry, known["paper"], task, maximise)
    if sampler == "paper" or not search_spaces.searched(entry.strategy, entry.fixed):
        return Sweep(entry, Preset(fixed=search_spaces.default_point(entry.strategy, entry.fixed)), task, maximise)
    return None
