"""Predictions that a study keeps of its trials, and the per-sample results in them.

`<study>/predictions/trial-0007.arrow` has one row per sample of val, test and every OOD domain, in the order of the
data store: `split`, `name`, of classification `target` and `output` (logits), and one column `stat/<key>` per
sufficient statistic of the task.
A study of an earlier version, or one whose predictions were removed, has no such files: its per-sample results are
None. Where a file exists and cannot be used, `SampleTables.problems` has the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from orchestrator.record.kept_paths import predictions_file
from orchestrator.record.records import TrialRecord
from orchestrator.results.intervals import Floats, estimate_mean
from orchestrator.results.sample_values import (
    PIXEL_FUNCTIONS,
    SAMPLE_FUNCTIONS,
    Ends,
    PixelCounts,
    SampleFunction,
    SplitOutputs,
)
from trainables.specs.metrics import (
    CLASSIFICATION,
    OOD_MEAN,
    SEGMENTATION,
    TEMPERATURE,
    TEST,
    VAL,
    Metric,
    TaskMetrics,
    best,
    ood,
    ood_domain,
)
from trainables.storage.arrow_files import footer_problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMNS = ("split", "name")
"""Columns that every file of predictions has."""
OUTPUT_COLUMNS = ("target", "output")
"""Columns that it has of tasks whose outputs are kept."""
INTERSECTION = "stat/intersection"
UNION = "stat/union"
STATISTIC = "stat/"
"""Prefix of a column with a sufficient statistic of each sample."""
MEANS = {"acc": "correct"}
"""Metric key → the statistic whose mean over samples it is, where the two names differ."""
CLASS_MEANS = {"balanced_acc": "correct"}
"""Metric key → the statistic whose mean over the classes' means it is."""
TOLERANCE = 1e-5
"""Largest difference between a recorded metric and the mean of its per-sample results."""
MOVED = 2.0
"""The same for metrics that are no mean, in samples: rounding may decide on which side of a bin's edge, or of a tie, a
sample is. Their values are then shifted to the recorded metric."""


class PredictionsError(ValueError):
    """No predictions, or a file that is not one of them."""


