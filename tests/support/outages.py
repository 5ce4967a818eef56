"""A real MLflow server that can be killed and stopped, and a proxy in front of it with planned faults."""

from __future__ import annotations

import http.client
import http.server
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.cluster.driver_process import free_port

Faults = dict[int, str]
"""Number of a request, from 0 → what happens to it: an HTTP status, `html` (status 200), `rst`, `lost` (done, but the
answer is lost), `slow` (a fifth of a second later)."""

HTML = b"<html><body>Please log in</body></html>"


class Server:
    """`mlflow server` on one SQLite file, in a session of its own.

    Args:
        folder: of its database and artifacts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.database = folder / "server.db"
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
             "--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}",
             "--artifacts-destination", str(self.folder / "kept")],
            cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        )  # fmt: skip
        deadline = time.monotonic() + 300
        tick = threading.Event()
        while not self._answers():
            assert time.monotonic() < deadline, "the MLflow server does not start"
            assert self._process.poll() is None, "the MLflow server has ended"
            tick.wait(0.1)

    def signal(self, number: int) -> None:
        """Send a signal to the server and its workers."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return int(answer.status) == 200
        except OSError:
            return False


class _Proxy(http.server.ThreadingHTTPServer):
    def __init__(self, target: int, faults: Faults) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.seen = Counter[str]()
        self._faults = faults
        self._mutex = threading.Lock()

    def next_fault(self) -> str:
        """What happens to the next request."""
        with self._mutex:
            fault = self._faults.get(sum(self.seen.values()), "passed")
            self.seen[fault] += 1
        return fault


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Proxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault()
        if fault in ("html", "rst") or fault.isdigit():
            self._fail(fault)
            return
        if fault == "slow":
            threading.Event().wait(0.2)
        answer, content = self._forwarded(body)
        if fault == "lost":
            self._fail("rst")
            return
        self._send(answer.status, content, answer.getheader("Content-Type") or "application/json")

    do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815

    def _forwarded(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer, content

    def _fail(self, fault: str) -> None:
        if fault == "rst":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "html":
            self._send(200, HTML, "text/html")
        elif fault == "500":
            self._send(500, b'{"error_code": "INTERNAL_ERROR", "message": "no"}', "application/json")
        else:
            self._send(int(fault), HTML, "text/html")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def finish(self) -> None:
        try:
            super().finish()
        except OSError:
            self.close_connection = True  # the connection was reset on purpose

    def log_message(self, *args: Any) -> None:
        """Keep the test's output clean."""


@contextmanager
def proxy(port: int, faults: Faults) -> Iterator[tuple[str, Counter[str]]]:
    """A proxy in front of a server on this machine: its URI, and how often each thing happened (`passed`, too)."""
    server = _Proxy(port, faults)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.seen
    finally:
        server.shutdown()
        server.server_close()
