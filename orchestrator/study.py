"""One study, from its file to its results.

spec → store → search → trial → record → MLflow → selection → results.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.study_file.load import load_study
from orchestrator.study_file.schema import StudySpec

if TYPE_CHECKING:
    from orchestrator.planning.plan import Plan
    from orchestrator.record.journal import Event
    from orchestrator.results.study_results import Results
    from trainables.data.store import Store

logger = logging.getLogger("luthier")


class Study:
    """One study: its specification and its folder.

    Args:
        fields: the keys of the study file (docs/study.md) as plain Python values.

    Raises:
        StudyError: unknown keys, values of another type or out of range; all at once.

    >>> study = Study(
    ...     name="pets",
    ...     data={"source": "digits"},
    ...     model={"name": "digits_vit"},
    ...     strategies=["linear_probe", "full"],
    ...     storage="/tmp/studies",
    ... )
    >>> study.folder
    PosixPath('/tmp/studies/pets')
    >>> Study(name="pets", data={"source": "digits"}, model={"name": "digits_vit"}, strategies=["ful"])
    Traceback (most recent call last):
    orchestrator.errors.StudyError: The study is not valid: strategies[0]: ... Did you mean 'full'?
    """

    def __init__(self, **fields: Any) -> None:
        self.spec = StudySpec.from_fields(fields)
        self._store: Store | None = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Study:
        """A study from its file; relative paths count from the file's own folder."""
        study = cls.__new__(cls)
        study.spec = load_study(path)
        study._store = None
        return study

    @property
    def folder(self) -> Path:
        """Folder of the study's journal, Optuna database, resolved spec and report."""
        return Path(self.spec.storage).absolute() / self.spec.name

    def plan(self) -> Plan:
        """What a run would do and cost; nothing is spent.

        Raises:
            PreflightError: the study cannot run here (unknown model, missing data, …).
        """
        from orchestrator.planning.plan import make_plan
        from orchestrator.planning.preflight import preflight

        preflight(self.spec)
        return make_plan(self.spec)

    def prepare(self, progress: bool = False) -> Store:
        """Check everything that needs no cluster, and read the data into the store (once).

        Args:
            progress: show the progress of reading on stderr.

        Raises:
            PreflightError: see `plan`.
            DataError: the data cannot be used.
        """
        if self._store is None:
            from orchestrator.ingest.pipeline import ingest
            from orchestrator.planning.build import ingest_request, make_built_in, model_of
            from orchestrator.planning.preflight import preflight
            from orchestrator.planning.view import recorded_choices, view_of
            from orchestrator.record.journal import Journal
            from orchestrator.running.progress import ingest_progress

            preflight(self.spec)
            journal = self.folder / "journal.jsonl"
            recorded = recorded_choices(Journal.read(journal)) if journal.exists() else None
            view = view_of(self.spec, recorded).config
            with ingest_progress() if progress else contextlib.nullcontext() as report:
                stores = Path(self.spec.storage).absolute() / "data"
                self._store = ingest(ingest_request(self.spec, view, recorded), stores, progress=report)
            make_built_in(model_of(self.spec))
        return self._store

    def run(self, progress: bool = True, allow_change: Collection[str] = ()) -> Results:
        """Run the study, or continue it, and return its results.

        Args:
            progress: show a live table (on a terminal) or a line per event on stderr.
            allow_change: keys that may differ from the last run although numbers depend on them, such as
                `search.batch_size`, `versions.torch` or `dataset_digest`; a key includes everything below it.

        Raises:
            ChangedStudyError: other keys differ.
        """
        from orchestrator.planning.build import make_task, stages_of
        from orchestrator.running.study_run import StudyRun

        store = self.prepare(progress)
        task = make_task(self.spec, store)
        stages = functools.partial(stages_of, self.spec, store=store)
        StudyRun(self.spec, self.folder, store, task, stages, progress=progress, allow_change=allow_change).run()
        events = read_journal(self.spec, self.folder)
        self._report(events)
        return self._results(events)

    def results(self) -> Results:
        """Leaderboard, best configuration and warnings, from the journal alone: no cluster, no tracking server.

        Raises:
            FileNotFoundError: the study has not been run.
        """
        return self._results(read_journal(self.spec, self.folder))

    def _results(self, events: list[Event]) -> Results:
        from orchestrator.record.records import fold, measurements
        from orchestrator.results.study_results import Results

        return Results(fold(events), self.spec, measurements=measurements(events), folder=self.folder)

    def _report(self, events: list[Event]) -> None:
        """Write the HTML page; failing to do so is only a warning, because the study's results are complete."""
        from orchestrator.report.page import REPORT, write_report

        try:
            write_report(events, self.folder / REPORT, self.folder)
        except Exception as error:
            logger.warning(
                "The report was not written (%s: %s). To write it again: luthier report %s",
                type(error).__name__, error, shlex.quote(str(self.folder)),
            )  # fmt: skip


def read_journal(spec: StudySpec, folder: Path) -> list[Event]:
    """All events of a study.

    Raises:
        FileNotFoundError: the study has not been run.
        JournalError: the journal is damaged.
    """
    from orchestrator.record.journal import Journal

    journal = folder / "journal.jsonl"
    if not journal.exists():
        raise FileNotFoundError(f"The study {spec.name!r} has no journal at {journal}. Start it with `luthier run`.")
    return Journal.read(journal)
