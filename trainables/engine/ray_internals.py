"""Every private name of Ray that a trial uses.

As read in Ray 2.60 (see `orchestrator/ray_internals.py`).
"""

from __future__ import annotations

import ray

ACTOR_NAME_PREFIX = ":actor_name:"
"""A line with this prefix on a worker's standard output sets the name before the lines of its log that follow; it is
`ray._private.ray_constants.LOG_PREFIX_ACTOR_NAME`, which Ray prints once per actor. Gone: lines of a reused actor
have the name of its first trial, and this line stands in the log as text."""


def rename_actor_in_logs(name: str) -> None:
    """Let the driver's log call this process by another name; does nothing outside an actor."""
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        print(f"{ACTOR_NAME_PREFIX}{name}", flush=True)
