"""Predictions of an exported model: a row per picture, found by its path and with classes by their names."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from orchestrator.export.columns import free_name
from orchestrator.export.pictures import Listing, Progress, decoded
from orchestrator.ingest.errors import DataError, first_few, printable
from orchestrator.ingest.source import SkippedEntry
from trainables.storage.atomic_files import atomic_file

if TYPE_CHECKING:
    from trainables.data.store import Store
    from trainables.models.backbone import DataConfig

SUFFIXES = (".csv", ".parquet")
"""Endings of files that predictions are written to."""


class Classifier(Protocol):
    """The part of `orchestrator.export.model.Model` that predictions need."""

    classes: tuple[str, ...]
    preprocessing: DataConfig

    def logits(self, pixels: NDArray[np.uint8], batch_size: int, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Predictions:
    """Probabilities of pictures, and the pictures that have none."""

    paths: list[str]
    probabilities: NDArray[np.float64]
    """(n, K), each row adds up to 1."""
    classes: tuple[str, ...]
    labels: list[str] | None = None
    """True classes, where they are part of the data."""
    unreadable: list[SkippedEntry] = field(default_factory=list)
    ignored: list[SkippedEntry] = field(default_factory=list)

    @classmethod
    def of(cls, model: Classifier, paths: Sequence[str], logits: NDArray[np.float32], **others: Any) -> Predictions:
        """Predictions from logits (n, K)."""
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True, initial=-np.inf)
        exponentials = np.exp(shifted)
        return cls(list(paths), exponentials / exponentials.sum(1, keepdims=True), model.classes, **others)

    def predicted(self) -> list[str]:
        """The most probable class of each picture; of equal ones the first."""
        return [self.classes[index] for index in self.probabilities.argmax(1)]

    def columns(self) -> tuple[str, str, str]:
        """Names of the columns for path, predicted class and its probability: `path`, `class` and `confidence`, with
        underscores added where a class has that name."""
        path, prediction, confidence = (free_name(name, self.classes) for name in ("path", "class", "confidence"))
        return path, prediction, confidence

    def to_frame(self) -> pd.DataFrame:
        """The rows: `columns()`, then the probability of every class under its name, in the order of the logits."""
        path, prediction, confidence = self.columns()
        frame = pd.DataFrame({path: self.paths, prediction: self.predicted(), confidence: self._confidence()})
        return pd.concat([frame, pd.DataFrame(self.probabilities, columns=list(self.classes))], axis=1)

    def write(self, path: Path) -> None:
        """Write the rows as CSV (UTF-8, quoted where needed) or Parquet, by the file's ending; atomically.

        Raises:
            OSError: the disk refused a write; an earlier file is unchanged.
        """
        with atomic_file(path) as temporary:
            if path.suffix.lower() == ".parquet":
                self._write_parquet(temporary)
            else:
                self._write_csv(temporary)

    def _confidence(self) -> NDArray[np.float64]:
        return np.asarray(self.probabilities.max(1, initial=0.0))

    def _write_csv(self, path: Path) -> None:
        rows = zip(self.paths, self.predicted(), self._confidence().tolist(), self.probabilities.tolist(), strict=True)
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*self.columns(), *self.classes])
            # `repr` of a float is the shortest text that gives the same float again.
            writer.writerows([name, top, repr(most), *map(repr, values)] for name, top, most, values in rows)

    def _write_parquet(self, path: Path) -> None:
        names = [*self.columns(), *self.classes]
        arrays = [pa.array(self.paths, pa.string()), pa.array(self.predicted(), pa.string())]
        arrays += [pa.array(self._confidence()), *(pa.array(column) for column in self.probabilities.T.copy())]
        parquet.write_table(pa.table(arrays, names=names), path)


def predict_pictures(
    model: Classifier, listing: Listing, batch_size: int, progress: Progress | None = None
) -> Predictions:
    """Predictions for pictures, in their order.

    Args:
        batch_size: pictures per forward pass; it changes nothing else.

    Raises:
        DataError: no picture can be read.
    """
    names: list[str] = []
    logits: list[NDArray[np.float32]] = []
    unreadable: list[SkippedEntry] = []
    for chunk in decoded(listing.pictures, model.preprocessing, progress):
        names += chunk.names
        logits.append(model.logits(chunk.pixels, batch_size))
        unreadable += chunk.unreadable
    if not names:
        raise DataError(
            f"At least one picture must be readable, but none of {len(listing.pictures)} is: {describe(unreadable)}."
        )
    return Predictions.of(model, names, np.concatenate(logits), unreadable=unreadable, ignored=listing.ignored)


def predict_store(model: Classifier, store: Store, split: str, batch_size: int) -> Predictions:
    """Predictions for one split of a data store, with its labels.

    Raises:
        ValueError: no such split.
        DataError: the store's pictures are of another size or were resized in another way than the model's.
    """
    side = model.preprocessing.stored_size
    if store.image_size != side:
        raise DataError(
            f"A data store for this model has pictures of {side} pixels, but {store.path} has {store.image_size}. "
            "Predict the pictures themselves."
        )
    request = store.manifest.get("request") or {}
    interpolation = request.get("interpolation", model.preprocessing.interpolation)
    if interpolation != model.preprocessing.interpolation:
        raise DataError(
            f"A data store for this model was made with {model.preprocessing.interpolation} interpolation, but "
            f"{store.path} with {interpolation}. Predict the pictures themselves."
        )
    labels = [store.classes[index] for index in store.labels(split)]
    logits = model.logits(store.images(split), batch_size)
    return Predictions.of(model, store.names(split), logits, labels=labels)


def refuse_unreadable(unreadable: Sequence[SkippedEntry]) -> None:
    """Raise DataError if there are unreadable pictures."""
    if unreadable:
        raise DataError(
            f"Every picture must be readable, but {len(unreadable)} cannot be used: {describe(unreadable)}. Leave them "
            "out, or use `luthier predict`, which lists them."
        )


def describe(entries: Sequence[SkippedEntry]) -> str:
    """The first entries with their reasons."""
    return first_few(f"{printable(entry.name)} ({entry.reason})" for entry in entries)
