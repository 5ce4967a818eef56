"""Contract of the private MLflow names in `mlflow_internals`: fails when MLflow changes one of them."""

from __future__ import annotations

import inspect
import sqlite3
from pathlib import Path

from orchestrator.tracking import mlflow_internals
from orchestrator.tracking.client import configure_client
from tests.support.tracking import fail_with, serve


def test_the_latest_revision_is_that_of_a_new_database(template: Path) -> None:
    with sqlite3.connect(template) as connection:
        revisions = connection.execute("select version_num from alembic_version").fetchall()
    assert revisions == [(mlflow_internals.latest_schema_revision(),)]


def test_an_engine_is_kept_per_uri_and_disposed(database: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    uri = f"sqlite:///{database}"
    MlflowClient(uri, uri).search_experiments()
    assert SqlAlchemyStore._engine_map[uri].pool.checkedin() == 1
    mlflow_internals.dispose_engine(uri)
    assert SqlAlchemyStore._engine_map[uri].pool.checkedin() == 0
    mlflow_internals.dispose_engine("sqlite:////nowhere.db")


def test_a_request_returns_the_response_of_any_status() -> None:
    configure_client()
    server = serve(fail_with(401, b'{"detail": "no"}'))
    try:
        uri = f"http://127.0.0.1:{server.server_port}"
        response = mlflow_internals.get(uri, "/api/2.0/x", {"name": "a"}, 5.0)
    finally:
        server.shutdown()
        server.server_close()
    assert (response.status_code, response.json()) == (401, {"detail": "no"})


def test_the_signatures_are_those_that_were_read() -> None:
    from mlflow.store.db import utils
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    assert list(inspect.signature(utils._get_latest_schema_revision).parameters) == []
    assert list(inspect.signature(get_default_host_creds).parameters)[:1] == ["store_uri"]
    parameters = inspect.signature(http_request).parameters
    assert list(parameters)[:3] == ["host_creds", "endpoint", "method"]
    assert {"max_retries", "timeout", "raise_on_status"} <= set(parameters)
