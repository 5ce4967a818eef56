"""Names of servers, and the check of a server before anything is spent."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.exit_status import PREFLIGHT
from orchestrator.errors import PreflightError
from orchestrator.planning.preflight import preflight
from orchestrator.record.journal import Journal
from orchestrator.tracking import client
from orchestrator.tracking.client import CREDENTIAL_VARIABLES, access_problems, server_name
from tests.support.tracking import fail_with, luthier, make_study, serve, write_study

Answer = Callable[[BaseHTTPRequestHandler], object]

UNKNOWN = b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}'
REFUSED = (
    "the MLflow server {} does not let this user in (HTTP 401). Set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME "
    "and MLFLOW_TRACKING_PASSWORD ({}), or leave tracking.uri out for a SQLite file in the storage folder."
)


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CREDENTIAL_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Callable[[Answer], str]]:
    """Starts a server with one answer; returns host and port."""
    started = []

    def start(answer: Answer) -> str:
        started.append(serve(answer))
        return f"127.0.0.1:{started[-1].server_port}"

    yield start
    for running in started:
        running.shutdown()
        running.server_close()


def problems(uri: str) -> list[str]:
    return [f"{problem.path}: {problem}" for problem in access_problems(uri, "pets")]


@pytest.mark.parametrize("body", [b"You are not authenticated", b'{"error": "unauthorized"}', b"<html>log in</html>"])
def test_p14_a_server_that_refuses_credentials_stops_a_run_before_anything_is_spent(
    body: bytes, server: Callable[[Answer], str], tmp_path: Path
) -> None:
    address = server(fail_with(401, body))
    spec, _ = make_study(tmp_path, f"http://me:hunter2@{address}")
    with pytest.raises(PreflightError) as refused:
        preflight(spec)
    message = REFUSED.format(f"http://***@{address}", "none of them is set here")
    assert str(refused.value) == f"The study 'pets' cannot run here: tracking.uri: {message}"


def test_p14_the_variables_that_are_set_are_named_and_used(
    server: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        credentials.append(request.headers.get("Authorization"))
        fail_with(404 if credentials[-1] == "Bearer right-token" else 401, UNKNOWN)(request)

    address = server(answer)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "wrong-token")
    (problem,) = access_problems(f"http://{address}", "pets")
    assert problem.message == REFUSED.format(f"http://{address}", "set here: MLFLOW_TRACKING_TOKEN")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "right-token")
    assert problems(f"http://{address}") == []
    assert credentials == ["Bearer wrong-token", "Bearer right-token"]


def test_p14_a_user_without_the_permission(server: Callable[[Answer], str]) -> None:
    address = server(fail_with(403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}'))
    (problem,) = access_problems(f"http://{address}", "pets")
    assert problem.message.startswith(
        f"the MLflow server http://{address} does not let this user use the experiment 'pets' (HTTP 403). Set MLFLOW_"
    )


def test_a_deleted_experiment(server: Callable[[Answer], str]) -> None:
    answer = {"experiment": {"experiment_id": "1", "lifecycle_stage": "deleted"}}
    (problem,) = access_problems(f"http://{server(fail_with(200, json.dumps(answer).encode()))}", "pets")
    assert str(problem) == (
        "tracking.experiment: An MLflow experiment must be active, but 'pets' was deleted. Restore it (mlflow "
        "experiments restore), or set tracking.experiment to another name."
    )


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>Please log in</html>"), (404, b"<html>nginx</html>"), (429, b""), (500, b"{}"), (502, b"<html/>")],
)
def test_p14_any_other_failure_of_a_server_is_a_warning(
    status: int, body: bytes, server: Callable[[Answer], str], caplog: pytest.LogCaptureFixture
) -> None:
    address = server(fail_with(status, body))
    with caplog.at_level(logging.WARNING):
        assert problems(f"http://me:hunter2@{address}") == []
    assert caplog.messages == [
        f"MLflow at http://***@{address} does not answer as it should (HTTP {status}: {body.decode()!r}). The study "
        "runs without it: the journal keeps every number, and they are delivered when it is back, or later by "
        "`luthier sync`."
    ]


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_p12_p13_a_server_that_is_away_is_a_warning(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ACCESS_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening, caplog.at_level(logging.WARNING):
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        if kind == "refused":
            listening.close()
        assert problems(f"http://{address}") == []
    errno = "NewConnectionError: Failed to establish a new connection: [Errno 111] Connection refused"
    why = errno if kind == "refused" else "ReadTimeoutError: Read timed out. (read timeout=0.5)"
    assert [message.partition(" The study")[0] for message in caplog.messages] == [
        f"MLflow at http://{address} does not answer as it should ({why})."
    ]


def test_a_working_server_and_a_file_cause_no_warning(
    server: Callable[[Answer], str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert problems(f"http://{server(fail_with(404, UNKNOWN))}") == []
        assert problems("sqlite:////nowhere/mlflow.db") == []
    assert caplog.messages == []


def test_p14_sync_is_refused_at_once_and_touches_nothing(server: Callable[[Answer], str], tmp_path: Path) -> None:
    asked: list[Any] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(threading.current_thread())
        fail_with(401, b"You are not authenticated")(request)

    address = server(answer)
    _, folder = make_study(tmp_path, f"http://{address}")
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal)
    done = luthier("sync", folder)
    assert done.exit_code == PREFLIGHT
    message = REFUSED.format(f"http://{address}", "none of them is set here")
    assert done.stderr == f"Error: The study 'pets' cannot run here: tracking.uri: {message}\n"
    assert len(asked) == 1
    assert not (folder / "journal.jsonl.mlflow.json").exists()


@pytest.mark.parametrize(
    "uri",
    [
        "http://localhost:5000", "http://127.0.0.1:5000", "http://[::1]:5000/", "HTTP://LocalHost:5000//",
        "http://me:hunter2@localhost.:5000",
    ],
)  # fmt: skip
def test_p12_one_server_has_one_name(uri: str) -> None:
    assert server_name(uri) == "http://localhost:5000"


def test_p12_the_default_port_may_be_left_out() -> None:
    assert server_name("https://Tracking.example/team/") == server_name("https://tracking.example:443/team")
    assert server_name("http://tracking.example") == "http://tracking.example:80"


def test_p12_other_servers_have_other_names() -> None:
    uris = [
        "http://a:5000", "https://a:5000", "http://a:5001", "http://b:5000", "http://a:5000/x", "http://a:port",
        "databricks", "postgresql://me@a/mlflow", "sqlite:////a/mlflow.db",
    ]  # fmt: skip
    assert len({server_name(uri) for uri in uris}) == len(uris)


def test_p12_a_sqlite_file_is_named_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    spelled = ("mlflow.db", f"{tmp_path}/real/mlflow.db", f"{tmp_path}/link/./mlflow.db?timeout=5")
    assert {server_name(f"sqlite:///{path}") for path in spelled} == {f"sqlite:///{tmp_path}/real/mlflow.db"}
    assert server_name("sqlite:///:memory:") == "sqlite:///:memory:"
