"""A plain Ray cluster of this process for tests that do not go through `orchestrator.cluster.connection.connect`."""

from __future__ import annotations

import contextlib
import secrets
import signal
from collections.abc import Iterator

import pytest
import ray

from orchestrator.cluster.auth import refresh_ray_auth


@contextlib.contextmanager
def plain_cluster(cpus: int) -> Iterator[None]:
    """Start a cluster and stop it at the end of the block. It has a token of its own: left alone, Ray would take one
    from the home folder of the moment and leave its choice in this process for the modules that follow. Tune leaves a
    handler that swallows the next Ctrl-C; it is taken away."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        refresh_ray_auth()
        try:
            ray.init(
                address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                object_store_memory=100_000_000,
            )  # fmt: skip
            yield
        finally:
            ray.shutdown()
            signal.signal(signal.SIGINT, on_interrupt)
    refresh_ray_auth()
