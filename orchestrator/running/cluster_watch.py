"""Ends a run whose local cluster has died.

Ray would wait: for a minute, or for ever. Without its head process (`gcs_server`) Ray ends the driver by itself after
`RAY_gcs_rpc_server_reconnect_timeout_s`, with a message of its own. Without the raylet it waits for a machine that
cannot come back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ray.tune import Callback

from orchestrator.ray_internals import ended_processes

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

logger = logging.getLogger("luthier")

HEAD = "gcs_server"
VITAL = {HEAD: "head process", "raylet": "raylet"}
"""Processes that a cluster of one machine cannot do without: Ray's name → name in messages."""


class LostClusterError(OSError):
    """The cluster that this process started has died."""


class ClusterWatch(Callback):  # type: ignore[misc]  # ray is untyped
    """Checks a local cluster's processes at every step of Tune's loop.

    A joined cluster is left to its owner.

    Args:
        ended: names and exit codes of the processes of the cluster that have ended.
    """

    def __init__(self, ended: Callable[[], Iterable[tuple[str, int]]] = ended_processes) -> None:
        self._ended = ended

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Check once.

        Raises:
            LostClusterError: a process has ended that the cluster cannot do without; Tune passes it on.
        """
        for name, code in self._ended():
            if name not in VITAL:
                continue
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            text = (
                f"A study on this machine needs its Ray cluster until it ends, but the {VITAL[name]} of Ray "
                f"{how}. Everything that was recorded is kept: run the same command again to continue. If it "
                "happens again, look at the memory of this machine (dmesg) and at Ray's logs."
            )
            if name == HEAD:
                logger.error("%s", text)  # at once: Ray may end this process before the error has left Tune
            raise LostClusterError(text)
