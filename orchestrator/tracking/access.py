"""Whether a tracking server lets a study in, asked once before anything is spent."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import Problem, redact
from orchestrator.tracking.client import deleted, prepare_process, trouble

logger = logging.getLogger("luthier")

SECONDS = 5.0
"""How long the server may take to answer; a study runs without it, too."""
VARIABLES = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


def access_problems(uri: str, experiment: str, quiet: bool = False) -> Iterator[Problem]:
    """Why a server will never take this study: it refuses these credentials, or a person deleted the experiment. One
    that does not answer, or not as a tracking server does, is a warning: the study runs, and the journal keeps all.

    Args:
        uri: of an MLflow server; any other kind of URI is not looked at.
        quiet: without that warning.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        response = _ask(uri, experiment)
    except Exception as error:  # whatever a network does
        why = trouble(error)
    else:
        if response.status_code in (401, 403):
            yield Problem(("tracking", "uri"), _refused(uri, experiment, response.status_code))
            return
        found = _json(response)
        if {200: "experiment", 404: "error_code"}.get(response.status_code, "") in found:
            if (found.get("experiment") or {}).get("lifecycle_stage") == "deleted":
                yield Problem(("tracking", "experiment"), deleted(experiment))
            return
        why = f"HTTP {response.status_code}: {response.text.strip()[:80]!r}"
    if not quiet:
        logger.warning(
            "MLflow at %s does not answer as it should (%s). The study runs without it: the journal keeps every "
            "number, and they are delivered when it is back, or later by `luthier sync`.",
            redact(uri),
            redact(why),
        )


def _ask(uri: str, experiment: str) -> Any:
    """The answer to a question that changes nothing, with the credentials that MLflow would use."""
    prepare_process()
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    return http_request(
        get_default_host_creds(uri), "/api/2.0/mlflow/experiments/get-by-name", "GET", max_retries=0, timeout=SECONDS,
        raise_on_status=False, params={"experiment_name": experiment},
    )  # fmt: skip


def _json(response: Any) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refused(uri: str, experiment: str, status: int) -> str:
    given = [name for name in VARIABLES if os.environ.get(name)]
    here = f"set here: {', '.join(given)}" if given else "none of them is set here"
    may = "does not let this user in" if status == 401 else f"does not let this user use the experiment {experiment!r}"
    return (
        f"the MLflow server {redact(uri)} {may} (HTTP {status}). Set MLFLOW_TRACKING_TOKEN, or "
        f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD ({here}), or leave tracking.uri out for a SQLite file "
        "in the storage folder."
    )
