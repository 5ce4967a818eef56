"""Cost of measuring confirmed configurations under corruptions, before anything is spent."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.planning.build import corruptions_of
from orchestrator.wording import counted
from trainables.specs.corruptions import SEVERITIES
from trainables.specs.metrics import IMAGES_PER_SECOND, TEST

if TYPE_CHECKING:
    from orchestrator.record.records import TrialRecord
    from orchestrator.study_file.schema import StudySpec


@dataclass(frozen=True)
class PlannedCorruptions:
    """Corruptions that confirmed trials are measured under."""

    names: tuple[str, ...]
    folder: str | None
    """Of corrupted pictures; None = the ID test pictures are corrupted."""
    images: int
    """Pictures per corruption and severity, at most."""
    trials: int
    """Confirmed trials."""
    passes: float
    """Evaluated pictures of one trial, as a multiple of the ID test."""
    seconds: float | None
    """Of one trial, at most; None = no trial has been timed yet."""

    @property
    def evaluations(self) -> int:
        """Pictures that one trial's network sees."""
        return len(self.names) * len(SEVERITIES) * self.images

    def sentence(self) -> str:
        """What is measured, and how long it takes."""
        which = f"{len(self.names)} corruptions" if len(self.names) > 1 else self.names[0]
        source = "of the ID test" if self.folder is None else f"in {self.folder}"
        time = f" or {self.passes:.3g} times the ID test"
        if self.seconds is not None:
            minutes = self.seconds / 60
            time += f", at most about {minutes:.0f} min" if minutes >= 1.5 else f", at most about {self.seconds:.0f} s"
        return (
            f"Corruptions: {which} at {len(SEVERITIES)} severities on {self.images:,} images {source}: "
            f"{self.evaluations:,} images{time} for each of {counted(self.trials, 'confirmed trial')}, "
            f"{self.trials * self.evaluations:,} in all."
        )


def planned_corruptions(
    spec: StudySpec, splits: Mapping[str, int], trials: int, history: Iterable[TrialRecord] = ()
) -> PlannedCorruptions | None:
    """What a study measures under corruptions; None = nothing.

    Args:
        splits: name → images.
        trials: number of confirmed trials.
        history: trials of earlier runs. Evaluating is no slower than training, whose rate they have on record.
    """
    settings = corruptions_of(spec)
    if settings is None:
        return None
    images = settings.images if settings.folder is not None else min(settings.images, splits[TEST])
    rates = [record.metric(IMAGES_PER_SECOND.name) for record in history]
    measured = [rate for rate in rates if rate]
    evaluations = len(settings.names) * len(SEVERITIES) * images
    return PlannedCorruptions(
        names=settings.names,
        folder=settings.folder,
        images=images,
        trials=trials,
        passes=evaluations / max(1, splits[TEST]),
        seconds=evaluations / statistics.median(measured) if measured else None,
    )
