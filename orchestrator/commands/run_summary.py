"""Leaderboard, paths and next commands that are printed after a run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from orchestrator.errors import redact
from orchestrator.report.page import REPORT
from orchestrator.running.tracking_process import study_backlog
from orchestrator.tracking.study_tracking import backlog_text, how_to_sync

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.results.study_results import Results
    from orchestrator.study import Study


def print_summary(console: Console, study: Study, results: Results) -> None:
    """Print the leaderboard, the paths of a study's files, and the next commands."""
    results.render(console)
    lines = [f"Study folder: {study.folder}"]
    report = study.folder / REPORT
    if report.exists():
        lines.append(f"Report: {report}")
    lines += next_commands(study)
    backlog = study_backlog(study.spec, study.folder)
    if backlog:
        lines.append(f"{backlog_text(backlog)}. {how_to_sync(study.spec, study.folder)}")
    for line in lines:
        console.print(redact(line), markup=False, highlight=False, soft_wrap=True)


def next_commands(study: Study) -> list[str]:
    """Commands that export the chosen model, and that show a study in MLflow and in Optuna's dashboard."""
    export = f"luthier export {shlex.quote(str(study.folder))} --to model"
    uri = study.spec.tracking_uri
    if uri.startswith("http"):
        compare = f"Compare the runs in MLflow: {uri}, experiment {study.spec.experiment}"
    else:
        server = f"mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri {shlex.quote(uri)}"
        compare = f"Compare the runs in MLflow (http://127.0.0.1:5000): {server}"
    optuna = shlex.quote(f"sqlite:///{study.folder / 'optuna.db'}")
    return [
        f"Export the chosen model: {export}",
        compare,
        f"Inspect the search (pip install 'luthier[dashboard]'): optuna-dashboard {optuna}",
    ]