def read_predictions(path: Path, outputs: bool = True) -> pa.Table:
    """The predictions of one trial, mapped into memory.

    Args:
        outputs: whether targets and outputs are needed, which are kept of classification alone; otherwise the
            counts of each picture do.

    Raises:
        PredictionsError: the file is missing, damaged, or has other columns.
    """
    try:
        # Before Arrow parses the schema, which may run code of an extension type.
        problem = footer_problem(path)
        if problem is not None:
            raise _not_predictions(path, problem)
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
            # Offsets of a damaged file may point outside of its buffers.
            table.validate()
    except FileNotFoundError as error:
        raise PredictionsError(
            f"There are no predictions at {path}. Run the study with `keep: all` or confirm the configuration."
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise _not_predictions(path, f"cannot be read as one ({error})") from error
    has_counts = not outputs and INTERSECTION in table.column_names
    needed = COLUMNS if has_counts else (*COLUMNS, *OUTPUT_COLUMNS)
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise _not_predictions(path, f"has no column {', '.join(missing)}")
    return table


def output_matrix(table: pa.Table) -> NDArray[Any]:
    """(n, K) outputs of kept predictions or of some of their rows, without a copy as Python numbers."""
    return matrix(table, "output")


def matrix(table: pa.Table, name: str) -> NDArray[Any]:
    """A column of fixed-size lists as (n, m)."""
    column = table.column(name)
    parts = [np.asarray(chunk.flatten()) for chunk in column.chunks if len(chunk)]
    values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return values.reshape(table.num_rows, column.type.list_size)


def _not_predictions(path: Path, problem: str) -> PredictionsError:
    return PredictionsError(
        f"{path} must be an Arrow file of predictions, but it {problem}. Delete it: results then do without it."
    )


def _digest(table: pa.Table, splits: NDArray[np.str_], order: NDArray[np.int64]) -> str:
    names = table.column("name").take(order).to_pylist()
    return hashlib.sha256(repr([*zip(splits[order].tolist(), names, strict=True)]).encode()).hexdigest()


@dataclass(frozen=True)
class SampleColumn:
    """Per-sample values of a metric of one run.

    Their weighted mean over strata is the metric.
    """

    values: Floats
    """(n,)"""
    strata: NDArray[np.int64]
    """(n,) index of each sample's stratum: its split, or its class within its split."""
    weights: Floats
    """(D,) weight of each stratum."""
    samples: str
    """Digest of the samples' splits and names: columns of equal digests are of the same samples in the same order."""
    effective: float
    """Independent samples behind the metric where all values are equal: of a mean over classes fewer than n."""
    ends: Ends


@dataclass(frozen=True)
class SampleTable:
    """Per-sample values of several runs of one configuration on the same samples (see `SampleColumn`)."""

    values: Floats
    """(S, n), a row per run."""
    strata: NDArray[np.int64]
    weights: Floats
    samples: str
    effective: float
    ends: Ends

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(self.values.shape[1])


class SampleTables:
    """Per-sample results of a study's trials, read at first use.

    Args:
        study: folder of the study; None = there are none.
        validation_domain: OOD domain that is validation data, and left out of means over OOD domains.
    """

    def __init__(self, study: Path | None = None, validation_domain: str | None = None) -> None:
        self.study = study
        self.validation_domain = validation_domain
        self.problems: dict[int, str] = {}
        """Number of a trial → why its predictions are there and cannot be used."""
        self._tables: dict[int, pa.Table | None] = {}
        self._columns: dict[tuple[int, str], SampleColumn | None] = {}

    def of(self, runs: Sequence[TrialRecord], name: str, metrics: TaskMetrics) -> SampleTable | None:
        """Per-sample values behind a recorded metric of some runs of one configuration.

        Args:
            name: recorded name of a metric on validation, ID test, one OOD domain, or the mean over the OOD domains.

        Returns:
            None where a run has no usable predictions, or where the metric has no per-sample values
            (`orchestrator.results.sample_values`), or is a mean over classes of which one has a single sample.
        """
        columns = [self._column(run, name, metrics) for run in runs]
        usable = [column for column in columns if column is not None]
        if not usable or len(usable) < len(columns) or len({column.samples for column in usable}) > 1:
            return None
        first = usable[0]
        values = np.stack([column.values for column in usable])
        return SampleTable(values, first.strata, first.weights, first.samples, first.effective, first.ends)

    def any_of(self, runs: Sequence[TrialRecord]) -> bool:
        """Whether any of these trials has readable predictions."""
        return any(self._table(run.number) is not None for run in runs)

    def _table(self, number: int) -> pa.Table | None:
        if number not in self._tables:
            self._tables[number] = self._read(number)
        return self._tables[number]

    def _read(self, number: int) -> pa.Table | None:
        if self.study is None:
            return None
        path = predictions_file(self.study, number)
        if not path.exists():
            return None
        try:
            return read_predictions(path, outputs=False)
        except PredictionsError as error:
            self.problems[number] = str(error)
            return None

    def _column(self, run: TrialRecord, name: str, metrics: TaskMetrics) -> SampleColumn | None:
        key = (run.number, name)
        if key not in self._columns:
            self._columns[key] = self._computed(run, name, metrics)
        return self._columns[key]

    def _computed(self, run: TrialRecord, name: str, metrics: TaskMetrics) -> SampleColumn | None:
        table = self._table(run.number)
        metric = metrics.named(name)
        recorded = run.metric(name)
        if table is None or metric is None or recorded is None:
            return None
        in_file = np.asarray(table.column("split").to_pylist())
        rows = [np.flatnonzero(in_file == split) for split in self._splits(name, metric, in_file)]
        rows = [part for part in rows if len(part)]
        statistic = f"{STATISTIC}{CLASS_MEANS.get(metric.key, MEANS.get(metric.key, metric.key))}"
        if not rows:
            return None
        if statistic in table.column_names:
            column = _of_statistic(table, statistic, rows, metric.key in CLASS_MEANS)
            ends: Ends = "share" if metric.unit == "fraction" else "symmetric"
            tolerance = TOLERANCE * max(1.0, abs(recorded))
        elif metrics.task == SEGMENTATION.task and metric.key in PIXEL_FUNCTIONS and INTERSECTION in table.column_names:
            column = _of_pixels(table, PIXEL_FUNCTIONS[metric.key], rows)
            ends = "bounded"
            tolerance = TOLERANCE
        elif metrics.task == CLASSIFICATION.task and metric.key in SAMPLE_FUNCTIONS:
            function = SAMPLE_FUNCTIONS[metric.key]
            column = _of_function(table, function, rows, run.metric(TEMPERATURE.name))
            ends = function.ends
            tolerance = TOLERANCE if function.mean else MOVED / min(len(part) for part in rows)
        else:
            return None
        if column is None:
            return None
        # A file of another attempt or version would put an interval around another number.
        if abs(column.mean - recorded) > tolerance:
            self.problems[run.number] = (
                f"Predictions and record of a trial must agree, but trial {run.number} has {name} {recorded:.6g} on "
                f"record and {column.mean:.6g} in its predictions: they are left out."
            )
            return None
        values = column.values + (recorded - column.mean) if statistic not in table.column_names else column.values
        return SampleColumn(
            values, column.strata, column.weights, _digest(table, in_file, column.order), column.effective, ends
        )

    def _splits(self, name: str, metric: Metric, in_file: NDArray[np.str_]) -> list[str]:
        """The splits that a recorded metric is measured on."""
        if name in (metric.on(VAL), best(metric.on(VAL))):
            return [VAL]
        if name == metric.on(TEST):
            return [TEST]
        domains = sorted({split for split in in_file.tolist() if ood_domain(split) is not None})
        if name == metric.on(OOD_MEAN):
            return [split for split in domains if split != ood(self.validation_domain or "")]
        return [split for split in domains if name == metric.on(split)]


@dataclass(frozen=True)
class _Values:
    """Per-sample values of one metric of one run, by stratum."""

    values: Floats
    strata: NDArray[np.int64]
    weights: Floats
    order: NDArray[np.int64]
    """(n,) rows of the table of predictions."""
    effective: float

    @property
    def mean(self) -> float:
        """The metric, by these values."""
        return float(estimate_mean(self.values[None], self.strata, self.weights))


def _of_statistic(table: pa.Table, statistic: str, rows: Sequence[NDArray[np.int64]], by_class: bool) -> _Values | None:
    """Values of a kept statistic; None where a stratum has one sample, and so no variance.

    Args:
        rows: of each split.
        by_class: whether the metric is the mean over the classes' means; strata are then the classes of each split.
    """
    targets = np.asarray(table.column("target"))
    groups: list[NDArray[np.int64]] = []
    weights: list[float] = []
    for part in rows:
        classes = np.unique(targets[part]) if by_class else [None]
        groups += [part if label is None else part[targets[part] == label] for label in classes]
        weights += [1 / (len(rows) * len(classes))] * len(classes)
    sizes = [len(group) for group in groups]
    if min(sizes) < 2:
        return None
    order = np.concatenate(groups)
    values = np.asarray(table.column(statistic), np.float64)[order]
    return _Values(values, *_strata(sizes, weights), order, _effective(weights, sizes))


def _of_function(
    table: pa.Table, function: SampleFunction, rows: Sequence[NDArray[np.int64]], temperature: float | None
) -> _Values | None:
    """Values of a metric of each split; None where it does not apply, or a class of a mean over classes has one sample.

    Strata are the splits.
    """
    targets = np.asarray(table.column("target"))
    logits = output_matrix(table)
    values: list[Floats] = []
    class_sizes: list[int] = []
    class_weights: list[float] = []
    for part in rows:
        computed = function.values(SplitOutputs(logits[part], targets[part], temperature))
        counts = np.bincount(targets[part]) if function.every_class else np.asarray([len(part)])
        counts = counts[counts > 0]
        if computed is None or counts.min() < 2:
            return None
        values.append(computed)
        class_sizes += counts.tolist()
        class_weights += [1 / (len(rows) * len(counts))] * len(counts)
    strata, weights = _strata([len(part) for part in rows], [1 / len(rows)] * len(rows))
    effective = _effective(class_weights, class_sizes)
    return _Values(np.concatenate(values), strata, weights, np.concatenate(rows), effective)


def _of_pixels(
    table: pa.Table, function: Callable[[PixelCounts], Floats | None], rows: Sequence[NDArray[np.int64]]
) -> _Values | None:
    """Values by picture of a metric that is counted in pixels; None where it has none on a split.

    Strata are the splits.
    """
    intersection = matrix(table, INTERSECTION)
    union = matrix(table, UNION)
    values: list[Floats] = []
    for part in rows:
        computed = function(PixelCounts(intersection[part], union[part]))
        if computed is None or len(part) < 2:
            return None
        values.append(computed)
    sizes = [len(part) for part in rows]
    shares = [1 / len(rows)] * len(rows)
    return _Values(np.concatenate(values), *_strata(sizes, shares), np.concatenate(rows), _effective(shares, sizes))


def _strata(sizes: Sequence[int], weights: Sequence[float]) -> tuple[NDArray[np.int64], Floats]:
    """Index of each sample's stratum, and the weights of the strata."""
    return np.repeat(np.arange(len(sizes)), sizes), np.asarray(weights)


def _effective(weights: Sequence[float], sizes: Sequence[int]) -> float:
    """Number of samples whose plain mean varies like the weighted mean of groups of one variance (Kish, 1965)."""
    return 1 / sum(weight**2 / size for weight, size in zip(weights, sizes, strict=True))
