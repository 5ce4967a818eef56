"""`luthier predict`: classes of new pictures by an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import Problem, StudyError
from orchestrator.export.domain_report import DomainReport, folder_classes, report
from orchestrator.export.model import load
from orchestrator.export.pictures import list_pictures
from orchestrator.export.predictions import SUFFIXES, Predictions, predict_pictures, predict_store
from orchestrator.ingest.errors import printable
from orchestrator.running.progress import ingest_progress
from orchestrator.wording import counted
from trainables.data.store import DATA, MANIFEST, Store

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Predicted:
    """Outcome of the command."""

    output: Path
    predictions: Predictions
    domain_report: DomainReport | None

    @property
    def complete(self) -> bool:
        """Whether every picture could be read."""
        return not self.predictions.unreadable

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows, as JSON values."""
        return {
            "output": str(self.output),
            "predicted": len(self.predictions.paths),
            "unreadable": [entry._asdict() for entry in self.predictions.unreadable],
            "ignored": [entry._asdict() for entry in self.predictions.ignored],
            "domain_report": None if self.domain_report is None else self.domain_report.to_dict(),
        }

    def render(self, console: Console) -> None:
        """Print what was left out, the report and the counts.

        What was left out has its reason; the counts are on the last line.
        """
        predictions = self.predictions
        lines = [f"Unreadable: {printable(entry.name)}: {entry.reason}" for entry in predictions.unreadable]
        lines += [f"Ignored: {printable(entry.name)}: {entry.reason}" for entry in predictions.ignored]
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if self.domain_report is not None:
            self.domain_report.render(console)
        summary = (
            f"Wrote {self.output}: {counted(len(predictions.paths), 'picture')} predicted, "
            f"{len(predictions.unreadable)} unreadable, {len(predictions.ignored)} ignored"
        )
        console.print(summary, markup=False, highlight=False, soft_wrap=True)


def predict(
    model_folder: Path,
    paths: Sequence[Path],
    output: Path,
    *,
    split: str,
    domain_report: bool,
    batch_size: int,
    progress: bool = True,
) -> Predicted:
    """Predict pictures and write the predictions.

    Args:
        model_folder: an exported model.
        paths: files and folders; or one data store.
        output: file to write, by its ending CSV or Parquet.
        split: of a data store.
        domain_report: compare with the true classes: the store's, or the names of the pictures' folders.
        batch_size: pictures per forward pass.
        progress: show it on stderr.

    Raises:
        StudyError: the output is no file that can be written.
        ModelFolderError: no exported model.
        DataError: see `list_pictures`, `predict_pictures` and `folder_classes`.
    """
    # Before the model is loaded and hours are spent.
    _check_output(output)
    model = load(model_folder)
    if len(paths) == 1 and _is_store(paths[0]):
        predictions = predict_store(model, Store(paths[0]), split, batch_size)
        labels: Sequence[str] = predictions.labels or ()
    else:
        listing = list_pictures(paths)
        class_of = folder_classes(listing, model.classes) if domain_report else {}
        with ingest_progress() as shown:
            predictions = predict_pictures(model, listing, batch_size, shown if progress else None)
        labels = [class_of.get(path, "") for path in predictions.paths]
    predictions.write(output)
    return Predicted(output, predictions, report(predictions, labels) if domain_report else None)


def _is_store(path: Path) -> bool:
    return (path / DATA).is_file() and (path / MANIFEST).is_file()


def _check_output(output: Path) -> None:
    problem = ""
    if output.suffix.lower() not in SUFFIXES:
        problem = f"it must end in {' or '.join(SUFFIXES)}, but got {output.name!r}"
    elif not output.absolute().parent.is_dir():
        problem = f"its folder must exist, but {output.absolute().parent} does not. Create it first"
    elif output.is_dir():
        problem = f"it must be a file, but {output} is a folder"
    if problem:
        raise StudyError([Problem(("output",), f"{problem}.")], "The command", "cannot write its predictions")
