"""Files of predictions, as a trial writes them, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestrator.record.kept_paths import predictions_file

Correct = NDArray[np.bool_]


def write_predictions(
    study: Path, number: int, correct: Mapping[str, Correct], targets: Mapping[str, Sequence[int]] | None = None
) -> Path:
    """A file of predictions of two classes.

    Args:
        correct: split → (n,) whether each sample is classified correctly.
        targets: split → (n,) classes; by default all are 0.
    """
    splits: list[str] = []
    names: list[str] = []
    labels: list[int] = []
    for split, values in correct.items():
        splits += [split] * len(values)
        names += [f"{split}-{index}.png" for index in range(len(values))]
        labels += list(targets[split]) if targets else [0] * len(values)
    right = np.concatenate(list(correct.values()))
    predicted = np.where(right, labels, 1 - np.asarray(labels))
    logits = np.eye(2, dtype=np.float32)[predicted]
    columns: dict[str, Any] = {
        "split": pa.array(splits).dictionary_encode(),
        "name": pa.array(names),
        "target": pa.array(labels, pa.int64()),
        "output": pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), 2),
        "stat/correct": pa.array(right),
    }
    table = pa.table(columns).replace_schema_metadata({"number": str(number), "classes": json.dumps(["a", "b"])})
    path = predictions_file(study, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def correctness(samples: int, wrong: Sequence[int] | range = ()) -> Correct:
    """All samples correct but those of these indices."""
    values = np.ones(samples, np.bool_)
    values[list(wrong)] = False
    return values
