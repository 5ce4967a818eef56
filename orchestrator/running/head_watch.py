"""Ends a run whose own cluster has died under it, where Ray would wait: for a minute, or for ever.

Without its head process (`gcs_server`) Ray ends the driver by itself, in words of its own, after
`RAY_gcs_rpc_server_reconnect_timeout_s`. Without the raylet it goes on waiting for a machine that cannot come back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ray.tune import Callback

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

logger = logging.getLogger("luthier")

HEAD = "gcs_server"
VITAL = {HEAD: "head process", "raylet": "raylet"}
"""Processes that a cluster of one machine cannot do without, by Ray's names, and in words."""


class LostClusterError(OSError):
    """The cluster that this process started has died."""


class HeadWatch(Callback):  # type: ignore[misc]  # ray is untyped
    """Looks after the processes of a cluster that this process started, each time Tune's loop comes round. A cluster
    that was joined has its own machines and whoever looks after them.

    Args:
        ended: Ray's names of processes of the cluster that have ended, with their exit codes.
    """

    def __init__(self, ended: Callable[[], Iterable[tuple[str, int]]] | None = None) -> None:
        self._ended = ended or ended_processes

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Look.

        Raises:
            LostClusterError: one has ended that the cluster cannot do without; Tune hands it on.
        """
        for name, code in self._ended():
            if name in VITAL:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                text = (
                    f"A study on this machine needs its Ray cluster until it ends, but the {VITAL[name]} of Ray "
                    f"{how}. Everything that was recorded is kept: run the same command again to continue. If it "
                    "happens again, look at the memory of this machine (dmesg) and at Ray's logs."
                )
                if name == HEAD:
                    logger.error("%s", text)  # at once: Ray may well end this process before the error gets out of Tune
                raise LostClusterError(text)


def ended_processes() -> list[tuple[str, int]]:
    """Processes of this process's own cluster that have ended; none where the cluster was joined."""
    import ray

    node = ray._private.worker.global_worker.node
    return [] if node is None else [(name, process.returncode) for name, process in node.dead_processes()]
