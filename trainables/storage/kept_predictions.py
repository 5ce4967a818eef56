"""Kept predictions of a finished trial.

Outputs and targets of every evaluated sample, as one Arrow IPC file. Rows are in the order of the data store, split by
split: `split` (dictionary of strings: `val`, `test`, `ood/<domain>`), `name` (string), `target` (int64) and `output`
(fixed-size list of K float32) where the task keeps them, and `stat/<key>` for each statistic of a sample
(`trainables.tasks.base.MetricAccumulator.per_sample`). The schema's metadata name the trial. Written atomically.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainables.specs.fault_injection import fault_point
from trainables.storage.atomic_files import atomic_file
from trainables.storage.file_identity import FileIdentity, HashedFile

if TYPE_CHECKING:
    import pyarrow as pa

STATISTIC = "stat/"
"""Beginning of the names of the samples' statistics."""


@dataclass(frozen=True)
class SplitPredictions:
    """Predictions on the N samples of one split, in the store's order."""

    names: Sequence[str]
    targets: NDArray[np.int64] | None
    """(N,); None = the task does not keep them."""
    outputs: NDArray[np.float32] | None
    """(N, K), for classification logits; None = the task does not keep them."""
    statistics: Mapping[str, NDArray[Any] | list[bytes]]
    """(N,), (N, m) or the content of N files, by name."""


def save_predictions(path: str | Path, splits: Mapping[str, SplitPredictions], meta: Mapping[str, Any]) -> FileIdentity:
    """Write predictions atomically, in place of those of an earlier attempt.

    Args:
        splits: by name, in the order of the rows.
        meta: of the trial, for the schema's metadata; values that are no strings are stored as JSON.

    Raises:
        OSError: the disk refused a write.
        ModuleNotFoundError: pyarrow is not installed.
    """
    import pyarrow as pa

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}-*"):  # of an attempt whose process was killed
        leftover.unlink(missing_ok=True)
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in meta.items()}
    table = _table(splits).replace_schema_metadata(metadata)
    with atomic_file(target) as partial:
        with partial.open("wb") as file:
            hashed = HashedFile(file)
            with pa.ipc.new_file(pa.PythonFile(hashed, mode="w"), table.schema) as writer:
                writer.write_table(table)
        fault_point("in_predictions")
    return hashed.identity


def _table(splits: Mapping[str, SplitPredictions]) -> pa.Table:
    import pyarrow as pa

    counts = [len(split.names) for split in splits.values()]
    codes = np.repeat(np.arange(len(splits), dtype=np.int32), counts)
    columns: dict[str, Any] = {
        "split": pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(list(splits), pa.string())),
        "name": pa.array([name for split in splits.values() for name in split.names], pa.string()),
    }
    targets = [split.targets for split in splits.values() if split.targets is not None]
    outputs = [split.outputs for split in splits.values() if split.outputs is not None]
    if targets:
        columns["target"] = pa.array(np.concatenate(targets), pa.int64())
    if outputs:
        columns["output"] = _rows(np.concatenate(outputs))
    # All splits have the statistics of the same task.
    for key in next(iter(splits.values())).statistics:
        columns[f"{STATISTIC}{key}"] = _column([split.statistics[key] for split in splits.values()])
    return pa.table(columns)


def _column(parts: Sequence[NDArray[Any] | list[bytes]]) -> pa.Array:
    """A statistic of all splits below each other."""
    import pyarrow as pa

    arrays = [part for part in parts if not isinstance(part, list)]
    if arrays:
        return _rows(np.concatenate(arrays))
    return pa.array([content for part in parts for content in part], pa.binary())


def _rows(values: NDArray[Any]) -> pa.Array:
    """An array of N numbers, or of N fixed-size lists."""
    import pyarrow as pa

    flat = pa.array(values.reshape(-1))
    if values.ndim == 1:
        return flat
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
