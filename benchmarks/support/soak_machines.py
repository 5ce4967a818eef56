"""Infrastructure of a soak: a local Ray cluster and an MLflow server.

The cluster has a head and two nodes of one CPU each. Each part can be killed and restarted; all of it ends with its
block.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.cluster.driver_process import environment, free_port

ROOT = Path(__file__).resolve().parents[2]


class Machines:
    """The cluster. `settings` is the environment that drivers need to join it."""

    def __init__(self, cluster: Any, token: str) -> None:
        self._cluster = cluster
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        self.settings = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}

    def kill_node(self, which: int) -> None:
        """Send SIGKILL to all processes of one node."""
        self._cluster.remove_node(self.nodes[which], allow_graceful=False)

    def add_node(self, which: int) -> None:
        """Start a new node in its place."""
        self.nodes[which] = self._cluster.add_node(num_cpus=1)


@contextlib.contextmanager
def machines(settings: Mapping[str, str]) -> Iterator[Machines]:
    """Run a cluster for the length of a block; `settings` is added to its environment."""
    from orchestrator.cluster.auth import refresh_ray_auth

    token = secrets.token_hex(32)
    cluster_environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": None,
    }
    folder = tempfile.mkdtemp(prefix="soak-", dir="/tmp")  # unix sockets lie in it: the path must be short
    with environment({**cluster_environment, **settings}, override=True):
        from ray._private.utils import get_ray_address_file, read_ray_address
        from ray.cluster_utils import Cluster

        refresh_ray_auth()
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        address = cluster.address
        try:
            yield Machines(cluster, token)
        finally:
            for node in reversed(cluster.list_all_nodes()):
                cluster.remove_node(node, allow_graceful=False)  # draining would take 30 s
            if read_ray_address() == address:
                Path(get_ray_address_file(None)).unlink()  # a stale address: `ray.init()` would try to join it
            refresh_ray_auth()
            shutil.rmtree(folder, ignore_errors=True)


class Tracker:
    """An MLflow server on a SQLite file, in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = folder / "mlflow.db"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start or restart on the same file; returns at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", str(self.folder / "files"),
        ]  # fmt: skip
        settings = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=settings, start_new_session=True)

    def answers(self) -> bool:
        """Whether the server responds within a second."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
            return True
        return False

    def wait(self, seconds: float = 120.0) -> None:
        """Wait until the server responds.

        Raises:
            RuntimeError: it does not in time.
        """
        pause = threading.Event()
        for _ in range(int(seconds / 0.2)):
            if self.answers():
                return
            pause.wait(0.2)
        raise RuntimeError(f"The MLflow server did not start:\n{(self.folder / 'server.log').read_text()[-2000:]}")

    def send(self, number: int) -> None:
        """Send a signal to the server and its workers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Send SIGKILL; safe to repeat."""
        self.send(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()


@contextlib.contextmanager
def tracker(folder: Path) -> Iterator[Tracker]:
    """Run an MLflow server for the length of a block."""
    server = Tracker(folder)
    try:
        server.start()
        server.wait()
        yield server
    finally:
        server.kill()
