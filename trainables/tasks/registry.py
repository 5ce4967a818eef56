"""Registry of tasks.

The files of this folder that define `TASK`, and what was registered explicitly. A name is looked up among the rows of
the metric table first, so that no name from outside decides what is imported.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from trainables.data.trial_data import class_counts
from trainables.specs import metrics
from trainables.tasks.base import PLAIN, TargetSpec, Task, TaskSettings

if TYPE_CHECKING:
    from trainables.data.store import StoreLike
    from trainables.data.trial_data import TrialData
    from trainables.specs.trial_spec import TrialSpec

_registered: dict[str, type[Task]] = {}


def register(task: type[Task]) -> None:
    """Add a task of a plug-in or a test.

    With its row of the metric table.

    Raises:
        ValueError: another task has the name.
    """
    metrics.register(task.metrics)
    if _registered.get(task.name(), task) is not task:
        raise ValueError(f"A task's name is unique, but {task.name()!r} is registered as another class.")
    _registered[task.name()] = task


def task_class(name: str) -> type[Task]:
    """The class of one task, imported on demand.

    Raises:
        ValueError: no such task.
    """
    metrics.task_metrics(name)  # refuses unknown names
    if name in _registered:
        return _registered[name]
    task: type[Task] = importlib.import_module(f"trainables.tasks.{name}").TASK
    return task


@functools.lru_cache(maxsize=16)
def task_for(name: str, targets: TargetSpec, settings: TaskSettings = PLAIN) -> Task:
    """The task of one name on the targets of a store.

    Raises:
        ValueError: no such task, or a metric that cannot select.
    """
    return task_class(name)(targets, settings)


def task_of_trial(spec: TrialSpec, store: StoreLike) -> Task:
    """The task that a trial's settings name, on the targets of its data."""
    shared = spec.shared
    counts = class_counts(spec, store) if shared.loss.class_weights is not None else None
    settings = TaskSettings(shared.metric, shared.loss, shared.decoder)
    return task_for(shared.task, TargetSpec(tuple(store.classes), counts), settings)


def task_of(data: TrialData) -> Task:
    """The task of a trial, by its data."""
    return task_of_trial(data.spec, data.store)
