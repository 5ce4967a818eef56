"""Tracking of a running study: joins the delivery (`orchestrator.tracking`) with the summaries of its results.

As a program (`python -m orchestrator.running.tracking_process`), the process that delivers to MLflow.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.tracking import study_tracking
from orchestrator.tracking.process import TrackingProcess, serve
from orchestrator.tracking.projection import DeliveryCounts

if TYPE_CHECKING:
    from orchestrator.record.journal import Journal
    from orchestrator.results.summary import Summarizer
    from orchestrator.study_file.schema import StudySpec

MODULE = "orchestrator.running.tracking_process"


def summarizer(all_pictures: bool = False) -> Summarizer:
    """Summaries of results and report for the tracked runs (argument: see `orchestrator.results.summary`)."""
    from orchestrator.report.page import REPORT, artifacts_of
    from orchestrator.results.summary import Summarizer

    return Summarizer({REPORT: artifacts_of}, all_pictures)


def follow(spec: StudySpec, journal: Journal | Path) -> AbstractContextManager[TrackingProcess]:
    """Deliver a study's journal to its tracking server, for the length of a block."""
    return study_tracking.follow(spec, journal, summarizer(), MODULE)


def study_backlog(spec: StudySpec, folder: Path) -> DeliveryCounts:
    """What a study's own tracking server lacks of its journal.

    As far as its folder shows.
    """
    return study_tracking.study_backlog(spec, folder, summarizer())


if __name__ == "__main__":
    serve(summarizer())
