"""Writes run updates to an MLflow server or file. Used from the follower's thread only; imports mlflow when made."""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.errors import redact
from orchestrator.results.curves import Drawn
from orchestrator.tracking.client import dataset_input, experiment_id, prepare_process, sqlite_file
from orchestrator.tracking.outstanding import Additions
from orchestrator.tracking.run_fields import RunUpdate
from orchestrator.tracking.sqlite_file import TrackingFile

UID_TAG = "luthier.trial_uid"
STUDY_TAG = "luthier.study_uid"

Point = tuple[str, float, int, int]
"""(metric, value, time, step)."""

logger = logging.getLogger("luthier")


class MlflowWriter:
    """Finds the runs of one study by their tags, makes those that are missing, and writes updates to them.

    Every method may raise whatever the client raises; all of them can be repeated without adding anything twice.

    Args:
        uri: tracking URI (`sqlite:////abs/mlflow.db`, `http://…`).
        experiment: name; made if it does not exist.
        study_uid: tag value of the study.
        artifact_location: where a new experiment keeps its artifacts; None = the server decides.
        additions: counts what was missing on the server; None = nobody wants to know.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        study_uid: str,
        artifact_location: str | None = None,
        additions: Additions | None = None,
    ) -> None:
        prepare_process()
        from mlflow import MlflowClient

        database = sqlite_file(uri)
        self._file = TrackingFile(database, uri) if database is not None else None
        self.refused = 0
        """Writes that the server will never take; each was logged."""
        self._study_uid = study_uid
        with self._file.opening() if self._file is not None else contextlib.nullcontext():
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self.experiment_id = experiment_id(self._client, experiment, artifact_location)
        self.doubtful = False
        """Whether a run was asked for whose answer has not come: the server may make it yet."""
        self._additions = additions
        self._runs: dict[str, str] = {}
        self._deleted: set[str] = set()
        self._unsure: dict[str, set[str] | None] = {}
        self._there: dict[tuple[str, str], set[Point]] = {}
        self._listed: dict[tuple[str, str], set[str]] = {}
        self.load_runs()

    def write(self, update: RunUpdate) -> None:
        """Bring the numbers and the state of one run up to date; a run that a person deleted stays deleted. What is
        written is taken out of the update, so that after a failure the next attempt goes on from there."""
        if self._file is not None:
            self._file.check()
        if update.uid in self._deleted:
            return
        run_id = self._runs.get(update.uid) or self._create(update)
        update.points = self._missing(run_id, update)
        for key in [place for place in self._there if place[0] == run_id]:
            del self._there[key]
        self._unsure[update.uid] = None  # until the server has answered
        self._log(run_id, update)
        del self._unsure[update.uid]  # from here on only this writer adds to it
        if update.uid in self._deleted:
            return
        update.points, update.params = [], {}
        if update.dataset is not None:
            inputs = [dataset_input(*update.dataset)]
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
            self._count_artifact(run_id, update.uid, name)
            self._client.log_text(run_id, update.texts[name], name)
            del update.texts[name]
        for name in list(update.drawn):
            content = _content(update.drawn[name])
            if content is not None:
                self._count_artifact(run_id, update.uid, name)
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / PurePosixPath(name).name
                    file.write_bytes(content)
                    folder_there = str(PurePosixPath(name).parent)
                    self._client.log_artifact(run_id, str(file), None if folder_there == "." else folder_there)
            del update.drawn[name]

    def knows(self, uid: str) -> bool:
        """True if the server has, or had until a person deleted it, the run of that uid."""
        return uid in self._runs or uid in self._deleted

    def run_id(self, uid: str) -> str | None:
        """MLflow's id of a run, once it is known."""
        return self._runs.get(uid)

    def load_runs(self) -> None:
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
            mine = self._runs.get(uid)
            first, *others = sorted(active, key=lambda run: (run.info.run_id != mine, -_size(run), run.info.run_id))
            if mine is None:
                self._unsure[uid] = set(first.data.metrics)
            self._runs[uid] = first.info.run_id
            for run in others:
                if not _size(run):
                    self._client.delete_run(run.info.run_id)

    def _create(self, update: RunUpdate) -> str:
        tags = dict(update.tags) | {UID_TAG: update.uid, STUDY_TAG: self._study_uid}
        if update.parent is not None and update.parent in self._runs:
            tags["mlflow.parentRunId"] = self._runs[update.parent]
        if self._additions is not None:
            self._additions.runs.add(update.uid)
        self.doubtful = True
        run = self._client.create_run(self.experiment_id, update.start, tags, update.name)
        run_id = self._runs[update.uid] = str(run.info.run_id)
        self.doubtful = False
        return run_id

    def _missing(self, run_id: str, update: RunUpdate) -> list[Point]:
        """Points of an update that its run lacks. A run that was there before this writer, or whose last request has
        failed, may have got some of them; not every server takes the same point twice for one."""
        there = set[Point]()
        if update.uid in self._unsure:
            keys = self._unsure[update.uid]
            for key in {key for key, *_ in update.points if keys is None or key in keys}:
                if (run_id, key) not in self._there:
                    history = self._client.get_metric_history(run_id, key)
                    self._there[run_id, key] = {(key, p.value, p.timestamp, p.step) for p in history}
                there |= self._there[run_id, key]
        missing = [point for point in update.points if point not in there]
        if self._additions is not None:
            self._additions.points |= {(update.uid, key, time, step) for key, _, time, step in missing}
        return missing

    def _count_artifact(self, run_id: str, uid: str, name: str) -> None:
        if self._additions is None:
            return
        folder = str(PurePosixPath(name).parent)
        if (run_id, folder) not in self._listed:
            listed = self._client.list_artifacts(run_id, None if folder == "." else folder)
            self._listed[run_id, folder] = {file.path for file in listed}
        if name not in self._listed[run_id, folder]:
            self._additions.artifacts.add((uid, name))

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


def _content(artifact: Drawn) -> bytes | None:
    try:
        return artifact.content()
    except Exception as error:  # whatever is in a curve or a record, the record of the study goes on
        logger.warning("%r is not drawn, its numbers are kept (%s: %s)", artifact.name, type(error).__name__, error)
        return None


def _size(run: Any) -> int:
    return len(run.data.metrics) + len(run.data.params)
