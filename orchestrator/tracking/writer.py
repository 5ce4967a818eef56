"""Idempotent writer of run updates to an MLflow server or file. Imports mlflow when constructed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.errors import redact
from orchestrator.tracking.client import configure_client, dataset_input, experiment_id, sqlite_path
from orchestrator.tracking.local_database import TrackingFile
from orchestrator.tracking.model_export import ExportedModel, ModelExportError
from orchestrator.tracking.model_registry import ModelRegistry
from orchestrator.tracking.projection import DeliveredItems
from orchestrator.tracking.run_update import MODEL, KeptFile, ModelRequest, Point, Render, RunUpdate

UID_TAG = "luthier.trial_uid"
STUDY_TAG = "luthier.study_uid"
PAGE_SIZE = 1000
MODEL_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "ENDPOINT_NOT_FOUND", "FEATURE_DISABLED"})
"""Error codes of a server that will not take a model, however often it is tried."""
TOO_LARGE = 413
"""HTTP status of a server or proxy that takes no body of this size."""

OPEN_STATUS = ("RUNNING", "SCHEDULED")
"""MLflow's statuses of a run that has not ended."""

logger = logging.getLogger("luthier")


@dataclass
class _Run:
    """Cached state of one run on the server."""

    run_id: str
    tags: dict[str, str] = field(default_factory=dict)
    """Tags that the server has."""
    unverified_metrics: set[str] | None = field(default_factory=set)
    """Metrics of which the server may have points that this writer did not send; None = any metric."""
    histories: dict[str, set[Point]] = field(default_factory=dict)
    """Unverified metric → points that the server has, kept until the next successful write."""
    artifacts: dict[str, set[str]] = field(default_factory=dict)
    """Folder → artifacts that it had when it was listed."""
    upload_singly: bool = False
    """Upload artifacts one by one, so that each one that arrives is progress."""


