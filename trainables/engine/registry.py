"""Registry of strategies: the public module files at the root of `trainables`.

The folder is the registry, so that adding a strategy edits no file that exists. The engine looks strategies up by name
here; it imports none of them.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from trainables.specs.metrics import CLASSIFICATION

if TYPE_CHECKING:
    from trainables.engine.contract import Strategy

_FOLDER = Path(__file__).resolve().parent.parent


def strategies() -> list[str]:
    """Names of all strategies, sorted."""
    modules = pkgutil.iter_modules([str(_FOLDER)])
    return sorted(m.name for m in modules if not m.ispkg and not m.name.startswith("_"))


def strategy_class(name: str, task: str = CLASSIFICATION.task) -> type[Strategy]:
    """The `Strategy` of one name, imported on demand: the class that means it for a task.

    Raises:
        ValueError: no such strategy, with the nearest names, or no such task.
    """
    names = strategies()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=3)
        hint = f"Did you mean {' or '.join(repr(n) for n in nearest)}? " if nearest else ""
        raise ValueError(f"A strategy is one of {', '.join(names)}, but got {name!r}. {hint}".rstrip())
    module = importlib.import_module(f"trainables.{name}")
    strategy: type[Strategy] = module.STRATEGY
    # On demand as well: tasks import torch, which the names of strategies do not need.
    tasks = importlib.import_module("trainables.tasks.registry")
    return strategy.for_task(tasks.task_class(task))
