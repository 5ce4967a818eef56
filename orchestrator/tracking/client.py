"""The MLflow client as Luthier uses it: bounded and quiet. mlflow is imported when it is used."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from orchestrator.errors import redact

QUOTES = "'\""


def prepare_process() -> None:
    """Bounded requests instead of MLflow's seven retries of two minutes (the follower tries again, and has to know of
    every failure: a run may have been made whose answer was lost); no telemetry; no chatter on the terminal."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to the command's result
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what it logs, it raises, too
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def sqlite_file(uri: str) -> Path | None:
    """The file behind a `sqlite:///…` URI, None for any other."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path).absolute() if uri.startswith("sqlite:///") and path not in ("", ":memory:") else None


def trouble(error: Exception) -> str:
    """One line about a failure, without secrets, and without what the libraries below have wrapped around it."""
    text = f"{type(error).__name__}: {error}".partition("\n")[0]
    _, wrapped, cause = text.rpartition("(Caused by ")
    if wrapped:
        name, _, said = cause.partition("(")
        text = f"{name}: {said.rpartition('): ')[2].rstrip(')').strip(QUOTES)}"
    return redact(text)[:300]


def experiment_id(client: Any, name: str, artifact_location: str | None = None) -> str:
    """The id of an experiment, which is made if it does not exist.

    Raises:
        ValueError: a person deleted it.
        Exception: whatever the client raises.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location))
        except MlflowException as error:  # another process was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise ValueError(deleted(name))
    return str(found.experiment_id)


def deleted(name: str) -> str:
    """What a person is told whose experiment was deleted."""
    return (
        f"An MLflow experiment must be active, but {name!r} was deleted. "
        "Restore it (mlflow experiments restore), or set tracking.experiment to another name."
    )


def dataset_input(name: str, digest: str, source: str) -> Any:
    """A data set as an input of a run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=source)  # 36 = the server's limit
    return DatasetInput(dataset=dataset, tags=[InputTag(key="mlflow.data.context", value="training")])
