"""Published sweeps as a sequential search: a grid, then the next grid at the best point of the first."""

from __future__ import annotations

import enum
import logging
from collections.abc import Collection, Mapping
from typing import Any

import search_spaces
from orchestrator.record.records import TrialRecord
from orchestrator.search.stages import Entry
from search_spaces import Preset
from trainables.specs.trial_spec import SharedTrialSettings, TrialSpec

log = logging.getLogger(__name__)


class Later(enum.Enum):
    """Why a sweep has no point to propose now."""

    WAIT = "the next step needs trials that still run"
    DONE = "all points were proposed"


class Sweep:
    """One entry's published sweep, proposed point by point.

    Stateless: the next point follows from the finished and running trials, so that a restarted driver continues where
    the last one stopped.

    Args:
        entry: what is swept; its `fixed` is added to the preset's.
        preset: the sweep.
        task: settings that the study's trials share.
        maximise: whether a higher objective is better.
    """

    def __init__(self, entry: Entry, preset: Preset, task: SharedTrialSettings, maximise: bool = True) -> None:
        self.entry = entry
        self.preset = preset
        self.task = task
        self.maximise = maximise
        self.ended_early = False
        """True once a step ended without a complete trial, so that the steps after it have no starting point."""

    def next(
        self, finished: Mapping[str, TrialRecord], running: Collection[str], values: Mapping[str, float]
    ) -> dict[str, Any] | Later:
        """The next configuration to run.

        Args:
            finished: search trials by `config_hash`, of any entry.
            running: `config_hash` of the running trials.
            values: the objective by `config_hash`, of complete trials.
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
            # The next grid starts at this one's best point, which a running trial may still become.
            if any(key in running for key in hashes):
                return Later.WAIT
            complete = [index for index, key in enumerate(hashes) if key in values]
            if not complete:
                self._end_early(step, len(points))
                break
            scores = {index: values[hashes[index]] if self.maximise else -values[hashes[index]] for index in complete}
            base = points[max(complete, key=lambda index: scores[index])]  # of equals the first
        return Later.DONE

    def hash_of(self, hparams: Mapping[str, Any]) -> str:
        """`config_hash` of one configuration of this entry."""
        return self.spec_of(hparams).config_hash

    def spec_of(self, hparams: Mapping[str, Any], seed: int = 0) -> TrialSpec:
        """One configuration of this entry as a trial."""
        return TrialSpec(
            shared=self.task, strategy=self.entry.strategy, label=self.entry.label, hparams=hparams, seed=seed
        )

    def _end_early(self, step: int, points: int) -> None:
        if not self.ended_early:
            log.warning(
                "The sweep of %s ends after step %d of %d: none of its %d trials completed.",
                self.entry.label, step + 1, len(self.preset.steps), points,
            )  # fmt: skip
        self.ended_early = True


def preset_of(entry: Entry, sampler: str) -> Preset | None:
    """The preset that an entry follows under a sampler, or None where the sampler searches it.

    An entry with a preset follows it under every sampler. Under the sampler `paper` every entry has one: its preset
    `paper`, or its default point where the strategy has no such preset. An entry without searched hyperparameters is a
    sweep of one point.

    Raises:
        ValueError: unknown strategy or preset, or the entry fixes what the preset sweeps.
    """
    presets = search_spaces.presets(entry.strategy, entry.task)
    if entry.preset is not None:
        preset = search_spaces.preset(entry.strategy, entry.preset, entry.task)
    elif sampler == "paper" and "paper" in presets:
        preset = presets["paper"]
    elif sampler == "paper" or not search_spaces.searched(entry.strategy, entry.fixed, entry.task):
        preset = Preset(fixed=search_spaces.default_point(entry.strategy, entry.fixed, entry.task))
    else:
        return None
    clash = sorted(preset.swept & set(entry.fixed))
    if clash:
        raise ValueError(
            f"A preset decides the values that it sweeps, but {entry.label} fixes {', '.join(clash)} too. "
            "Take it out of `fixed`, or drop the preset."
        )
    return preset
