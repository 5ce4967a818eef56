"""How a finished run is told: its exit code, and what a person can do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.commands.console import FAILED, OK, PARTIAL
from orchestrator.errors import redact
from orchestrator.record.records import TrialRecord
from orchestrator.running.tracking_process import study_backlog
from orchestrator.tracking.study_tracking import backlog_text, how_to_sync

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.results.study_results import Results
    from orchestrator.study import Study


def outcome_code(records: Sequence[TrialRecord]) -> int:
    """0 when every trial did what it should, 3 when some failed, 1 when none was completed.

    A trial that an earlier driver left behind, and that this run did not want any more, has not failed.
    """
    if not any(record.state == "complete" for record in records):
        return FAILED
    return PARTIAL if any(record.state == "failed" and not record.unfinished for record in records) else OK


def finished(console: Console, study: Study, results: Results) -> None:
    """Print the leaderboard, and where everything lies."""
    results.render(console)
    lines = [f"Study folder: {study.folder}", *_report_line(study), *next_commands(study)]
    if missing := study_backlog(study.spec, study.folder):
        lines.append(f"{backlog_text(missing)}. {how_to_sync(study.spec, study.folder)}")
    for line in lines:
        console.print(redact(line), markup=False, highlight=False, soft_wrap=True)


def _report_line(study: Study) -> list[str]:
    from orchestrator.report.page import REPORT

    page = study.folder / REPORT
    return [f"Report: {page}"] if page.exists() else []


def next_commands(study: Study) -> list[str]:
    """Commands that open what the study left: MLflow and Optuna's dashboard."""
    uri = study.spec.tracking_uri
    if uri.startswith("http"):
        compare = f"Compare the runs in MLflow: {uri}, experiment {study.spec.experiment}"
    else:
        server = f"mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri {shlex.quote(uri)}"
        compare = f"Compare the runs in MLflow (http://127.0.0.1:5000): {server}"
    optuna = shlex.quote(f"sqlite:///{study.folder / 'optuna.db'}")
    return [compare, f"Look at the search (pip install 'luthier[dashboard]'): optuna-dashboard {optuna}"]
