"""Predictions that a study keeps of its trials, and the per-sample results in them.

`<study>/predictions/trial-0007.arrow` has one row per sample of val, test and every OOD domain, in the order of the
data store: `split`, `name`, `target`, `output` (logits), and one column `stat/<key>` per sufficient statistic of the
task.
A study of an earlier version, or one whose predictions were removed, has no such files: its per-sample results are
None. Where a file exists and cannot be used, `SampleTables.problems` has the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from orchestrator.record.kept_paths import predictions_file
from orchestrator.record.records import TrialRecord
from orchestrator.results.intervals import Floats, estimate_mean
from trainables.specs.metrics import TEST, VAL, TaskMetrics, ood, ood_domain
from trainables.storage.arrow_files import footer_problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMNS = ("split", "name", "target", "output")
"""Columns that every file of predictions has."""
STATISTIC = "stat/"
"""Prefix of a column with a sufficient statistic of each sample."""
MEANS = {"acc": "correct"}
"""Metric key → the statistic whose mean over samples it is, where the two names differ."""
CLASS_MEANS = {"balanced_acc": "correct"}
"""Metric key → the statistic whose mean over the classes' means it is."""
TOLERANCE = 1e-5
"""Largest difference between a recorded metric and the mean of its per-sample results."""


class PredictionsError(ValueError):
    """No predictions, or a file that is not one of them."""


def read_predictions(path: Path) -> pa.Table:
    """The predictions of one trial, mapped into memory.

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
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise _not_predictions(path, f"has no column {', '.join(missing)}")
    return table


def output_matrix(table: pa.Table) -> NDArray[Any]:
    """(n, K) outputs of kept predictions or of some of their rows, without a copy as Python numbers."""
    column = table.column("output")
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


@dataclass(frozen=True)
class SampleTable:
    """Per-sample values of several runs of one configuration on the same samples (see `SampleColumn`)."""

    values: Floats
    """(S, n), a row per run."""
    strata: NDArray[np.int64]
    weights: Floats
    samples: str

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
            None where a run has no usable predictions, or where the metric is no mean over samples.
        """
        columns = [self._column(run, name, metrics) for run in runs]
        usable = [column for column in columns if column is not None]
        if not usable or len(usable) < len(columns) or len({column.samples for column in usable}) > 1:
            return None
        first = usable[0]
        values = np.stack([column.values for column in usable])
        return SampleTable(values, first.strata, first.weights, first.samples)

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
            return read_predictions(path)
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
        by_class = metric.key in CLASS_MEANS
        statistic = f"{STATISTIC}{CLASS_MEANS.get(metric.key, MEANS.get(metric.key, metric.key))}"
        if statistic not in table.column_names:
            return None
        in_file = np.asarray(table.column("split").to_pylist())
        rows = [np.flatnonzero(in_file == split) for split in self._splits(name, metrics, in_file)]
        groups: list[NDArray[np.int64]] = []
        weights: list[float] = []
        targets = np.asarray(table.column("target"))
        for part in rows:
            classes = np.unique(targets[part]) if by_class else [None]
            groups += [part if label is None else part[targets[part] == label] for label in classes]
            weights += [1 / (len(rows) * len(classes))] * len(classes)
        # A stratum of one sample has no variance.
        if not groups or any(len(group) < 2 for group in groups):
            return None
        order = np.concatenate(groups)
        values = np.asarray(table.column(statistic), np.float64)[order]
        strata = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        column = SampleColumn(values, strata, np.asarray(weights), _digest(table, in_file, order))
        mean = float(estimate_mean(values[None], strata, column.weights))
        # A file of another attempt or version would put an interval around another number.
        if abs(mean - recorded) > TOLERANCE * max(1.0, abs(recorded)):
            self.problems[run.number] = (
                f"Predictions and record of a trial must agree, but trial {run.number} has {name} {recorded:.6g} on "
                f"record and {mean:.6g} in its predictions: they are left out."
            )
            return None
        return column

    def _splits(self, name: str, metrics: TaskMetrics, in_file: NDArray[np.str_]) -> list[str]:
        """The splits that a recorded metric is measured on."""
        if name in (metrics.validation, metrics.best_validation):
            return [VAL]
        if name == metrics.test:
            return [TEST]
        domains = sorted({split for split in in_file.tolist() if ood_domain(split) is not None})
        if name == metrics.ood_mean:
            return [split for split in domains if split != ood(self.validation_domain or "")]
        return [split for split in domains if name == metrics.of_domain(str(ood_domain(split)))]
