"""Writes run updates to an MLflow server or file. Used from the follower's thread only; imports mlflow when made."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.curves import Picture
from orchestrator.errors import redact
from orchestrator.run_fields import RunUpdate

UID_TAG = "luthier.trial_uid"
STUDY_TAG = "luthier.study_uid"

logger = logging.getLogger("luthier")


def _prepare_process() -> None:
    """Bounded requests instead of MLflow's seven retries of two minutes; no telemetry; no chatter on the terminal."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to the command's result
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def sqlite_file(uri: str) -> Path | None:
    """The file behind a `sqlite:///…` URI, None for any other."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


class MlflowWriter:
    """Finds the runs of one study by their tags, makes those that are missing, and writes updates to them.

    Every method may raise whatever the client raises; all of them can be repeated without adding anything twice.

    Args:
        uri: tracking URI (`sqlite:////abs/mlflow.db`, `http://…`).
        experiment: name; made if it does not exist.
        study_uid: tag value of the study.
        artifact_location: where a new experiment keeps its artifacts; None = the server decides.
    """

    def __init__(self, uri: str, experiment: str, study_uid: str, artifact_location: str | None = None) -> None:
        _prepare_process()
        from mlflow import MlflowClient

        if (database := sqlite_file(uri)) is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
        self.refused = 0
        """Writes that the server will never take; each was logged."""
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._study_uid = study_uid
        self.experiment_id = self._experiment(experiment, artifact_location)
        self._runs: dict[str, str] = {}
        self._deleted: set[str] = set()
        self._load_runs()

    def write(self, update: RunUpdate) -> None:
        """Bring the numbers and the state of one run up to date; a run that a person deleted stays deleted. What is
        written is taken out of the update, so that after a failure the next attempt goes on from there."""
        if update.uid in self._deleted:
            return
        run_id = self._runs.get(update.uid) or self._create(update)
        self._log(run_id, update)
        if update.uid in self._deleted:
            return
        update.points, update.params = [], {}
        if update.dataset is not None:
            inputs = [_dataset_input(*update.dataset)]
            self._attempt(lambda: self._client.log_inputs(run_id, inputs))
            update.dataset = None
        if update.status == "RUNNING":
            self._attempt(lambda: self._client.update_run(run_id, status="RUNNING"))
        elif update.status is not None:
            self._attempt(lambda: self._client.set_terminated(run_id, update.status, update.end))

    def attach(self, update: RunUpdate) -> None:
        """Write the artifacts of a run that `write` has brought up to date, drawing its pictures. A picture that cannot
        be drawn is left out: its numbers are there as JSON."""
        run_id = self._runs.get(update.uid)
        if run_id is None or update.uid in self._deleted:
            return
        for name in list(update.texts):
            self._client.log_text(run_id, update.texts[name], name)
            del update.texts[name]
        for name in list(update.pictures):
            content = _drawn(update.pictures[name])
            if content is not None:
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / PurePosixPath(name).name
                    file.write_bytes(content)
                    self._client.log_artifact(run_id, str(file), str(PurePosixPath(name).parent))
            del update.pictures[name]

    def knows(self, uid: str) -> bool:
        """True if the server has, or had until a person deleted it, the run of that uid."""
        return uid in self._runs or uid in self._deleted

    def run_id(self, uid: str) -> str | None:
        """MLflow's id of a run, once it is known."""
        return self._runs.get(uid)

    def _experiment(self, name: str, artifact_location: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifact_location))
            except MlflowException as error:  # another process was faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise ValueError(
                f"An MLflow experiment must be active, but {name!r} was deleted. "
                "Restore it (mlflow experiments restore), or set tracking.experiment to another name."
            )
        return str(found.experiment_id)

    def _load_runs(self) -> None:
        """Learn the study's runs. A run may exist twice if the server made it but its answer was lost: the one that
        nothing was written to is deleted."""
        from mlflow.entities import ViewType

        token: str | None = None
        found: dict[str, list[Any]] = {}
        while True:
            page = self._client.search_runs(
                [self.experiment_id], f"tags.`{STUDY_TAG}` = '{self._study_uid}'", ViewType.ALL, 1000, page_token=token
            )
            for run in page:
                found.setdefault(run.data.tags.get(UID_TAG, ""), []).append(run)
            token = page.token
            if not token:
                break
        for uid, runs in found.items():
            active = [run for run in runs if run.info.lifecycle_stage == "active"]
            if not active:
                self._deleted.add(uid)
                continue
            first, *others = sorted(active, key=lambda run: (-_size(run), run.info.run_id))
            self._runs[uid] = first.info.run_id
            for run in others:
                if not _size(run):
                    self._client.delete_run(run.info.run_id)

    def _create(self, update: RunUpdate) -> str:
        tags = dict(update.tags) | {UID_TAG: update.uid, STUDY_TAG: self._study_uid}
        if update.parent is not None and update.parent in self._runs:
            tags["mlflow.parentRunId"] = self._runs[update.parent]
        run = self._client.create_run(self.experiment_id, update.start, tags, update.name)
        run_id = self._runs[update.uid] = str(run.info.run_id)
        return run_id

    def _log(self, run_id: str, update: RunUpdate) -> None:
        from mlflow.entities import Metric, Param, RunTag

        parts: Mapping[str, list[Any]] = {
            "metrics": [Metric(key, value, time, step) for key, value, time, step in update.points],
            "params": [Param(key, value) for key, value in update.params.items()],
            "tags": [RunTag(key, value) for key, value in update.tags.items()],
        }
        if self._attempt(lambda: self._client.log_batch(run_id, **parts), count=False):
            return
        if self._client.get_run(run_id).info.lifecycle_stage != "active":
            self._deleted.add(update.uid)
            return
        for name, part in parts.items():  # something in it is refused: save the rest
            for item in part:
                self._attempt(functools.partial(self._client.log_batch, run_id, **{name: [item]}))

    def _attempt(self, write: Callable[[], object], count: bool = True) -> bool:
        """False if the server answers that it will never take this; other failures are raised, to be tried again."""
        from mlflow.exceptions import MlflowException

        try:
            write()
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if count:
                self.refused += 1
                logger.warning("MLflow refuses part of the record: %s", redact(str(error).partition("\n")[0])[:300])
            return False
        return True


def _drawn(picture: Picture) -> bytes | None:
    from orchestrator.curve_plot import draw

    try:
        return draw(picture.name, picture.curve, picture.chosen)
    except Exception as error:  # whatever is in a curve, the record of the study goes on
        logger.warning("The curve %r is kept as numbers only (%s: %s)", picture.name, type(error).__name__, error)
        return None


def _size(run: Any) -> int:
    return len(run.data.metrics) + len(run.data.params)


def _dataset_input(name: str, digest: str, source: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=source)  # 36 = the server's limit
    return DatasetInput(dataset=dataset, tags=[InputTag(key="mlflow.data.context", value="training")])
