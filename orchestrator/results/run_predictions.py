"""Kept predictions of the runs of a configuration on one split, as arrays and as a data frame."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from orchestrator.export.columns import free_name
from orchestrator.record.kept_paths import predictions_file
from orchestrator.record.records import TrialRecord
from orchestrator.results.predictions import PredictionsError, output_matrix, read_predictions
from orchestrator.wording import listed
from trainables.specs.metrics import TEMPERATURE
from trainables.specs.suggestions import did_you_mean

logger = logging.getLogger("luthier")

COLUMNS = ("trial", "seed", "role", "name", "target", "target_label", "predicted", "predicted_label", "confidence")
"""Columns before the probabilities of the classes."""


@dataclass(frozen=True)
class RunPredictions:
    """Predictions of one run on the N samples of a split, in the order of the data store."""

    run: TrialRecord
    classes: tuple[str, ...]
    """K names, in the order of the logits."""
    names: Sequence[str]
    targets: NDArray[np.int64]
    """(N,)"""
    logits: NDArray[np.float64]
    """(N, K)"""

    def probabilities(self, temperature: float = 1.0) -> NDArray[np.float64]:
        """Softmax of the logits over a temperature, (N, K)."""
        scaled = self.logits / temperature
        exponentials = np.exp(scaled - scaled.max(1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(1, keepdims=True))

    @property
    def temperature(self) -> float | None:
        """Temperature that the run fitted on ID validation; None = not recorded."""
        return self.run.metric(TEMPERATURE.name)

    def to_frame(self) -> pd.DataFrame:
        """One row per sample, see `predictions_frame`."""
        probabilities = self.probabilities()
        # Of the logits: probabilities that round to the same number would tie.
        predicted = self.logits.argmax(1)
        values = {
            "trial": self.run.number,
            "seed": self.run.seed,
            "role": self.run.role,
            "name": self.names,
            "target": self.targets,
            "target_label": [self.classes[index] for index in self.targets],
            "predicted": predicted,
            "predicted_label": [self.classes[index] for index in predicted],
            "confidence": probabilities.max(1),
        }
        columns = {free_name(name, self.classes): values[name] for name in COLUMNS}
        return pd.concat([pd.DataFrame(columns), pd.DataFrame(probabilities, columns=list(self.classes))], axis=1)


def predictions_frame(predictions: Sequence[RunPredictions]) -> pd.DataFrame:
    """All rows below each other: `COLUMNS`, then the probability of every class under its name.

    A name that a class has as well gets underscores added.
    """
    return pd.concat([run.to_frame() for run in predictions], ignore_index=True)


def read_runs(
    runs: Sequence[TrialRecord], study: Path | None, entry: str, split: str, records: Iterable[TrialRecord] = ()
) -> list[RunPredictions]:
    """Kept predictions of runs on a split; of those that have none kept a warning is logged.

    Args:
        runs: of one configuration.
        study: folder of the study; None = not known.
        entry: label of the runs, for messages.
        split: `val`, `test` or `ood/<domain>`.
        records: of the study, to name the entries that have predictions.

    Raises:
        PredictionsError: none of the runs has predictions, or a file is damaged.
        ValueError: they have no such split.
    """
    kept = [run for run in runs if study is not None and predictions_file(study, run.number).exists()]
    if study is None or not kept:
        raise PredictionsError(_nothing_kept(runs, study, entry, records))
    lacking = [str(run.number) for run in runs if run not in kept]
    if lacking:
        logger.warning("No predictions are kept of trials %s of %s: they are left out.", ", ".join(lacking), entry)
    return [_read(run, predictions_file(study, run.number), entry, split) for run in kept]


def _read(run: TrialRecord, path: Path, entry: str, split: str) -> RunPredictions:
    table = read_predictions(path)
    in_file = table.column("split").to_pylist()
    splits = list(dict.fromkeys(in_file))
    if split not in splits:
        raise ValueError(
            f"A split of the predictions of {entry} is one of {', '.join(splits)}, but got {split!r}."
            f"{did_you_mean(split, splits)}"
        )
    rows = table.take(pa.array(np.flatnonzero(np.asarray(in_file) == split)))
    logits = output_matrix(rows).astype(np.float64)
    return RunPredictions(
        run=run,
        classes=_classes(table, path, logits.shape[1]),
        names=rows.column("name").to_pylist(),
        targets=np.asarray(rows.column("target"), np.int64),
        logits=logits,
    )


def _classes(table: pa.Table, path: Path, count: int) -> tuple[str, ...]:
    """Class names in the file's metadata.

    Raises:
        PredictionsError: there is not one for every logit.
    """
    try:
        classes = tuple(str(name) for name in json.loads((table.schema.metadata or {})[b"classes"]))
    except (KeyError, ValueError, TypeError) as error:
        raise PredictionsError(f"{path} must name the classes of its logits, but it does not ({error!r}).") from error
    if len(classes) != count:
        raise PredictionsError(f"{path} must name the class of each of {count} logits, but it names {len(classes)}.")
    return classes


def _nothing_kept(runs: Sequence[TrialRecord], study: Path | None, entry: str, records: Iterable[TrialRecord]) -> str:
    numbers = listed([str(run.number) for run in runs], most=10)
    head = f"Predictions of {entry} are read from its trials' kept files, but of trial {numbers} none are kept"
    if study is None:
        return f"{head}: the study's folder is not known. Read the results with `Study.results()`."
    others: dict[str, list[str]] = {}
    for record in records:
        if predictions_file(study, record.number).exists():
            others.setdefault(record.label, []).append(str(record.number))
    texts = [f"{label} (trial {listed(trials, most=10)})" for label, trials in others.items()]
    available = f"There are predictions of {', '.join(texts)}." if texts else "The study has none of any trial."
    return f"{head} in {study / 'predictions'}. {available} `keep: all` or `confirm` in the study file keeps more."
