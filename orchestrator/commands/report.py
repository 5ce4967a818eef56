"""`luthier report`: a study as one HTML page, with its features compared where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from orchestrator.commands.status import find_study, read_journal
from orchestrator.ingest.errors import DataError
from orchestrator.record.kept_paths import predictions_file
from orchestrator.record.records import fold, measurements, study_header
from orchestrator.report.error_section import representatives
from orchestrator.report.features import FeatureSimilarities, Progress, similarities
from orchestrator.report.page import REPORT, write_report
from orchestrator.report.similarity import FeatureSimilarity
from orchestrator.report.thumbnails import find_store
from orchestrator.results.study_results import Results

Features = Literal["chosen", "all"]
"""Entries whose features are compared with the pretrained network's."""


@dataclass(frozen=True)
class Reported:
    """Outcome of the command."""

    file: Path
    measured: list[str] = field(default_factory=list)
    """Trials whose features were compared."""
    problems: list[str] = field(default_factory=list)
    """Why those of others were not."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"report": str(self.file), "features": self.measured, "problems": self.problems}

    def render(self, console: Console) -> None:
        """Print the problems, and the file on the last line."""
        for line in [*self.problems, f"Wrote {self.file}"]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def report_study(
    study: Path, output: Path | None = None, features: Features | None = None, progress: bool = True
) -> Reported:
    """Write the page of a study.

    Args:
        study: study file or folder.
        output: file to write; None = `report.html` in the folder.
        features: compare the features of these entries before and after fine-tuning; None = of none.
        progress: show that of the comparison on stderr.

    Raises:
        FileNotFoundError: the study has not been run.
        DataError: features are to be compared, and the study's data store is gone.
        ValueError: features are to be compared, and no trial is complete.
    """
    spec, folder = find_study(study)
    events = read_journal(spec, folder)
    file = output or folder / REPORT
    if features is None:
        write_report(events, file, folder)
        return Reported(file)
    header = study_header(events)
    fields = {**(header.get("spec") or {}), "name": header.get("study")}
    trials = representatives(Results(fold(events), fields, measurements=measurements(events), folder=folder))
    records = list(trials.values())[: 1 if features == "chosen" else None]
    digest = str(header.get("dataset_digest"))
    store = find_store(folder, digest)
    if store is None:
        raise DataError(
            f"Features are compared on the pictures of the study's data store, of SHA-256 {digest[:12]}…, but "
            f"{folder.parent / 'data'} has no such store. `luthier run` reads the data again, if they have not changed."
        )
    shown = [record for record in records if predictions_file(folder, record.number).exists()]
    measured: dict[int, FeatureSimilarity | str] = {
        record.number: "its predictions, which name the pictures, are not kept." for record in records
    }
    with _feature_progress() as report:
        measured |= similarities(shown, FeatureSimilarities(folder, store, progress=report if progress else None))
    write_report(events, file, folder, measured)
    names = {record.number: f"trial {record.number}, {record.label}" for record in records}
    return Reported(
        file,
        [names[number] for number, value in measured.items() if isinstance(value, FeatureSimilarity)],
        [f"Features of {names[number]}: {value}" for number, value in measured.items() if isinstance(value, str)],
    )


@contextmanager
def _feature_progress() -> Iterator[Progress]:
    """A bar per network on stderr; a line per network where that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:

        def in_lines(what: str, done: int, total: int) -> None:
            if done == total:
                console.print(f"features of the {what}: {total} images", markup=False, highlight=False)

        yield in_lines
        return
    bars: dict[str, TaskID] = {}
    columns = (TextColumn("features of the {task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, TimeRemainingColumn(), console=console) as bar:

        def on_bars(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = bar.add_task(what, total=total)
            bar.update(bars[what], completed=done)

        yield on_bars
