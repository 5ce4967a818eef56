"""Tracking of one study: settings from its study file, delivery beside its run, messages about its backlog."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import redact
from orchestrator.record.records import metrics_of
from orchestrator.tracking.client import sqlite_path
from orchestrator.tracking.follower import FollowerSettings
from orchestrator.tracking.process import TrackingProcess
from orchestrator.tracking.projection import DeliveryCounts, backlog
from orchestrator.tracking.run_update import Summarizer
from trainables.specs.metrics import task_metrics

if TYPE_CHECKING:
    from orchestrator.record.journal import Journal
    from orchestrator.study_file.schema import StudySpec

logger = logging.getLogger("luthier")

CLOSING_TIMEOUT_S = 60.0
"""Wait, at the end of a study, for a tracking server that is behind and accepts what it is sent."""
INTERRUPTED_TIMEOUT_S = 4.0
"""The same after Ctrl-C or SIGTERM: a preempted machine has little time left."""


def settings_of(spec: StudySpec, journal: Path, uri: str | None = None, **changes: Any) -> FollowerSettings:
    """Settings of the delivery that a study file asks for (`tracking.uri`, `tracking.experiment`).

    A SQLite file has its artifacts in `mlartifacts` beside it.

    Args:
        uri: another tracking URI than the study's.
        changes: other fields of the settings.
    """
    target = uri or spec.tracking_uri
    database = sqlite_path(target)
    settings = FollowerSettings(
        journal=str(Path(journal).absolute()),
        uri=target,
        experiment=spec.experiment,
        study=spec.name,
        artifact_location=None if database is None else (database.parent / "mlartifacts").as_uri(),
        # The task's own table: the metric that selects is read from the study file.
        task=task_metrics(metrics_of(spec).task).to_dict(),
        predictions=spec.tracking.predictions,
        registered_model=spec.tracking.registered_model,
    )
    return dataclasses.replace(settings, **changes)


@contextlib.contextmanager
def follow(spec: StudySpec, journal: Journal | Path, summarizer: Summarizer, module: str) -> Iterator[TrackingProcess]:
    """Deliver a study's journal from a process of its own, for the length of a block.

    What could not be delivered at the end is logged with the command that delivers it.

    Args:
        module: entry point of the process.
    """
    path = journal if isinstance(journal, Path) else journal.path
    process = TrackingProcess(settings_of(spec, path), module).start()
    timeout_s = CLOSING_TIMEOUT_S
    try:
        yield process
    except KeyboardInterrupt:
        timeout_s = INTERRUPTED_TIMEOUT_S
        raise
    finally:
        if process.close(timeout_s):
            uploads = process.settings.uploads
            counts = backlog(path.absolute(), process.delivered_offset, spec.name, summarizer, uploads)
            reason = process.problem or "it is slow"
            logger.warning("%s (%s). %s", backlog_text(counts), reason, how_to_sync(spec, path.parent))


def study_backlog(spec: StudySpec, folder: Path, summarizer: Summarizer) -> DeliveryCounts:
    """What a study's own tracking server lacks of its journal, as far as its folder shows."""
    settings = settings_of(spec, folder / "journal.jsonl")
    offset = settings.position_file().load(settings.path).offset
    return backlog(settings.path, offset, spec.name, summarizer, settings.uploads)


def backlog_text(counts: DeliveryCounts) -> str:
    """First sentence about a backlog, without its full stop."""
    return f"MLflow lacks {counts or 'the latest states'} of this study"


def how_to_sync(spec: StudySpec, folder: Path) -> str:
    """Instruction to deliver a backlog."""
    return f"Nothing is lost: the journal keeps them. Deliver them later: {sync_command(spec, folder)}"


def sync_command(spec: StudySpec, folder: Path) -> str:
    """Command that delivers a study.

    The copy of a study file in the study's folder has no passwords: a URI with one needs the study file itself.
    """
    uri = spec.tracking.uri
    if uri is not None and redact(uri) != uri:
        return "luthier sync STUDY.yaml (the study file: its tracking URI holds a password)"
    return f"luthier sync {shlex.quote(str(folder))}"
