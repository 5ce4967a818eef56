"""Registry of tasks: the files of this folder that define `TASK`, and what was registered explicitly.

A name is looked up among the rows of the metric table first, so that no name from outside decides what is imported.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from trainables.specs import metrics
from trainables.tasks.base import TargetSpec, Task

if TYPE_CHECKING:
    from trainables.data.trial_data import TrialData

_registered: dict[str, type[Task]] = {}


def register(task: type[Task]) -> None:
    """Add a task of a plug-in or a test, with its row of the metric table.

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
def task_for(name: str, targets: TargetSpec) -> Task:
    """The task of one name on the targets of a store.

    Raises:
        ValueError: no such task.
    """
    return task_class(name)(targets)


def task_of(data: TrialData) -> Task:
    """The task that a trial's settings name, on the targets of its data."""
    return task_for(data.spec.shared.task, TargetSpec(tuple(data.classes)))
