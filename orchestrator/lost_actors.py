"""What Ray says of a trial's process ends that trial's attempt and not the study.

Tune (Ray 2.60) takes two kinds of error for a failed attempt: that of a dead actor and that of the trial's own code.
Any other ends the whole experiment with "Caught unexpected exception", and one of them is `OutOfMemoryError`: what
Ray's memory monitor leaves when it kills a process because its machine runs out of memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError


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
    """Hand Tune every other error of Ray's as that of a dead actor, for the length of a block."""
    from ray.air.execution._internal.actor_manager import RayActorManager

    known = RayActorManager._actor_task_failed

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            kind = type(exception)
            exception = LostActorError(f"{kind.__module__}.{kind.__qualname__}: {exception}")
        known(self, tracked_actor_task=tracked_actor_task, exception=exception)

    RayActorManager._actor_task_failed = failed
    try:
        yield
    finally:
        RayActorManager._actor_task_failed = known
