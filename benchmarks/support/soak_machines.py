"""What a soak runs on: a Ray cluster of a head and two machines with one CPU each, all on this one, and an MLflow
server of its own. Each can be broken and mended; all of it goes when its block ends.
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
        """SIGKILL for everything of one machine."""
        self._cluster.remove_node(self.nodes[which], allow_graceful=False)

    def add_node(self, which: int) -> None:
        """A new machine takes its place."""
        self.nodes[which] = self._cluster.add_node(num_cpus=1)


@contextlib.contextmanager
def machines(settings: Mapping[str, str]) -> Iterator[Machines]:
    """A cluster for the length of a block; `settings` is part of its processes' environment."""
    from orchestrator.cluster.auth import refresh_ray_auth

    token = secrets.token_hex(32)
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": None,
    }
    folder = tempfile.mkdtemp(prefix="soak-", dir="/tmp")  # unix sockets lie in it: the path must be short
    with environment({**own, **settings}, override=True):
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
                cluster.remove_node(node, allow_graceful=False)  # nothing on it is worth its 30 s of draining
            if read_ray_address() == address:
                Path(get_ray_address_file(None)).unlink()  # of a cluster that is gone: `ray.init()` would look for it
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
        """Start, or start again on the same file; returns at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.database}", "--artifacts-destination", str(self.folder / "files"),
        ]  # fmt: skip
        settings = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=settings, start_new_session=True)

    def answers(self) -> bool:
        """Whether it does within a second."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
            return True
        return False

    def wait(self, seconds: float = 120.0) -> None:
        """Until it answers.

        Raises:
            RuntimeError: it does not.
        """
        pause = threading.Event()
        for _ in range(int(seconds / 0.2)):
            if self.answers():
                return
            pause.wait(0.2)
        raise RuntimeError(f"The MLflow server did not start:\n{(self.folder / 'server.log').read_text()[-2000:]}")

    def send(self, number: int) -> None:
        """A signal to the server and its workers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL; safe to repeat."""
        self.send(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()


@contextlib.contextmanager
def tracker(folder: Path) -> Iterator[Tracker]:
    """A running MLflow server for the length of a block."""
    server = Tracker(folder)
    try:
        server.start()
        server.wait()
        yield server
    finally:
        server.kill()