class MlflowWriter:
    """Finds the runs of one study by their tags, creates missing ones, and writes updates to them.

    Every method may raise what the client raises, and may then be called again: nothing is added twice.

    Args:
        uri: tracking URI (`sqlite:////abs/mlflow.db`, `http://…`).
        experiment: name of the experiment, which is created if it does not exist.
        study_uid: tag value of the study.
        artifact_location: artifact store of a new experiment; None = the server's default.
        delivered: collects the items that the server lacked; None = they are not counted.
        folder: of the study, for the files that it keeps; None = there are none.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        study_uid: str,
        artifact_location: str | None = None,
        delivered: DeliveredItems | None = None,
        folder: Path | None = None,
    ) -> None:
        configure_client()
        from mlflow import MlflowClient

        database = sqlite_path(uri)
        self._file = TrackingFile(database, uri) if database is not None else None
        self.refused = 0
        """Items that the server rejected for good; each was logged."""
        self.create_in_doubt = False
        """A create_run failed without a response; the server may still have executed it."""
        self._study_uid = study_uid
        with self._file.opening() if self._file is not None else contextlib.nullcontext():
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self.experiment_id = experiment_id(self._client, experiment, artifact_location)
        self.models = ModelRegistry(self._client, self.experiment_id, study_uid)
        self._delivered = delivered
        self._folder = folder
        self._runs: dict[str, _Run] = {}
        self._deleted: set[str] = set()
        self.load_runs()

    def write(self, update: RunUpdate) -> None:
        """Write points, parameters, tags and status of one run; a deleted run stays deleted.

        What is written is removed from the update, so that a retry continues from there.
        """
        if self._file is not None:
            self._file.check()
        if update.uid in self._deleted:
            return
        run = self._runs.get(update.uid)
        is_new = run is None
        if run is None:
            run = self._create(update)
        update.points = self._missing_points(run, update)
        run.histories.clear()
        run.unverified_metrics = None  # until the server has responded
        self._log_batch(run, update)
        run.unverified_metrics = set()  # from here on only this writer adds points to it
        if update.uid in self._deleted:
            return
        update.points = []
        update.params = {}
        if update.dataset is not None:
            inputs = [dataset_input(*update.dataset)]
            self._send(functools.partial(self._client.log_inputs, run.run_id, inputs))
            update.dataset = None
        if update.status in OPEN_STATUS:
            if not (is_new and update.status == "RUNNING"):  # a run is created with this status
                self._send(functools.partial(self._client.update_run, run.run_id, status=update.status))
        elif update.status is not None:
            self._send(functools.partial(self._client.set_terminated, run.run_id, update.status, update.end))

    def write_files(self, update: RunUpdate) -> None:
        """Render and upload the artifacts of a run that `write` has brought up to date.

        One that cannot be rendered is left out.
        """
        run = self._runs.get(update.uid)
        if run is None or update.uid in self._deleted or not update.files:
            return
        for name, render in list(update.files.items()):
            contents = _rendered(name, render)
            del update.files[name]
            for path, content in contents.items():
                self._count_artifact(run, update.uid, path)
                update.files[path] = functools.partial(bytes, content)  # a retry must not draw it again
        with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
            for name, render in update.files.items():
                file = Path(folder, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                rendered = render()
                assert isinstance(rendered, bytes)
                file.write_bytes(rendered)
            self._upload(run, Path(folder), update)

    def write_kept_files(self, update: RunUpdate) -> None:
        """Upload files of the study's folder; one that is gone or another than the recorded one is left out."""
        run = self._runs.get(update.uid)
        if run is None or update.uid in self._deleted or self._folder is None:
            return
        for name, kept in list(update.kept_files.items()):
            source = self._intact(kept)
            if source is not None:
                self._count_artifact(run, update.uid, name)
                with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
                    # Under the name of the artifact: MLflow takes a file's own.
                    file = Path(folder, PurePosixPath(name).name)
                    file.symlink_to(source)
                    self._upload_large(run, file, name)
            del update.kept_files[name]

    def register_model(self, update: RunUpdate, export: Callable[[ModelRequest], ExportedModel]) -> None:
        """Make the requested model a version of its registered model, unless it is one.

        A model that cannot be exported, or that the server rejects for good, is left out with a warning.

        Args:
            export: makes its folder.
        """
        from mlflow.exceptions import MlflowException

        request = update.model
        if request is None or update.uid in self._deleted:
            return
        try:
            if not self.models.has(request):
                model = export(request)
                run = self._runs.get(request.run_uids.get(model.trial, ""))
                if self.models.register(request, model, run.run_id if run is not None else None):
                    self._count_model(update.uid)
        except ModelExportError as error:
            logger.warning(
                "The chosen model is not registered in MLflow (%s). `luthier sync --verify` tries again.",
                str(error).rstrip("."),
            )
        except MlflowException as error:
            if error.error_code not in MODEL_REFUSALS:
                raise
            self.refused += 1
            logger.warning("MLflow refuses the chosen model: %s", redact(str(error).partition("\n")[0])[:300])
        update.model = None

    def _intact(self, kept: KeptFile) -> Path | None:
        assert self._folder is not None
        path = (self._folder / kept.path).absolute()
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:  # removed by `luthier prune`, or superseded
            return None
        except OSError as error:
            logger.warning("The artifact of %s is left out (%s)", path, error)
            return None
        if digest != kept.sha256:
            logger.warning(
                "A kept file must have the SHA-256 of its record, but %s has another one: it is not sent to MLflow. "
                "`luthier check` says more.",
                path,
            )
            return None
        return path

    def _upload_large(self, run: _Run, file: Path, name: str) -> None:
        from requests import HTTPError

        parent = str(PurePosixPath(name).parent)
        try:
            self._client.log_artifact(run.run_id, str(file), None if parent == "." else parent)
        except HTTPError as error:
            if error.response is None or error.response.status_code != TOO_LARGE:
                raise
            self.refused += 1
            logger.warning(
                "MLflow refuses the artifact %s of %s: it is too large for the server.", name, file.resolve()
            )

    def _count_model(self, uid: str) -> None:
        if self._delivered is not None:
            self._delivered.artifacts.add((uid, MODEL))

    def _upload(self, run: _Run, folder: Path, update: RunUpdate) -> None:
        if not run.upload_singly:
            run.upload_singly = True  # if this fails
            self._client.log_artifacts(run.run_id, str(folder))
            run.upload_singly = False
            update.files.clear()
        for name in list(update.files):
            parent = str(PurePosixPath(name).parent)
            self._client.log_artifact(run.run_id, str(folder / name), None if parent == "." else parent)
            del update.files[name]

    def has_run(self, uid: str) -> bool:
        """Whether the server has the run of that uid, or had it until it was deleted."""
        return uid in self._runs or uid in self._deleted

    def run_id(self, uid: str) -> str | None:
        """MLflow's id of a run, None if it does not exist."""
        run = self._runs.get(uid)
        return run.run_id if run is not None else None

    def load_runs(self) -> None:
        """Look up the study's runs on the server, and delete empty duplicates.

        A run exists twice if the server created it but its response was lost: nothing was written to one of them.
        """
        for uid, runs in self._search_runs().items():
            active = [run for run in runs if run.info.lifecycle_stage == "active"]
            if not active:
                self._deleted.add(uid)
                continue
            current = self.run_id(uid)
            # The run that is written to first, then the fullest: what is deleted is an empty duplicate.
            active.sort(key=lambda run: (run.info.run_id != current, -_item_count(run), run.info.run_id))
            kept, *duplicates = active
            if current is None:
                self._runs[uid] = _Run(kept.info.run_id, dict(kept.data.tags), set(kept.data.metrics))
            for run in duplicates:
                if not _item_count(run):
                    self._client.delete_run(run.info.run_id)

    def _search_runs(self) -> dict[str, list[Any]]:
        from mlflow.entities import ViewType

        runs_by_uid = defaultdict(list)
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self.experiment_id],
                f"tags.`{STUDY_TAG}` = '{self._study_uid}'",
                ViewType.ALL,
                PAGE_SIZE,
                page_token=token,
            )
            for run in page:
                runs_by_uid[run.data.tags.get(UID_TAG, "")].append(run)
            token = page.token
            if not token:
                return runs_by_uid

    def _create(self, update: RunUpdate) -> _Run:
        tags = {**update.tags, UID_TAG: update.uid, STUDY_TAG: self._study_uid}
        parent = self._runs.get(update.parent) if update.parent is not None else None
        if parent is not None:
            tags["mlflow.parentRunId"] = parent.run_id
        if self._delivered is not None:
            self._delivered.runs.add(update.uid)
        # Stays set if no response comes: the server may have created the run all the same.
        self.create_in_doubt = True
        created = self._client.create_run(self.experiment_id, update.start, tags, update.name)
        run = _Run(str(created.info.run_id), tags)
        self._runs[update.uid] = run
        self.create_in_doubt = False
        return run

    def _missing_points(self, run: _Run, update: RunUpdate) -> list[Point]:
        """Points of an update that its run lacks.

        Not every server drops a point that is sent twice.
        """
        metrics = {point[0] for point in update.points}
        if run.unverified_metrics is not None:
            metrics &= run.unverified_metrics
        for key in metrics - set(run.histories):
            history = self._client.get_metric_history(run.run_id, key)
            run.histories[key] = {(key, point.value, point.timestamp, point.step) for point in history}
        missing = [point for point in update.points if point not in run.histories.get(point[0], ())]
        if self._delivered is not None:
            self._delivered.points |= {(update.uid, key, time, step) for key, _, time, step in missing}
        return missing

    def _log_batch(self, run: _Run, update: RunUpdate) -> None:
        from mlflow.entities import Metric, Param, RunTag

        tags = {key: value for key, value in update.tags.items() if run.tags.get(key) != value}
        parts: Mapping[str, list[Any]] = {
            "metrics": [Metric(key, value, time, step) for key, value, time, step in update.points],
            "params": [Param(key, value) for key, value in update.params.items()],
            "tags": [RunTag(key, value) for key, value in tags.items()],
        }
        if not any(parts.values()):
            return
        for key in tags:
            run.tags.pop(key, None)  # unknown until the server has responded
        if not self._send(functools.partial(self._client.log_batch, run.run_id, **parts), count=False):
            if self._client.get_run(run.run_id).info.lifecycle_stage != "active":
                self._deleted.add(update.uid)
                return
            for name, items in parts.items():  # the server rejects one of them: write the others
                for item in items:
                    self._send(functools.partial(self._client.log_batch, run.run_id, **{name: [item]}))
        run.tags |= tags

    def _count_artifact(self, run: _Run, uid: str, name: str) -> None:
        if self._delivered is None:
            return
        folder = str(PurePosixPath(name).parent)
        if folder not in run.artifacts:
            listed = self._client.list_artifacts(run.run_id, None if folder == "." else folder)
            run.artifacts[folder] = {file.path for file in listed}
        if name not in run.artifacts[folder]:
            self._delivered.artifacts.add((uid, name))

    def _send(self, request: Callable[[], object], count: bool = True) -> bool:
        """Whether the server accepted a request; False if it never will.

        Other failures are raised, for a retry.
        """
        from mlflow.exceptions import MlflowException

        try:
            request()
        except MlflowException as error:
            # The code of an item that is rejected for good; any other failure may be transient.
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if count:
                self.refused += 1
                logger.warning("MLflow refuses part of the record: %s", redact(str(error).partition("\n")[0])[:300])
            return False
        return True


def _rendered(name: str, render: Render) -> Mapping[str, bytes]:
    """Contents by artifact path; empty if they cannot be rendered."""
    try:
        contents = render()
    except Exception as error:  # nothing in a curve or a record may block the delivery
        logger.warning("The artifact %r is left out (%s: %s)", name, type(error).__name__, error)
        return {}
    return contents if isinstance(contents, Mapping) else {name: contents}


def _item_count(run: Any) -> int:
    return len(run.data.metrics) + len(run.data.params)
