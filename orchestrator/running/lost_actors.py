"""What Ray says of a trial's process ends that trial's attempt and not the study.

Tune (Ray 2.60) takes two kinds of error for a failed attempt: that of a dead actor and that of the trial's own code.
Any other ends the whole experiment with "Caught unexpected exception", and one of them is `OutOfMemoryError`: what
Ray's memory monitor leaves when it kills a process because its machine runs out of memory.

And it takes the death of a process that waited for its next trial for two failures of that trial: it queues the trial
again, then gives it up for good, with all its retries left.

Since 2.56 the memory monitor kills those that began last, several at once, whoever takes the memory. A trial that was
killed for it is no more to blame than its neighbours, so that this costs it no retry, unless it has not done a unit
since it was last killed so: then it may be the one that does not fit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

from orchestrator.running.failures import classify


class LostActorError(RayActorError):  # type: ignore[misc]  # ray is untyped
    """A trial's process was lost for a reason that Tune does not know.

    Args:
        reason: Ray's own error, name and text.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(error_msg=reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return LostActorError, (self.error_msg,)


@contextlib.contextmanager
def lost_actors_are_failed_attempts() -> Iterator[None]:
    """Hand Tune every other error of Ray's as that of a dead actor, and each one once, for the length of a block. One
    of a machine's memory costs no retry, once per unit."""
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.tune.execution.tune_controller import TuneController

    known, known_of_trial = RayActorManager._actor_task_failed, TuneController._process_trial_failure
    last: dict[str, BaseException] = {}
    killed_at: dict[str, int] = {}

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            kind = type(exception)
            exception = LostActorError(f"{kind.__module__}.{kind.__qualname__}: {exception}")
        known(self, tracked_actor_task=tracked_actor_task, exception=exception)

    def trial_failed(self: Any, trial: Any, exception: Exception) -> None:
        if last.get(trial.trial_id) is not exception:
            last[trial.trial_id] = exception
            if isinstance(exception, RayActorError) and classify(str(exception)) == "host_oom":
                unit = int((trial.last_result or {}).get("unit") or 0)
                exception._preempted = unit > killed_at.get(trial.trial_id, -1)  # such a failure Tune does not count
                killed_at[trial.trial_id] = unit
            self._resetting_trials.discard(trial)  # else it would wait for ever for the process that is gone
            known_of_trial(self, trial, exception=exception)

    RayActorManager._actor_task_failed, TuneController._process_trial_failure = failed, trial_failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed, TuneController._process_trial_failure = known, known_of_trial
