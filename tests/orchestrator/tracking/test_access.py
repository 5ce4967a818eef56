"""A tracking server that will never take a study is refused before anything is spent; one that is only away is not."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from orchestrator.commands.exit_status import PREFLIGHT
from orchestrator.errors import PreflightError
from orchestrator.planning.preflight import preflight
from orchestrator.record.journal import Journal
from orchestrator.tracking import access
from orchestrator.tracking.access import VARIABLES, access_problems
from tests.orchestrator.commands.test_sync import luthier, make_study
from tests.orchestrator.tracked import fail_with, serve, write_study

Answer = Callable[[BaseHTTPRequestHandler], object]

UNKNOWN = b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}'
REFUSED = (
    "the MLflow server {} does not let this user in (HTTP 401). Set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME "
    "and MLFLOW_TRACKING_PASSWORD ({}), or leave tracking.uri out for a SQLite file in the storage folder."
)


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Callable[[Answer], str]]:
    """Starts a server with one answer; returns host and port."""
    started = []

    def start(answer: Answer) -> str:
        started.append(serve(answer))
        return f"127.0.0.1:{started[-1].server_port}"

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


def problems(uri: str) -> list[str]:
    return [f"{problem.path}: {problem}" for problem in access_problems(uri, "pets")]


@pytest.mark.parametrize("body", [b"You are not authenticated", b'{"error": "unauthorized"}', b"<html>log in</html>"])
def test_p14_a_server_that_lets_nobody_in_stops_a_run_before_anything_is_spent(
    body: bytes, server: Callable[[Answer], str], tmp_path: Path
) -> None:
    place = server(fail_with(401, body))
    spec, _ = make_study(tmp_path, f"http://me:hunter2@{place}")
    with pytest.raises(PreflightError) as refused:
        preflight(spec)
    said = REFUSED.format(f"http://***@{place}", "none of them is set here")
    assert str(refused.value) == f"The study 'pets' cannot run here: tracking.uri: {said}"


def test_p14_the_variables_that_are_set_are_named_and_used(
    server: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        heard.append(request.headers.get("Authorization"))
        fail_with(404 if heard[-1] == "Bearer right-token" else 401, UNKNOWN)(request)

    place = server(answer)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "wrong-token")
    (problem,) = access_problems(f"http://{place}", "pets")
    assert problem.message == REFUSED.format(f"http://{place}", "set here: MLFLOW_TRACKING_TOKEN")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "right-token")
    assert problems(f"http://{place}") == []
    assert heard == ["Bearer wrong-token", "Bearer right-token"]


def test_p14_a_user_without_the_permission(server: Callable[[Answer], str]) -> None:
    place = server(fail_with(403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}'))
    (problem,) = access_problems(f"http://{place}", "pets")
    assert problem.message.startswith(
        f"the MLflow server http://{place} does not let this user use the experiment 'pets' (HTTP 403). Set MLFLOW_"
    )


def test_an_experiment_that_a_person_deleted(server: Callable[[Answer], str]) -> None:
    found = {"experiment": {"experiment_id": "1", "lifecycle_stage": "deleted"}}
    (problem,) = access_problems(f"http://{server(fail_with(200, json.dumps(found).encode()))}", "pets")
    assert str(problem) == (
        "tracking.experiment: An MLflow experiment must be active, but 'pets' was deleted. Restore it (mlflow "
        "experiments restore), or set tracking.experiment to another name."
    )


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>Please log in</html>"), (404, b"<html>nginx</html>"), (429, b""), (500, b"{}"), (502, b"<html/>")],
)
def test_p14_a_server_with_troubles_of_its_own_is_a_warning(
    status: int, body: bytes, server: Callable[[Answer], str], caplog: pytest.LogCaptureFixture
) -> None:
    place = server(fail_with(status, body))
    with caplog.at_level(logging.WARNING):
        assert problems(f"http://me:hunter2@{place}") == []
    assert caplog.messages == [
        f"MLflow at http://***@{place} does not answer as it should (HTTP {status}: {body.decode()!r}). The study runs "
        "without it: the journal keeps every number, and they are delivered when it is back, or later by "
        "`luthier sync`."
    ]


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_p12_p13_a_server_that_is_away_is_a_warning_and_costs_seconds(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening, caplog.at_level(logging.WARNING):
        place = f"127.0.0.1:{listening.getsockname()[1]}"
        if kind == "refused":
            listening.close()
        began = time.monotonic()
        assert problems(f"http://{place}") == []
        assert time.monotonic() - began < 15
    errno = "NewConnectionError: Failed to establish a new connection: [Errno 111] Connection refused"
    why = errno if kind == "refused" else "ReadTimeoutError: Read timed out. (read timeout=0.5)"
    assert [message.partition(" The study")[0] for message in caplog.messages] == [
        f"MLflow at http://{place} does not answer as it should ({why})."
    ]


def test_a_server_that_works_and_a_file_are_not_spoken_of(
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

    place = server(answer)
    _, folder = make_study(tmp_path, f"http://{place}")
    with Journal(folder / "journal.jsonl") as journal:
        write_study(journal)
    done = luthier("sync", folder)
    assert done.exit_code == PREFLIGHT
    said = REFUSED.format(f"http://{place}", "none of them is set here")
    assert done.stderr == f"Error: The study 'pets' cannot run here: tracking.uri: {said}\n"
    assert len(asked) == 1
    assert not (folder / "journal.jsonl.mlflow.json").exists()
