"""Following a Ray job from another machine.

Its output as it is written, then its exit code.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, TextIO

import aiohttp

from orchestrator.cluster.auth import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

INTERRUPTED = 130
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


class Follower:
    """Prints a job's output exactly once, over any number of calls and connections.

    Args:
        client: a connected job client.
        job: submission id.
        out: stream for the job's output.
        patience_s: seconds that a lost connection is retried.
    """

    def __init__(self, client: JobSubmissionClient, job: str, out: TextIO, patience_s: float = 120.0) -> None:
        self.client = client
        self.job = job
        self.out = out
        self.patience_s = patience_s
        self._printed = 0

    def run(self) -> int:
        """Follow the job until it ends; may be called again after a KeyboardInterrupt.

        Returns:
            The exit code of the job's command; 130 when it was stopped, 1 when it never started.

        Raises:
            ClusterError: the connection was lost for `patience_s` (the job keeps running).
        """
        lost_since: float | None = None
        while True:
            try:
                asyncio.run(self._print_output())
                info = self.client.get_job_info(self.job)
                lost_since = None
                if str(info.status.value) in ENDED:
                    return self._exit_code(info)
            except (OSError, RuntimeError, aiohttp.ClientError) as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > self.patience_s:
                    raise ClusterError(
                        f"Lost the connection to the cluster while following {self.job}: {error}. The job keeps "
                        "running; run the same command again to follow it."
                    ) from error
            time.sleep(0.5)

    async def _print_output(self) -> None:
        # Each connection sends the log from its first character.
        skip = self._printed
        async for text in self.client.tail_job_logs(self.job):
            unprinted = text[skip:]
            skip = max(0, skip - len(text))
            self.out.write(unprinted)
            self.out.flush()
            self._printed += len(unprinted)

    def _exit_code(self, info: Any) -> int:
        if info.status.value == "STOPPED":
            return INTERRUPTED
        if info.driver_exit_code is not None:
            return int(info.driver_exit_code)
        if info.status.value == "SUCCEEDED":
            return 0
        print(f"The job did not start: {info.message}", file=self.out)
        return 1
