"""A whole study on one page: spec → store → search → trial → record → MLflow → selection → results."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.study_file.spec import StudySpec, load_study

if TYPE_CHECKING:
    from orchestrator.planning.plan import Plan
    from orchestrator.record.journal import Event
    from orchestrator.results.study_results import Results
    from trainables.data.store import Store

logger = logging.getLogger("luthier")


class Study:
    """One study: what a study file says, and the folder where everything about it is kept.

    Args:
        fields: the keys of the study file (docs/study.md) as plain Python values.

    Raises:
        StudyError: unknown keys, wrong types and impossible values, all at once.
    """

    def __init__(self, **fields: Any) -> None:
        self.spec = StudySpec.from_fields(fields)
        self._store: Store | None = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Study:
        """Read a study file; relative paths in it are taken from the file's own folder."""
        study = cls.__new__(cls)
        study.spec = load_study(path)
        study._store = None
        return study

    @property
    def folder(self) -> Path:
        """Where the study keeps its journal, Optuna database, resolved spec and report."""
        return Path(self.spec.storage).absolute() / self.spec.name

    def plan(self) -> Plan:
        """What a run would do and cost; spends nothing.

        Raises:
            StudyError: the study could not run (unknown model, missing data, …).
        """
        from orchestrator.planning.plan import make_plan
        from orchestrator.planning.preflight import preflight

        preflight(self.spec)
        return make_plan(self.spec)

    def prepare(self, progress: bool = False) -> Store:
        """Check everything that can be checked without a cluster and read the data into the store (once).

        Args:
            progress: show on stderr how far reading is.
        """
        if self._store is None:
            from orchestrator.ingest.pipeline import ingest
            from orchestrator.planning.build import ingest_request, make_built_in, model_of
            from orchestrator.planning.preflight import preflight
            from orchestrator.running.progress import shown

            preflight(self.spec)
            with shown() if progress else contextlib.nullcontext() as report:
                place = Path(self.spec.storage).absolute() / "data"
                self._store = ingest(ingest_request(self.spec), place, progress=report)
            make_built_in(model_of(self.spec))
        return self._store

    def run(self, progress: bool = True, allow_change: Collection[str] = ()) -> Results:
        """Run the study, or continue it, and return its results.

        Args:
            progress: show a live table (on a terminal) or a line per event on stderr.
            allow_change: keys that may differ from the last run although numbers depend on them, such as
                `search.batch_size`, `versions.torch` or `dataset_digest`; a key covers everything below it.

        Raises:
            ChangedStudyError: others differ.
        """
        from orchestrator.planning.build import make_task
        from orchestrator.running.study_run import Drive

        store = self.prepare(progress)
        task = make_task(self.spec, store)
        Drive(self.spec, self.folder, store, task, progress, allow_change=allow_change).run()
        events = self._events()
        self._report(events)
        return self._results(events)

    def results(self) -> Results:
        """Leaderboard, best configuration and warnings, from the journal alone: no cluster, no tracking server.

        Raises:
            FileNotFoundError: the study has not been run.
        """
        return self._results(self._events())

    def _events(self) -> list[Event]:
        from orchestrator.record.journal import Journal

        journal = self.folder / "journal.jsonl"
        if not journal.exists():
            raise FileNotFoundError(f"The study {self.spec.name!r} has no journal at {journal}. Run it first.")
        return Journal.read(journal)

    def _results(self, events: list[Event]) -> Results:
        from orchestrator.record.records import fold, measurements
        from orchestrator.results.study_results import Results

        return Results(fold(events), self.spec, measurements=measurements(events))

    def _report(self, events: list[Event]) -> None:
        """A page that cannot be made is a warning: it is no reason to lose the results of a study."""
        from orchestrator.report.page import REPORT, write_report

        try:
            write_report(events, self.folder / REPORT)
        except Exception as error:
            logger.warning(
                "The report was not written (%s: %s). Make it again: luthier report %s",
                type(error).__name__, error, shlex.quote(str(self.folder)),
            )  # fmt: skip
