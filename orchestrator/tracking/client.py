"""MLflow client settings, names of servers, and the check of a server before a study. Imports mlflow when used."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import Problem, redact
from orchestrator.tracking import mlflow_internals

CLIENT_SETTINGS = {
    # One bounded attempt instead of seven retries of two minutes each: the follower retries, and must see every
    # failure, since the server may have created a run whose response was lost.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to the command's result
}
"""Environment variables of MLflow's client that are set unless the user has set them."""
CREDENTIAL_VARIABLES = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
ACCESS_TIMEOUT_S = 5.0
"""Timeout of the check before a study; the study runs without the server, too."""
DEFAULT_PORTS = {"http": 80, "https": 443}
LOCAL_ADDRESSES = ("127.0.0.1", "::1", "0.0.0.0")
DIGEST_LIMIT = 36
"""Characters of a data set's digest that a server accepts."""

logger = logging.getLogger("luthier")


def configure_client() -> None:
    """Apply `CLIENT_SETTINGS` and silence the loggers of MLflow's database layer."""
    for name, value in CLIENT_SETTINGS.items():
        # A value that the user has set stays.
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it raises what it logs
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def sqlite_path(uri: str) -> Path | None:
    """Absolute path of a `sqlite:///…` URI, None for any other."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path).absolute() if uri.startswith("sqlite:///") and path not in ("", ":memory:") else None


def server_name(uri: str) -> str:
    """Canonical URI: lower-cased host, no default port, no trailing slash, no credentials, one name for this machine.

    Of a SQLite file, the absolute path without links. Two names may still be one server (an alias, a server of that
    SQLite file): its runs and points are then looked up again, which takes time and adds nothing.
    """
    file = sqlite_path(uri)
    if file is not None:
        return f"sqlite:///{file.resolve()}"
    try:
        parts = urlsplit(uri)
        port = parts.port or DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return uri
    if parts.scheme not in DEFAULT_PORTS:
        return uri
    # A trailing dot is the DNS root, and names the same host.
    host = (parts.hostname or "").rstrip(".")
    return f"{parts.scheme}://{'localhost' if host in LOCAL_ADDRESSES else host}:{port}{parts.path.rstrip('/')}"


def describe_error(error: Exception) -> str:
    """One line about a failure, without secrets and without the wrappers of the libraries below."""
    text = f"{type(error).__name__}: {error}".partition("\n")[0]
    _, is_wrapped, cause = text.rpartition("(Caused by ")
    if is_wrapped:
        name, _, message = cause.partition("(")
        message = message.rpartition("): ")[2].rstrip(")").strip("'\"")
        text = f"{name}: {message}"
    return redact(text)[:300]


def experiment_id(client: Any, name: str, artifact_location: str | None = None) -> str:
    """The id of an experiment, which is created if it does not exist.

    Raises:
        ValueError: the experiment was deleted.
        Exception: as the client raises.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location))
        except MlflowException as error:  # another process was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise ValueError(_deleted_experiment(name))
    return str(experiment.experiment_id)


def dataset_input(name: str, digest: str, source: str) -> Any:
    """A data set as an input of a run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(name=name, digest=digest[:DIGEST_LIMIT], source_type="local", source=source)
    return DatasetInput(dataset=dataset, tags=[InputTag(key="mlflow.data.context", value="training")])


def access_problems(uri: str, experiment: str, quiet: bool = False) -> Iterator[Problem]:
    """Reasons why a server will never accept a study: refused credentials, or a deleted experiment.

    A server that does not answer, or not as an MLflow server, is a warning only: the study runs, and the journal keeps
    every number.

    Args:
        uri: of an MLflow server; other kinds of URIs are not checked.
        quiet: without the warning.
    """
    if not uri.startswith(("http://", "https://")):
        return
    configure_client()
    endpoint = "/api/2.0/mlflow/experiments/get-by-name"
    try:
        response = mlflow_internals.get(uri, endpoint, {"experiment_name": experiment}, ACCESS_TIMEOUT_S)
    except Exception as error:  # any network error
        problem = describe_error(error)
    else:
        status = response.status_code
        if status in (401, 403):
            yield Problem(("tracking", "uri"), _refused_credentials(uri, experiment, status))
            return
        content = _json_object(response)
        if (status == 200 and "experiment" in content) or (status == 404 and "error_code" in content):
            if (content.get("experiment") or {}).get("lifecycle_stage") == "deleted":
                yield Problem(("tracking", "experiment"), _deleted_experiment(experiment))
            return
        problem = f"HTTP {status}: {response.text.strip()[:80]!r}"
    if not quiet:
        logger.warning(
            "MLflow at %s does not answer as it should (%s). The study runs without it: the journal keeps every "
            "number, and they are delivered when it is back, or later by `luthier sync`.",
            redact(uri),
            redact(problem),
        )


def _json_object(response: Any) -> Mapping[str, Any]:
    try:
        content = response.json()
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _deleted_experiment(name: str) -> str:
    return (
        f"An MLflow experiment must be active, but {name!r} was deleted. "
        "Restore it (mlflow experiments restore), or set tracking.experiment to another name."
    )


def _refused_credentials(uri: str, experiment: str, status: int) -> str:
    given = [name for name in CREDENTIAL_VARIABLES if os.environ.get(name)]
    settings = f"set here: {', '.join(given)}" if given else "none of them is set here"
    refusal = "does not let this user in"
    if status == 403:
        refusal = f"does not let this user use the experiment {experiment!r}"
    return (
        f"the MLflow server {redact(uri)} {refusal} (HTTP {status}). Set MLFLOW_TRACKING_TOKEN, or "
        f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD ({settings}), or leave tracking.uri out for a SQLite "
        "file in the storage folder."
    )
