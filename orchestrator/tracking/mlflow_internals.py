"""Every private MLflow name that Luthier uses, as read in MLflow 3.17.2.

tests/orchestrator/tracking/test_mlflow_internals.py fails within a second when MLflow changes one of them.
"""

from __future__ import annotations

from typing import Any


def latest_schema_revision() -> str:
    """Alembic revision of a complete tracking database of the installed MLflow.

    `mlflow.store.db.utils._get_latest_schema_revision`. Public code can only open a database, which starts the
    migration of an incomplete one in place.
    """
    from mlflow.store.db import utils

    return str(utils._get_latest_schema_revision())


def dispose_engine(uri: str) -> None:
    """Close the pooled connections of a tracking database.

    `SqlAlchemyStore._engine_map`: MLflow keeps an engine per URI for the life of the process, whose connections stay
    open to a file that was deleted or replaced. There is no public way to close them.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    engine = SqlAlchemyStore._engine_map.get(uri)
    if engine is not None:
        engine.dispose()


def get(uri: str, endpoint: str, params: dict[str, str], timeout_s: float) -> Any:
    """Response (`requests.Response`) of one GET request, without retries, with MLflow's credentials and TLS settings.

    `mlflow.utils.rest_utils.http_request` and `mlflow.utils.credentials.get_default_host_creds`. `MlflowClient` hides
    the HTTP status of a response that is JSON without an `error_code`, such as the 401 of many gateways.
    """
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    return http_request(
        get_default_host_creds(uri), endpoint, "GET", max_retries=0, timeout=timeout_s, raise_on_status=False,
        params=params,
    )  # fmt: skip
