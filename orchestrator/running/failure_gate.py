"""Stops a study whose trials mostly fail for one reason: what is wrong is not with them; the rest would fail, too."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.tune import Stopper

from orchestrator.record.records import INTERRUPTED

ADVICE = {
    "nan": "Training diverges: hold the learning rates at lower values (fixed), or look at the images.",
    "oom": "GPU memory does not suffice: lower search.batch_size or data.image_size, or give a trial more of a GPU "
    "(resources.gpus).",
    "host_oom": "The machines' memory does not suffice: run fewer trials at a time (resources.concurrent), or on "
    "larger machines.",
    "stalled": "Look at what the machines wait for (file systems, GPUs), or allow more time: failures.stall_factor, "
    "failures.stall_floor.",
    "data": "Look at the data: luthier data check.",
    "infra": "Look at the machines and their logs.",
    "user": "Look at the values held in the study file (fixed) and, where it is your own, at the strategy's code.",
}
"""What a person can do about each reason."""
SHOWN = 5
"""Trials that are named."""


class FailureGateError(ValueError):
    """A study was stopped because its trials kept failing."""


class FailureGate(Stopper):  # type: ignore[misc]  # ray is untyped
    """Counts how the trials of this run end; once too many have failed for one reason, Tune stops the experiment.

    Every trial that has been started counts as a good one until it fails, so that trials which fail fast do not look
    like all there are. What failed in earlier runs of the study does not count: its cause may be gone.

    Args:
        after: failures of one reason; None = never stop.
        share: of all trials started that they must be, at least.
    """

    def __init__(self, after: int | None, share: float) -> None:
        self._after, self._share = after, share
        self._started: set[str] = set()
        self._names: dict[str, str] = {}
        self._failed: dict[str, tuple[str, str]] = {}
        self.reason: str | None = None
        """The reason that stopped the study, if it was stopped."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Take note of one event of the journal."""
        kind, trial_id = event["kind"], str(event.get("trial_id"))
        if kind == "trial_suggested":
            self._names[trial_id] = f"{event['number']} {event.get('label') or event['strategy']}"
        elif kind == "trial_started":
            self._started.add(trial_id)
        elif kind == "trial_failed" and event.get("reason") != INTERRUPTED and trial_id in self._started:
            self._failed[trial_id] = str(event.get("reason")), str(event.get("error") or "")
            self._judge()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped by this."""
        return False

    def stop_all(self) -> bool:
        """Whether the study stops now."""
        return self.reason is not None

    def check(self) -> None:
        """Say so, if the study was stopped.

        Raises:
            FailureGateError: it was.
        """
        if self.reason is not None:
            raise FailureGateError(self.message())

    def message(self) -> str:
        """What happened, the commonest error, and what to do."""
        errors = {trial_id: error for trial_id, (reason, error) in self._failed.items() if reason == self.reason}
        common, count = Counter(map(_shape, errors.values())).most_common(1)[0]
        alike = [trial_id for trial_id, error in errors.items() if _shape(error) == common]
        names = ", ".join(self._names.get(trial_id, trial_id) for trial_id in alike[:SHOWN])
        more = f" and {count - SHOWN} more" if count > SHOWN else ""
        return (
            f"the study was stopped, because {len(errors)} of the {len(self._started)} trials that were started failed "
            f"for one reason: {self.reason}. The commonest error ({count}×: {names}{more}) is: "
            f"{errors[alike[0]].rstrip('.')}. {ADVICE.get(str(self.reason), '')} What has finished is kept, and the "
            "same command goes on with the rest; failures.stop_after: null lets a study go on whatever fails."
        )

    def _judge(self) -> None:
        reason, count = Counter(reason for reason, _ in self._failed.values()).most_common(1)[0]
        if self._after is not None and count >= self._after and count >= self._share * len(self._started):
            self.reason = self.reason or reason


def _shape(error: str) -> str:
    """An error without the numbers in it: the same mistake in two trials."""
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", error)
