"""`luthier predict`: classes of new pictures, or their masks, by an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import Problem, StudyError
from orchestrator.export.domain_report import DomainReport, folder_classes, report
from orchestrator.export.model import BATCH_SIZE, Model, load
from orchestrator.export.pictures import list_pictures
from orchestrator.export.predicted_masks import (
    LABELS,
    PredictedMasks,
    meaning_of_values,
    predict_masks,
    predict_store_masks,
    to_values,
)
from orchestrator.export.predictions import SUFFIXES, Predictions, predict_pictures, predict_store
from orchestrator.export.segmentation_model import BATCH_SIZE as MASK_BATCH
from orchestrator.export.segmentation_model import SegmentationModel
from orchestrator.ingest.errors import printable
from orchestrator.running.progress import ingest_progress
from orchestrator.wording import counted
from trainables.data.store import DATA, MANIFEST, Store
from trainables.specs.metrics import TEST

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


@dataclass(frozen=True)
class PredictedFolder:
    """Outcome of the command for a segmentation model."""

    folder: Path
    masks: PredictedMasks
    classes: tuple[str, ...]
    values: str
    """What the values of the masks are, in a sentence."""

    @property
    def complete(self) -> bool:
        """Whether every picture could be read."""
        return not self.masks.unreadable

    def to_dict(self) -> dict[str, Any]:
        """Everything but the masks, as JSON values."""
        return {"output": str(self.folder), "values": self.values, **to_values(self.masks, self.classes)}

    def render(self, console: Console) -> None:
        """Print what was left out with its reason, the share of every class, and the counts on the last line."""
        masks = self.masks
        lines = [f"Unreadable: {printable(entry.name)}: {entry.reason}" for entry in masks.unreadable]
        lines += [f"Ignored: {printable(entry.name)}: {entry.reason}" for entry in masks.ignored]
        total = max(1, masks.pixels.total())
        for index, name in enumerate(self.classes):
            if masks.pixels[index]:
                lines.append(f"  {index} {printable(name)}: {masks.pixels[index] / total:.2%} of the pixels")
        lines.append(f"{self.values} {LABELS} has their names.")
        lines.append(
            f"Wrote {self.folder}: {counted(len(masks.names), 'mask')}, {len(masks.unreadable)} unreadable, "
            f"{len(masks.ignored)} ignored"
        )
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def predict(
    model_folder: Path,
    paths: Sequence[Path],
    output: Path | None,
    *,
    to: Path | None = None,
    overlay: bool = False,
    split: str = TEST,
    domain_report: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
) -> Predicted | PredictedFolder:
    """Predict pictures and write the predictions.

    Args:
        model_folder: an exported model.
        paths: files and folders; or one data store.
        output: of a classifier: file to write, by its ending CSV or Parquet.
        to: of a segmentation model: folder to write, new or empty.
        overlay: also write pictures under the colours of their classes.
        split: of a data store.
        domain_report: compare with the true classes: the store's, or the names of the pictures' folders.
        batch_size: pictures or views per forward pass; None = that of the model's kind.
        progress: show it on stderr.

    Raises:
        StudyError: the output cannot be written, or is none of this model's.
        ModelFolderError: no exported model.
        DataError: see `list_pictures`, `predict_pictures`, `predict_masks` and `folder_classes`.
    """
    # Before the model is loaded and hours are spent.
    if output is not None:
        _check_output(output)
    if to is not None:
        _check_folder(to)
    model = load(model_folder)
    if isinstance(model, SegmentationModel):
        if to is None or output is not None or domain_report:
            raise _cannot_write(
                "to",
                "a segmentation model writes masks into a folder, so give --to DIR, and neither --output nor "
                "--domain-report",
            )
        return _masks(model, paths, to, split, overlay, batch_size or MASK_BATCH, progress)
    if output is None or to is not None or overlay:
        raise _cannot_write(
            "output", "a classifier writes a table, so give --output FILE, and neither --to nor --overlay"
        )
    return _classes(model, paths, output, split, domain_report, batch_size or BATCH_SIZE, progress)


def _masks(
    model: SegmentationModel,
    paths: Sequence[Path],
    folder: Path,
    split: str,
    overlay: bool,
    batch_size: int,
    progress: bool,
) -> PredictedFolder:
    if len(paths) == 1 and _is_store(paths[0]):
        store = Store(paths[0])
        masks = predict_store_masks(model, store, split, folder, overlay=overlay, batch_size=batch_size)
    else:
        listing = list_pictures(paths)
        with ingest_progress() as shown:
            masks = predict_masks(
                model, listing, folder, overlay=overlay, batch_size=batch_size, progress=shown if progress else None
            )
    return PredictedFolder(folder, masks, model.classes, meaning_of_values(model))


def _classes(
    model: Model,
    paths: Sequence[Path],
    output: Path,
    split: str,
    domain_report: bool,
    batch_size: int,
    progress: bool,
) -> Predicted:
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
        raise _cannot_write("output", problem)


def _check_folder(folder: Path) -> None:
    problem = ""
    if not folder.absolute().parent.is_dir():
        problem = f"its folder must exist, but {folder.absolute().parent} does not. Create it first"
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        problem = f"masks are written into a new or empty folder, but {folder} exists. Choose another"
    if problem:
        raise _cannot_write("to", problem)


def _cannot_write(option: str, problem: str) -> StudyError:
    return StudyError([Problem((option,), f"{problem}.")], "The command", "cannot write its predictions")
