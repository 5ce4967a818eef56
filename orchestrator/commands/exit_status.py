"""Exit status of every command, and the next steps that are printed after a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from orchestrator.errors import StudyError, Terminated, redact
from orchestrator.export.errors import RefusedExportError

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.record.records import TrialRecord
    from orchestrator.results.study_results import Results
    from orchestrator.study import Study

OK = 0
FAILED = 1
USAGE = 2
"""The command line or the study file is wrong."""
PARTIAL = 3
"""Some trials failed."""
PREFLIGHT = 4
"""The study cannot run here."""
INTERRUPTED = 130
"""128 + SIGINT."""
TERMINATED = 143
"""128 + SIGTERM."""

PREFLIGHT_ERRORS = frozenset(
    {
        "orchestrator.errors.PreflightError",
        "orchestrator.ingest.errors.DataError",
        "trainables.data.store.StoreError",
        "orchestrator.cluster.auth.ClusterError",
        "orchestrator.cluster.resources.ResourceError",
        "orchestrator.export.errors.ModelFolderError",
    }
)
"""Classes by name, because importing their modules takes seconds (torch, ray)."""


def of_error(error: BaseException) -> int:
    """The exit status of a command that ended with this error."""
    if isinstance(error, Terminated):
        return TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    class_names = {f"{class_.__module__}.{class_.__qualname__}" for class_ in type(error).__mro__}
    if class_names & PREFLIGHT_ERRORS:
        return PREFLIGHT
    return USAGE if isinstance(error, StudyError | FileExistsError | RefusedExportError) else FAILED


def of_trials(records: Sequence[TrialRecord]) -> int:
    """The exit status of a run: 0 if no trial failed, 3 if some did, 1 if none is complete.

    A trial that was left unfinished by an earlier run, and that this one no longer needs, has not failed.
    """
    if not any(record.state == "complete" for record in records):
        return FAILED
    if any(record.state == "failed" and not record.unfinished for record in records):
        return PARTIAL
    return OK


def worst(statuses: Iterable[int]) -> int:
    """The exit status of several studies: FAILED before PARTIAL before OK.

    >>> worst([OK, PARTIAL]), worst([PARTIAL, FAILED])
    (3, 1)
    """
    all_statuses = set(statuses)
    if FAILED in all_statuses:
        return FAILED
    return PARTIAL if PARTIAL in all_statuses else OK


def print_summary(console: Console, study: Study, results: Results) -> None:
    """Print the leaderboard, the paths of a study's files, and the next commands."""
    from orchestrator.report.page import REPORT
    from orchestrator.running.tracking_process import study_backlog
    from orchestrator.tracking.study_tracking import backlog_text, how_to_sync

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
    """Commands that show a study in MLflow and in Optuna's dashboard."""
    uri = study.spec.tracking_uri
    if uri.startswith("http"):
        compare = f"Compare the runs in MLflow: {uri}, experiment {study.spec.experiment}"
    else:
        server = f"mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri {shlex.quote(uri)}"
        compare = f"Compare the runs in MLflow (http://127.0.0.1:5000): {server}"
    optuna = shlex.quote(f"sqlite:///{study.folder / 'optuna.db'}")
    return [compare, f"Inspect the search (pip install 'luthier[dashboard]'): optuna-dashboard {optuna}"]
