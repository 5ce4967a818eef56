"""Metric table: every metric's name, direction, unit and meaning, and the names under which values are recorded.

Loop, record, MLflow, leaderboard, report and documents take metric names from here; no other module writes one as a
literal. A recorded name is `<split>/<key>`: `val/acc`, `test/nll`, `ood/sketch/acc`. Standard library only, so that the
driver reads the table without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TRAIN = "train"
VAL = "val"
TEST = "test"
HELD_OUT = "held_out"
"""The ID domain that a leave-one-domain-out fold leaves out of training and validation."""
OOD_MEAN = "ood/mean"
"""Unweighted mean over the OOD domains."""
OOD_WORST = "ood/worst"
"""The worst OOD domain."""


def ood(domain: str) -> str:
    """The split of one OOD domain."""
    return f"ood/{domain}"


@dataclass(frozen=True)
class Metric:
    """One quantity that is measured on a split."""

    key: str
    """Last part of the recorded name: `acc`."""
    title: str
    """Name in tables and on axes: `accuracy`."""
    direction: Literal["max", "min"]
    """Whether larger or smaller values are better."""
    unit: Literal["fraction", "nats", ""]
    """`fraction` is shown in per cent; "" = a plain number."""
    meaning: str
    """One sentence for the documents."""
    test_name: str | None = None
    """Recorded name on ID test where it is not `test/<key>`."""

    def on(self, split: str) -> str:
        """The recorded name on a split."""
        if split == TEST and self.test_name is not None:
            return self.test_name
        return f"{split}/{self.key}"

    def score(self, value: float) -> float:
        """The value oriented so that larger is better."""
        return value if self.direction == "max" else -value


@dataclass(frozen=True)
class TaskMetrics:
    """The metrics of one task, and which of them chooses."""

    task: str
    """Name of the task in a study file."""
    selection: Metric
    """Ranks units of a trial, trials of a search and configurations of a study, on validation data."""
    tie_breaker: Metric
    """Decides between equal values of `selection`."""
    reported: tuple[Metric, ...]
    """Measured on ID test and on every OOD domain, `selection` among them."""
    training: tuple[Metric, ...]
    """Measured on the training batches beside the loss."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Every metric once, the selection metric first."""
        return tuple(dict.fromkeys((self.selection, self.tie_breaker, *self.reported, *self.training)))

    @property
    def validation(self) -> str:
        """Recorded name of the selection metric on ID validation, per unit."""
        return self.selection.on(VAL)

    @property
    def best_validation(self) -> str:
        """Recorded name of the selection metric on ID validation for the weights that are tested."""
        return f"best/{self.validation}"

    @property
    def test(self) -> str:
        """Recorded name of the selection metric on ID test."""
        return self.selection.on(TEST)

    @property
    def ood_mean(self) -> str:
        """Recorded name of the selection metric's mean over the OOD domains."""
        return self.selection.on(OOD_MEAN)

    @property
    def ood_worst(self) -> str:
        """Recorded name of the selection metric on the worst OOD domain."""
        return self.selection.on(OOD_WORST)

    @property
    def held_out(self) -> str:
        """Recorded name of the selection metric on a fold's held-out domain."""
        return self.selection.on(HELD_OUT)

    def of_domain(self, domain: str) -> str:
        """Recorded name of the selection metric on one OOD domain."""
        return self.selection.on(ood(domain))


ACCURACY = Metric("acc", "accuracy", "max", "fraction", "Share of images whose top class is their label.")
NLL = Metric("nll", "negative log-likelihood", "min", "nats", "Mean cross-entropy per image.")
ECE = Metric(
    "ece",
    "calibration error",
    "min",
    "fraction",
    "Expected calibration error of the top class over 15 equal bins of confidence (Guo et al., 2017).",
    test_name="calib/ece",
)

CLASSIFICATION = TaskMetrics(
    task="classification",
    selection=ACCURACY,
    tie_breaker=NLL,
    reported=(ACCURACY, NLL, ECE),
    training=(ACCURACY,),
)

_TASKS: dict[str, TaskMetrics] = {CLASSIFICATION.task: CLASSIFICATION}


def register(metrics: TaskMetrics) -> None:
    """Add the metrics of a task.

    Raises:
        ValueError: another task has the name.
    """
    if _TASKS.get(metrics.task, metrics) != metrics:
        raise ValueError(f"A task's name is unique, but {metrics.task!r} has metrics of its own.")
    _TASKS[metrics.task] = metrics


def task_metrics(task: str = CLASSIFICATION.task) -> TaskMetrics:
    """The metrics of a task.

    Raises:
        ValueError: no such task.

    Example:
        >>> task_metrics("classification").best_validation
        'best/val/acc'
    """
    if task not in _TASKS:
        raise ValueError(f"A task is one of {', '.join(sorted(_TASKS))}, but got {task!r}.")
    return _TASKS[task]
