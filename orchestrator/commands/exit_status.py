"""Exit status of every command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from orchestrator.errors import StudyError, Terminated
from orchestrator.export.errors import RefusedExportError

if TYPE_CHECKING:
    from orchestrator.record.records import TrialRecord

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
    """The exit status of a run.

    0 if no trial failed, 3 if some did, 1 if none is complete. A trial that was left unfinished by an earlier run, and
    that this one no longer needs, has not failed.
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
